import json
import random

import numpy as np
import pytest
from processes import Script

from captioner.metrics import CaptionMetric, caption_statistics, confidence, paired_test, score

FAST = ("BLEU", "ROUGE-L", "CIDEr")
PREDICTIONS = {1: "a dog runs", 2: "two cats sleep on a bed", "x": "A man's T.V. is on (loud)!"}
REFERENCES = {
    1: ["A dog is running fast.", "the dog runs"],
    2: ["Two cats are sleeping on a bed", "cats sleep", "a bed with two cats", "2 cats", "sleeping cats"],
    "x": ["The T.V. is on", "a man's loud TV"],
}


def systems(images=300):
    chance = random.Random(0)
    words = [f"w{n}" for n in range(50)]
    references = {n: [" ".join(chance.choices(words, k=8)) for _ in range(5)] for n in range(images)}

    def system(errors):
        return {
            n: " ".join(chance.choice(words) if chance.random() < errors else word for word in group[0].split())
            for n, group in references.items()
        }

    return [score(system(errors), references, metrics=FAST) for errors in (0.5, 0.4, 0.5)]


def test_confidence_and_paired_test():
    worse, better, same = systems()
    intervals = confidence(worse, samples=300)
    assert set(intervals) == set(worse.corpus)
    for name, interval in intervals.items():
        assert interval.low < worse[name] == interval.score < interval.high
    assert confidence(worse, samples=300) == intervals
    # The interval of a mean is about 1.96 standard errors to each side.
    values = worse.per_image["ROUGE-L"]
    half = (intervals["ROUGE-L"].high - intervals["ROUGE-L"].low) / 2
    assert half == pytest.approx(1.96 * values.std() / len(values) ** 0.5, rel=0.15)

    gains = paired_test(worse, better, samples=300)
    assert gains["BLEU-4"].p < 0.05
    assert gains["CIDEr"].low > 0
    assert gains["CIDEr"].difference == pytest.approx(better["CIDEr"] - worse["CIDEr"])
    assert paired_test(worse, same, samples=300)["CIDEr"].p > 0.05
    assert paired_test(worse, worse, samples=50)["BLEU-4"].p == 1


def test_weights_of_one_give_the_corpus_scores():
    scores = systems(20)[0]
    for name, value in scores.corpus_of(np.ones((2, 20))).items():
        assert value.shape == (2,)
        assert value[1] == pytest.approx(scores[name], abs=1e-12)


def test_paired_test_aligns_by_id_and_refuses_other_images():
    first = score(PREDICTIONS, REFERENCES, metrics=FAST)
    turned = score(PREDICTIONS, dict(reversed(REFERENCES.items())), metrics=FAST)
    assert paired_test(first, turned, samples=20)["ROUGE-L"].p == 1
    other = score({1: "a dog"}, {1: ["a dog"]}, metrics=FAST)
    with pytest.raises(ValueError, match="differ in 2 images"):
        paired_test(first, other)
    others = {image_id: ["something else"] for image_id in REFERENCES}
    with pytest.raises(ValueError, match="different references"):
        paired_test(first, score(PREDICTIONS, others, metrics=FAST))
    with pytest.raises(ValueError, match="samples must be two or more"):
        confidence(first, samples=1)


def test_caption_statistics():
    found = caption_statistics(["A dog runs.", "a dog runs", "A cat"], training=["a cat!", "a bird"])
    assert (found.captions, found.vocabulary, found.min_length, found.max_length) == (3, 4, 2, 3)
    assert found.mean_length == pytest.approx(8 / 3)
    assert found.distinct_1 == pytest.approx(4 / 8)
    assert found.distinct_2 == pytest.approx(3 / 5)
    assert found.unique == pytest.approx(2 / 3)
    assert found.seen_in_training == pytest.approx(1 / 3)
    assert caption_statistics(["a"]).seen_in_training is None
    with pytest.raises(ValueError, match="no captions"):
        caption_statistics([])


def test_metric_object_on_one_process():
    metric = CaptionMetric()
    for key in PREDICTIONS:
        metric.update([key], [PREDICTIONS[key]], [REFERENCES[key]])
    metric.update([1], ["a dog runs"], [REFERENCES[1]])  # a padded batch repeats an image
    assert metric.compute()["CIDEr"] == pytest.approx(score(PREDICTIONS, REFERENCES, metrics=FAST)["CIDEr"], abs=1e-12)
    with pytest.raises(ValueError, match="2 image ids, 1 predictions"):
        metric.update([1, 2], ["a"], [["a"]])
    metric.reset()
    with pytest.raises(ValueError, match="nothing to score"):
        metric.compute()


WORKER = """
import json, sys
import torch.distributed as dist
from captioner.metrics import CaptionMetric
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
rows = json.loads(sys.argv[3])
metric = CaptionMetric()
for image_id, caption, references in rows[rank::2] + rows[:1]:
    metric.update([image_id], [caption], [references])
scores = metric.compute()
print(json.dumps(scores.to_dict()))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_metric_object_gathers_over_two_processes(tmp_path):
    pytest.importorskip("torch")
    rows = [[n, f"a dog number w{n} runs", [f"dog w{n} runs", f"a w{n}"]] for n in range(7)]
    workers = [Script("-c", WORKER, rank, tmp_path / "meet", json.dumps(rows)) for rank in (0, 1)]
    answers = [json.loads(worker.communicate()[0]) for worker in workers]
    alone = CaptionMetric()
    alone.update(*zip(*rows, strict=True))
    assert answers[0] == answers[1] == alone.compute().to_dict()
