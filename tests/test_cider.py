import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs

from captioner.metrics import CiderD, DocumentFrequency, tokenize

DATA = Path(__file__).parents[1].parent / "shared/data"


def annotations(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {name} here")
    captions = {}
    for row in json.loads(path.read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    tokens = iter(tokenize([caption for group in captions.values() for caption in group]))
    return {image_id: [next(tokens) for _ in group] for image_id, group in captions.items()}


def made_up(images=40, seed=0):
    chance = random.Random(seed)
    words = [f"w{n}" for n in range(30)]
    return {
        n: [" ".join(chance.choices(words, k=chance.randint(1, 12))) for _ in range(chance.randint(1, 6))]
        for n in range(images)
    }


def official(references, predictions):
    return Cider().compute_score(references, {image_id: [caption] for image_id, caption in predictions.items()})[1]


class TrainScorer(CiderScorer):
    """pycocoevalcap's scorer with another corpus' statistics, whose size it would otherwise take from the batch."""

    images = 0
    ref_len = property(lambda self: np.log(float(self.images)), lambda self, value: None)


def test_equals_pycocoevalcap_on_made_up_captions():
    references = made_up()
    chance = random.Random(1)
    predictions = {n: " ".join(chance.choices([*group[0].split(), "new"], k=9)) for n, group in references.items()}
    predictions |= {0: "", 1: "w1", 2: "unseen words only", 3: references[3][0], 4: "w1 w1 w1 w1 w1", 5: "w1\u00a0w2"}
    ours = CiderD(references).score(list(predictions), list(predictions.values()))
    np.testing.assert_allclose(ours, official(references, predictions), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("place", range(5))
def test_equals_pycocoevalcap_on_coco(place):
    everything = annotations("coco/captions_val2017.json")
    references = {n: group[:place] + group[place + 1 :] for n, group in everything.items()}
    predictions = {n: group[place] for n, group in everything.items()}
    ours = CiderD(references).score(list(predictions), list(predictions.values()))
    np.testing.assert_allclose(ours, official(references, predictions), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_equals_pycocoevalcap_on_flickr8k_with_training_statistics(split):
    train = annotations("flickr8k/annotations/captions_train.json")
    everything = annotations(f"flickr8k/annotations/captions_{split}.json")
    frequency = {}
    for group in train.values():
        for ngram in {ngram for counts in cook_refs(group) for ngram in counts}:
            frequency[ngram] = frequency.get(ngram, 0.0) + 1
    scorer, image_ids, captions = TrainScorer(n=4, sigma=6.0), [], []
    scorer.images = len(train)
    for image_id, group in everything.items():
        for place, caption in enumerate(group):
            scorer += (caption, group[:place] + group[place + 1 :])
            image_ids.append((image_id, place))
            captions.append(caption)
    scorer.document_frequency.update(frequency)
    references = {(n, place): everything[n][:place] + everything[n][place + 1 :] for n, place in image_ids}
    ours = CiderD(references, DocumentFrequency(train)).score(image_ids, captions)
    np.testing.assert_allclose(ours, scorer.compute_cider(), rtol=0, atol=1e-9)


def test_batches_with_several_samples_and_any_order():
    references = made_up()
    scorer = CiderD(references)
    image_ids = [7, 3, 7, 7, 0]
    captions = ["w1 w2 w3", "w4", "w1 w2 w3", references[7][0], "w9 w9 unknown unknown"]
    together = scorer.score(image_ids, captions)
    alone = [scorer.score([image_id], [caption])[0] for image_id, caption in zip(image_ids, captions, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-12)
    assert together[0] == together[2]
    assert scorer.score([], []).shape == (0,)


def test_statistics_survive_a_file(tmp_path):
    train, references = made_up(60, seed=3), made_up(20, seed=4)
    references[0] = ["word nobody trained on", "w1 w2"]
    frequency = DocumentFrequency(train)
    frequency.save(tmp_path / "df.npz")
    loaded = DocumentFrequency.load(tmp_path / "df.npz")
    captions = [group[0] for group in made_up(20, seed=5).values()]
    expected = CiderD(references, frequency).score(range(20), captions)
    np.testing.assert_array_equal(CiderD(references, loaded).score(range(20), captions), expected)
    assert loaded.num_images == 60
    assert math.isclose(loaded.log_images, math.log(60))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="no document frequencies"):
        DocumentFrequency.load(tmp_path / "other.npz")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ValueError, match="no document frequencies"):
        DocumentFrequency.load(tmp_path / "text")
    damaged = bytearray((tmp_path / "df.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(ValueError, match="no document frequencies"):
        DocumentFrequency.load(tmp_path / "damaged")
    with pytest.raises(FileNotFoundError):
        DocumentFrequency.load(tmp_path / "gone")


def test_scoring_leaves_the_statistics_alone():
    frequency = DocumentFrequency(made_up(seed=3))
    size, words = frequency.grams.size, len(frequency.grams.words)
    scorer = CiderD(made_up(seed=4), frequency)
    first = scorer.score([1, 2], ["never heard before", "w1 w2"])
    np.testing.assert_array_equal(scorer.score([1, 2], ["never heard before", "w1 w2"]), first)
    assert (frequency.grams.size, len(frequency.grams.words)) == (size, words)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CiderD({}), "no references"),
        (lambda: CiderD({1: []}), "1 images have no list of references, such as 1"),
        (lambda: CiderD({1: "a dog"}), "no list of references"),
        (lambda: CiderD({1: ["a"]}).score([2], ["a"]), "no references for 1 image ids, such as 2"),
        (lambda: CiderD({1: ["a"]}).score([1, 1], ["a"]), "2 image ids for 1 captions"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
