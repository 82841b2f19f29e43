import functools
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioner.metrics import java, score

DATA = Path(__file__).parents[1].parent / "shared/data"
FAST = ("BLEU", "ROUGE-L", "CIDEr")
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="java is not on the PATH")

PREDICTIONS = {1: "a dog runs", 2: "two cats sleep on a bed", "x": "A man's T.V. is on (loud)!"}
REFERENCES = {
    1: ["A dog is running fast.", "the dog runs"],
    2: ["Two cats are sleeping on a bed", "cats sleep", "a bed with two cats", "2 cats", "sleeping cats"],
    "x": ["The T.V. is on", "a man's loud TV"],
}


def leave_one_out(name, limit=None):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {name} here")
    captions = {}
    for row in json.loads(path.read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    captions = dict(list(captions.items())[:limit])
    return {n: group[0] for n, group in captions.items()}, {n: group[1:] for n, group in captions.items()}


@functools.cache
def our_captions(shared, limit=64):
    """What the shipped model says of the first images of Flickr8k's test split, and their references."""
    import captioner

    content = json.loads((shared / "flickr8k/annotations/captions_test.json").read_text())
    files = {image["id"]: shared / "flickr8k/images" / image["file_name"] for image in content["images"][:limit]}
    references = {}
    for row in content["annotations"]:
        references.setdefault(row["image_id"], []).append(row["caption"])
    captions = [result.caption for result in captioner.load().stream(files.values())]
    assert len(set(captions)) > 3
    return dict(zip(files, captions, strict=True)), {n: references[n] for n in files}


def broken(predictions):
    """Wreck captions as bad models do: cut, repeat, shuffle, drown in punctuation, write in another script."""
    chance = random.Random(0)
    wrecks = [
        lambda words: words[: len(words) // 2],
        lambda words: words[:1] * 60,
        lambda words: chance.sample(words, len(words)),
        lambda words: ["...", *words, "!!!", "-", "\u2014"],
        lambda words: ["."],
        lambda words: [word.upper() for word in words],
        lambda words: ["\u4e2d\u6587", "caf\u00e9", *words[::-1]],
        lambda words: ["1 1/2", "<b>", *words, "http://a.b/c", "K."],
    ]
    return {
        n: " ".join(wrecks[place % len(wrecks)](caption.split()))
        for place, (n, caption) in enumerate(predictions.items())
    }


def assert_equals_pycocoevalcap(scores):
    references = dict(enumerate(scores.references))
    predictions = {n: [caption] for n, caption in enumerate(scores.predictions)}
    corpus, images = Bleu(4).compute_score(references, predictions, verbose=0)
    for n in range(4):
        assert scores[f"BLEU-{n + 1}"] == pytest.approx(corpus[n], abs=1e-12)
        np.testing.assert_allclose(scores.per_image[f"BLEU-{n + 1}"], images[n], rtol=0, atol=1e-9)
    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        corpus, images = scorer.compute_score(references, predictions)
        assert scores[name] == pytest.approx(corpus, abs=1e-12)
        np.testing.assert_allclose(scores.per_image[name], images, rtol=0, atol=1e-9)


def test_equals_pycocoevalcap_on_a_few():
    assert_equals_pycocoevalcap(score(PREDICTIONS, REFERENCES, metrics=FAST))
    assert_equals_pycocoevalcap(score({1: "..."}, {1: ["a dog"]}, metrics=FAST))


@pytest.mark.slow
def test_known_values_and_pycocoevalcap_on_coco():
    scores = score(*leave_one_out("coco/captions_val2017.json"), metrics=FAST)
    assert scores["BLEU-4"] == pytest.approx(0.19553851792504892, abs=1e-12)
    assert scores["ROUGE-L"] == pytest.approx(0.4717583581954499, abs=1e-12)
    assert scores["CIDEr"] == pytest.approx(0.886544201761606, abs=1e-12)
    assert_equals_pycocoevalcap(scores)


@pytest.mark.slow
def test_equals_pycocoevalcap_on_flickr8k_and_on_broken_captions():
    predictions, references = leave_one_out("flickr8k/annotations/captions_test.json")
    assert_equals_pycocoevalcap(score(predictions, references, metrics=FAST))
    assert_equals_pycocoevalcap(score(broken(predictions), references, metrics=FAST))


@pytest.mark.slow
def test_equals_pycocoevalcap_on_our_models_captions(shared):
    assert_equals_pycocoevalcap(score(*our_captions(shared), metrics=FAST))


@needs_java
@pytest.mark.java
@pytest.mark.slow
def test_captions_through_all_of_pycocoevalcap(shared):
    """Its Java tokenizer, its scorers, its METEOR: nothing of ours but the captions."""
    predictions, references = our_captions(shared)
    assert_equals_all_of_pycocoevalcap(predictions, references)
    assert_equals_all_of_pycocoevalcap(broken(predictions), references)


def assert_equals_all_of_pycocoevalcap(predictions, references):
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    scores = score(predictions, references)
    predicted = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in predictions.items()})
    referred = PTBTokenizer().tokenize({n: [{"caption": text} for text in g] for n, g in references.items()})
    bleu, _ = Bleu(4).compute_score(referred, predicted, verbose=0)
    expected = {f"BLEU-{n + 1}": bleu[n] for n in range(4)}
    for name, scorer in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        expected[name], images = scorer.compute_score(referred, predicted)
        np.testing.assert_allclose(scores.per_image[name], images, rtol=0, atol=1e-9)
    assert scores.corpus == pytest.approx(expected, abs=1e-9)


@needs_java
@pytest.mark.java
@pytest.mark.slow
def test_meteor_known_value_and_captions_that_break_its_line_protocol():
    predictions, references = leave_one_out("coco/captions_val2017.json")
    scores = score(predictions, references, metrics=("BLEU",))
    nasty = ["a dog\nruns ||| fast", "", "a\rcat", "\u4e2d\u6587 caf\u00e9"]
    statistics = java.meteor_statistics(
        nasty + scores.predictions, [["a dog runs\nfast ||| x", "a cat"]] * 4 + scores.references
    )
    assert java.meteor(statistics[4:].sum(axis=0)) == pytest.approx(0.2420960375875178, abs=1e-12)
    first, second, third, fourth = java.meteor(statistics[:4])
    assert first > 0.4
    assert third == 1
    assert second == fourth == 0


def test_meteor_formula_on_recorded_statistics():
    """Statistics of six captions by METEOR 1.5, and what pycocoevalcap's Meteor scored them, alone and together."""
    matched = [[6, 5, 3, 2, 2, 2, 2, 2, 1, 1], [6, 7, 3, 4, 2, 2, 3, 3, 1, 1], [2, 2, 1, 1, 1, 1, 1, 1, 0, 0]]
    rows = [*matched, [3, 2, 3, 1, *[0] * 6], [1, 2, *[0] * 8], [9, 9, 2, 2, 5, 5, 1, 1, 1, 1]]
    ends = [[2, 5, 5], [2, 6, 6], [0, 2, 2], [0, 0, 0], [0, 0, 0], [5, 8, 9]]
    paraphrases = [[0, 0, 0, 0]] * 5 + [[1, 1, 0, 1]]
    statistics = np.array(
        [[*row, *[0] * 6, *more, *end] for row, more, end in zip(rows, paraphrases, ends, strict=True)], float
    )
    expected = [0.4398732861414338, 0.4356602863652688, 1.0, 0.0, 0.0, 0.4025144539352961]
    np.testing.assert_allclose(java.meteor(statistics), expected, rtol=0, atol=1e-12)
    assert java.meteor(statistics.sum(axis=0)) == pytest.approx(0.36711841294943925, abs=1e-12)


def test_without_java_meteor_is_absent_with_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    scores = score(PREDICTIONS, REFERENCES)
    assert scores["METEOR"] is None
    assert "java is not on the PATH" in scores.absent["METEOR"]
    assert "METEOR" not in scores.per_image
    assert list(scores.corpus) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    assert "METEOR absent: java" in str(scores)


def fake_java(folder, monkeypatch, script):
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exec sleep 60", "longer than 1 s"),
        ("echo boom >&2; exit 3", "exit code 3: boom"),
        ("cat > /dev/null; echo 1 2 3", "returned 1 lines for 3"),
        ("head -c 1000000 /dev/zero >&2; cat > /dev/null", "returned 0 lines"),
        ("cat > /dev/null; yes 'x x x x x x x x x x x x x x x x x x x x x x x' | head -3", "not numbers"),
    ],
)
def test_a_java_that_hangs_or_fails_stops_nothing(tmp_path, monkeypatch, script, message):
    fake_java(tmp_path, monkeypatch, script)
    scores = score(PREDICTIONS, REFERENCES, java_timeout=1)
    assert scores["METEOR"] is None
    assert message in scores.absent["METEOR"]
    assert scores["CIDEr"] > 0


def test_a_java_that_is_a_script_is_stopped_with_what_it_started(tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, f"sleep 60 & echo $! > {tmp_path}/child; wait")
    score(PREDICTIONS, REFERENCES, metrics=("METEOR",), java_timeout=1)
    child, patience = Path("/proc", (tmp_path / "child").read_text().strip()), 100
    while child.exists() and "Z (zombie)" not in (child / "status").read_text():
        time.sleep(0.1)
        patience -= 1
        assert patience


def test_spice_only_on_request_and_only_with_its_models(tmp_path):
    assert "SPICE" not in score(PREDICTIONS, REFERENCES, metrics=FAST).corpus
    assert "spice_models" in score(PREDICTIONS, REFERENCES, metrics=("SPICE",)).absent["SPICE"]
    absent = score(PREDICTIONS, REFERENCES, metrics=("SPICE",), spice_models=tmp_path).absent["SPICE"]
    assert "stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar" in absent
    assert list(tmp_path.iterdir()) == []


def test_spice_reads_the_programs_answer(tmp_path, monkeypatch):
    for part in ("", "-models"):
        (tmp_path / f"stanford-corenlp-3.6.0{part}.jar").touch()
    answer = json.dumps([{"image_id": n, "scores": {"All": {"f": f}}} for n, f in ((1, 0.5), (0, 0.25), (2, None))])
    (tmp_path / "answer.json").write_text(answer)
    fake_java(tmp_path, monkeypatch, f'while [ "$1" != -out ]; do shift; done; cp {tmp_path}/answer.json "$2"')
    scores = score(PREDICTIONS, REFERENCES, metrics=("SPICE",), spice_models=tmp_path)
    assert scores.per_image["SPICE"][:2].tolist() == [0.25, 0.5]
    assert math.isnan(scores.per_image["SPICE"][2])
    assert scores["SPICE"] == 0.375
    assert scores.to_dict()["images"][2]["SPICE"] is None
    assert "images that SPICE gave no score, left out of its mean: 1" in scores.warnings
    for answer, reason in (
        ("no json", "not scores"),
        ('[{"image_id": 0}]', "not scores"),
        ("[]", "no caption a score"),
    ):
        (tmp_path / "answer.json").write_text(answer)
        absent = score(PREDICTIONS, REFERENCES, metrics=("SPICE",), spice_models=tmp_path).absent["SPICE"]
        assert reason in absent


def test_keyed_by_id_not_by_place():
    shuffled = {key: PREDICTIONS[key] for key in ("x", 1, 2)}
    assert score(shuffled, REFERENCES, metrics=FAST).corpus == score(PREDICTIONS, REFERENCES, metrics=FAST).corpus
    rows = [{"image_id": key, "caption": caption} for key, caption in shuffled.items()]
    assert score(rows, REFERENCES, metrics=FAST).corpus == score(PREDICTIONS, REFERENCES, metrics=FAST).corpus


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (
            {1: "a"},
            {1: ["a"], 2: ["b"], 3: ["c"], 4: ["d"], 5: ["e"]},
            r"4 images \(2, 3, 4, \.\.\.\) without a prediction",
        ),
        ({1: "a", 9: "b"}, {1: ["a"]}, r"1 image \(9\) predicted but without references"),
        ({"1": "a"}, {1: ["a"]}, "ids are str in the one, int in the other"),
        ([{"image_id": 1, "caption": "a"}] * 2, {1: ["a"]}, r"1 image \(1\) predicted more than once"),
        ([{"id": 1}], {1: ["a"]}, "1 results lack 'image_id' or 'caption'"),
        ({1: math.nan}, {1: ["a"]}, r"1 image \(1\) with a prediction that is no text but nan"),
        ({1: None}, {1: ["a"]}, "no text but None"),
        ({1: " "}, {1: ["a"]}, r"1 image \(1\) with an empty prediction"),
        ([{"image_id": [1], "caption": "a"}], {1: ["a"]}, "an id that is neither a number nor text"),
        ({1: "a"}, {1: "a dog"}, "without a list of references"),
        ({1: "a"}, {1: []}, "without a list of references"),
        ({1: "a"}, {1: ["a", 5]}, "reference that is no text"),
        ({1: "a"}, {1: ["a", ""]}, "empty reference"),
        ({}, {}, "no image id has both"),
        (None, {1: ["a"]}, "predictions must be a mapping or COCO results, not NoneType"),
        ({1: "a"}, [["a"]], "references must be a mapping of image ids to captions, not list"),
        ({1: "a"}, {1: None}, "without a list of references"),
        ({1: "a"}, {1: math.nan}, "without a list of references"),
        ([{"image_id": (1, [2]), "caption": "a"}], {1: ["a"]}, "an id that is neither a number nor text"),
    ],
)
def test_bad_input_is_named_in_one_line(predictions, references, message):
    with pytest.raises(ValueError, match=message) as error:
        score(predictions, references, metrics=FAST)
    assert "\n" not in str(error.value)


def test_one_metric_needs_no_list():
    assert score({1: "a dog"}, {1: ["a dog"]}, metrics="ROUGE-L").corpus.keys() == {"ROUGE-L"}


def test_unknown_metric():
    with pytest.raises(ValueError, match="no metric 'BLUE'; choose from"):
        score(PREDICTIONS, REFERENCES, metrics=("BLUE",))


def test_partial_scores_what_both_have_and_says_so():
    scores = score({1: "a dog runs", 7: "x"}, REFERENCES, metrics=FAST, partial=True)
    assert scores.image_ids == [1]
    assert scores.partial == {"scored": 1, "missing": 2, "extra": 1}
    assert any("images scored: 1; without a prediction: 2; without references: 1" in text for text in scores.warnings)
    with pytest.raises(ValueError, match="no image id has both"):
        score({7: "x"}, REFERENCES, partial=True)


def test_warnings_where_a_score_means_little():
    warnings = score({1: "a dog"}, {1: ["a dog"] * 5}, metrics=FAST).warnings
    assert any("CIDEr of a single image is always 0" in text for text in warnings)
    assert not any("fewer than five" in text for text in warnings)
    warnings = score({1: "a", 2: ""}, {1: ["a"] * 5, 2: ["b"]}, metrics=FAST, allow_empty=True).warnings
    assert any(text.startswith("images with fewer than five references: 1") for text in warnings)
    assert "predictions without words: 1" in warnings


def test_a_caption_of_many_words_fits_in_memory():
    words = [f"w{n}" for n in range(100_000)]
    scores = score({1: " ".join(words)}, {1: ["w3 w9 w1", "w5"]}, metrics=("ROUGE-L",), tokenized=True)
    precision, recall = 2 / len(words), 1.0
    assert scores["ROUGE-L"] == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_explain_names_the_references():
    scores = score(PREDICTIONS, REFERENCES, metrics=FAST)
    found = {match.ngram: match for match in scores.explain(1)}
    assert found[("a", "dog")].references == (0,)
    assert found[("dog", "runs")].references == (1,)
    assert found[("dog",)].references == (0, 1)
    assert found[("a", "dog", "runs")].references == ()
    assert found[("a", "dog", "runs")].credited == 0
    with pytest.raises(ValueError, match="image id 5 was not scored"):
        scores.explain(5)


def test_says_which_tokenizer():
    assert score(PREDICTIONS, REFERENCES, metrics=FAST).tokenizer.startswith("PTB")
    raw = score({1: "A Dog."}, {1: ["A Dog."]}, metrics=FAST, tokenized=True)
    assert raw.tokenizer.startswith("none")
    assert raw.predictions == ["A Dog."]


def test_to_dict_is_json():
    whole = json.loads(json.dumps(score(PREDICTIONS, REFERENCES, metrics=FAST).to_dict()))
    numbers = score({np.int64(7): "a dog"}, {np.int64(7): ["a dog runs"]}, metrics=FAST)
    assert json.loads(json.dumps(numbers.to_dict()))["images"][0]["image_id"] == 7
    assert whole["images"][2]["image_id"] == "x"
    assert set(whole["corpus"]) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}


def test_import_is_light():
    script = "import sys, captioner.metrics; print('torch' in sys.modules, 'pycocoevalcap' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
