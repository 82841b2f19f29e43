"""Object scores: CHAIR, object recall, and the scores of references alone."""

import json
import random

import numpy as np
import pytest
from score_data import FAST, coco, results
from test_cli import run

from captioner.commands.evaluate import EvaluateConfig, evaluate
from captioner.data.config import TokenSourceConfig
from captioner.metrics import confidence, paired_test, score
from captioner.metrics.objects import COCO_WORDS, LOWER_IS_BETTER, ObjectConfig, Objects, count_objects, open_objects
from captioner.tags import TagVocabulary

WORDS = {name: [name, f"{name}s"] for name in ("dog", "cat", "frisbee", "couch", "car", "bird", "person")}
VOCABULARY = TagVocabulary(tuple(WORDS), tuple(map(tuple, WORDS.values())), ("toy car",))
CAPTIONS = {1: "a dog and a cat, a cat", 2: "a dog on a couch", 3: "a toy car", 4: "two birds"}
REFERENCES = {
    1: ["a dog", "dogs run", "the dog has a frisbee", "a person"],
    2: ["a cat", "the cat on a couch", "cats sleep", "a person"],
    3: ["a car", "red cars", "the car"],
    4: ["a bird", "birds", "the bird", "birds fly"],
}
LABELS = {1: {"dog", "frisbee", "person"}, 2: {"cat"}, 4: {"bird"}}
"""Image 3 has no labels."""

EXPECTED = {
    "CHAIR-i": 2 / 5,  # the cat of image 1 and the dog of image 2; the couch stands in a reference
    "CHAIR-s": 2 / 3,
    "object-recall": 2 / 4,  # dog and bird, not frisbee and cat; persons aside
    "objects-named": 2 / 4,  # dog and bird, not cat and car
    "objects-invented": 2 / 5,
}


def numbers(names):
    return frozenset(VOCABULARY.names.index(name) for name in names)


def objects(labels=LABELS, left_out=("person",), **options):
    labels = None if labels is None else {image_id: numbers(names) for image_id, names in labels.items()}
    return Objects(VOCABULARY, labels, numbers(WORDS), left_out=numbers(left_out), **options)


def label_file(labels=LABELS):
    images = {f"{n:012d}.jpg": sorted(map(list(WORDS).index, names)) for n, names in labels.items()}
    return {"classes": list(WORDS), "images": images}


def instances():
    categories = [{"id": 10 * n, "name": name.title()} for n, name in enumerate(WORDS)]
    boxes = [{"image_id": n, "category_id": 10 * list(WORDS).index(k)} for n, names in LABELS.items() for k in names]
    files = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in LABELS]
    return {"categories": categories, "images": files, "annotations": boxes * 2}  # an object may have several boxes


def test_scores_of_a_case_by_hand():
    found = score(CAPTIONS, REFERENCES, metrics=(), objects=objects())
    assert found.corpus == pytest.approx(EXPECTED)
    assert np.isnan(found.per_image["CHAIR-i"][2])
    assert found.image(1)["CHAIR-i"] == 1 / 2
    assert found.objects["dog"] == {
        **{"labelled": 1, "labelled_named": 1, "agreed": 1, "agreed_named": 1, "named": 2, "invented": 1, "recall": 1}
    }
    assert found.objects["car"]["recall"] is None
    assert "person" not in found.objects


def test_settings_change_what_counts():
    alone = score(CAPTIONS, REFERENCES, metrics=(), objects=objects(None))
    assert list(alone.corpus) == ["objects-named", "objects-invented"]
    with_persons = score(CAPTIONS, REFERENCES, metrics=(), objects=objects(left_out=()))
    assert with_persons["object-recall"] == pytest.approx(2 / 5)
    once = score(CAPTIONS, REFERENCES, metrics=(), objects=objects(agreement=1))
    assert once["objects-named"] == pytest.approx(3 / 6)  # frisbee, too, and the couch, which is named


def test_scores_without_anything_to_count_are_absent():
    found = score({1: "nothing"}, {1: ["a wall"]}, metrics=(), objects=objects({1: set()}))
    assert found.corpus == {"CHAIR-s": 0, **dict.fromkeys(set(EXPECTED) - {"CHAIR-s"})}
    assert found.absent["objects-named"] == "no image has an object that 3 of its references name"
    assert list(confidence(found, samples=10)) == ["CHAIR-s"]


def many(images=200):
    """Random captions, references and labels of objects."""
    chance = random.Random(1)
    names = [name for name in WORDS if name != "person"]
    labels = {n: set(chance.sample(names, chance.randint(0, 3))) for n in range(images)}
    references = {n: [" ".join(chance.choices([*labels[n], "x"], k=2)) for _ in range(5)] for n in range(images)}

    def captions(errors):
        return {n: " ".join(chance.choices([*labels[n], *["x", *names] * errors, "x"], k=3)) for n in range(images)}

    return labels, references, captions(1), captions(4)


def test_scores_follow_the_definition_of_chair():
    labels, references, captions, _ = many()
    found = score(captions, references, metrics=(), objects=objects(labels))
    named = {n: {word for word in text.split() if word in WORDS} for n, text in captions.items()}
    truth = {n: labels[n] | {word for text in references[n] for word in text.split() if word in WORDS} for n in labels}
    wrong = {n: named[n] - truth[n] for n in labels}
    assert found["CHAIR-i"] == pytest.approx(sum(map(len, wrong.values())) / sum(map(len, named.values())))
    assert found["CHAIR-s"] == pytest.approx(sum(map(bool, wrong.values())) / len(labels))
    both = sum(len(named[n] & labels[n]) for n in labels)
    assert found["object-recall"] == pytest.approx(both / sum(map(len, labels.values())))


def test_intervals_and_the_paired_test_resample_ratios():
    labels, references, good, poor = many()
    better, worse = (score(texts, references, metrics=("CIDEr",), objects=objects(labels)) for texts in (good, poor))
    weights = np.zeros(len(labels))
    weights[[0, 1, 5]] = 1, 2, 1
    rows = count_objects(list(labels), list(good.values()), list(references.values()), objects(labels)).rows
    total = rows[0] + 2 * rows[1] + rows[5]
    assert better.corpus_of(weights)["CHAIR-i"] == pytest.approx(total[1] / total[0])
    for name, interval in confidence(better, samples=200).items():
        assert interval.low < better[name] < interval.high
    gains = paired_test(better, worse, samples=200)
    assert gains["CHAIR-i"].p < 0.05
    assert gains["CHAIR-i"].low > 0
    assert paired_test(better, better, samples=20)["objects-invented"].p == 1


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A teddy bear on a bed beside a fire truck", ["teddy bear", "bed", "truck"]),
        ("a man eats a hot-dog at a bus stop", ["person", "hot dog"]),
        ("an orange cat and a black dog with a toy car", ["cat", "dog"]),
        ("a bowl of oranges, an apple and a glass of wine", ["bowl", "orange", "apple", "wine glass"]),
        ("a couple of elephants by the train tracks", ["elephant"]),
        ("TWO KNIVES; SCISSORS, SHEEP", ["knife", "scissors", "sheep"]),
        ("a skateboarder waits at a stop sign", ["person", "skateboard", "stop sign"]),
    ],
)
def test_phrases_of_coco(sentence, expected):
    vocabulary = TagVocabulary.read(COCO_WORDS)
    assert len(vocabulary) == 80
    assert {vocabulary.names[n] for n in vocabulary.find(sentence)} == set(expected)


@pytest.mark.parametrize("labels", [label_file(), instances()], ids=["classes", "instances"])
def test_the_command_scores_objects(write, tmp_path, capsys, labels):
    files = write("ours.json", results(CAPTIONS)), write("refs.json", coco(REFERENCES))
    words = write("words.json", {"words": WORDS, "none": ["toy car"]})
    options = "--objects.words", words, "--objects.labels", write("labels.json", labels)
    output = tmp_path / "scores.json"
    args = *files, *options, "--objects.leave-out", "Person", "--metrics", "BLEU", "--output", output
    assert run("score", *args) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert {name: found["corpus"][name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert found["confidence"].keys() >= EXPECTED.keys()
    assert found["objects"]["cat"]["recall"] == 0
    assert found["images"][2]["CHAIR-i"] is None
    assert f"lower is better: {', '.join(LOWER_IS_BETTER)}" in printed
    assert "images without labels, left out of CHAIR-i, CHAIR-s, object-recall: 1" in printed


def test_the_command_evaluate_scores_objects(write, noise, saved_model, tmp_path, no_java):
    labels = write("labels.json", {"classes": ["dog"], "images": {"val0.png": [0], "val1.png": []}})
    data = TokenSourceConfig(root=str(noise), workers=0)
    options = {"output": tmp_path / "scores", "num_beams": 1, "max_new_tokens": 4}
    config = EvaluateConfig(str(saved_model), data, "val", objects=ObjectConfig(labels, agreement=1), **options)
    found = evaluate(config)
    assert found["object-recall"] == 0
    assert found["CHAIR-s"] == 0
    assert found.absent["objects-named"] == "no image has an object that 1 of its references name"
    saved = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert saved["objects"]["dog"]["labelled"] == 1


def test_two_systems_are_compared_by_objects(write, tmp_path, capsys):
    other = write("other.json", results(CAPTIONS | {1: "a dog", 2: "a cat"}))
    files = write("ours.json", results(CAPTIONS)), other, write("refs.json", coco(REFERENCES))
    page, output = tmp_path / "page.html", tmp_path / "scores.csv"
    options = "--metrics", "--objects.words", "coco", "--report", page, "--output", output, "--samples", "20"
    assert run("score", *files, *options) == 0
    assert "objects-invented" in capsys.readouterr().out
    assert "objects-invented" in page.read_text()
    assert output.read_text().splitlines()[0].endswith("objects-named,objects-invented")


def test_faults_are_one_line(write, tmp_path, capsys):
    files = write("ours.json", results(CAPTIONS)), write("refs.json", coco(REFERENCES))
    labels, words = write("labels.json", label_file()), write("words.json", {"words": {"dog": ["dog"]}})
    nameless = coco(REFERENCES)
    nameless["images"] = [{"id": image["id"]} for image in nameless["images"]]
    twice = coco(REFERENCES)
    twice["images"] = [{"id": image["id"], "file_name": f"{image['id']}/000000000001.jpg"} for image in twice["images"]]
    dragons = write("dragons.json", {"classes": ["dog", "dragon"], "images": {"a.jpg": [0]}})
    strangers = write("strangers.json", {"classes": ["dog"], "images": {"a.jpg": [0]}})
    for args, message in (
        (
            (*files, "--objects.labels", dragons),
            "class 'dragon', which is not in the phrases of COCO's classes; give --objects.words",
        ),
        ((*files, "--objects.labels", labels, "--objects.words", words), "--objects.words"),
        ((*files, "--objects.labels", strangers), "labels of none of the images, such as '000000000001.jpg'"),
        ((*files, "--objects.labels", tmp_path / "gone.json"), "no file '"),
        ((*files, "--objects.words", tmp_path / "gone.json"), "gone.json'"),
        ((*files, "--objects.words", "coco", "--objects.leave-out", "dragon"), "no object is named 'dragon'"),
        ((*files, "--objects.words", "coco", "--objects.agreement", "0"), "agreement must be positive"),
        ((*files, "--objects.leave-out", "dog"), "--objects.leave-out has no effect"),
        ((files[0], write("n.json", nameless), "--objects.labels", strangers), "files have no names"),
        ((files[0], write("t.json", twice), "--objects.labels", write("one.json", COCO_LABELS)), "are both named"),
    ):
        assert run("score", *args, *FAST) in (1, 2), args
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


COCO_LABELS = {"classes": ["dog"], "images": {"000000000001.jpg": [0]}}


def test_objects_that_the_labels_cannot_hold_are_not_hallucinated(write):
    path = write("labels.json", COCO_LABELS)
    found = open_objects(ObjectConfig(labels=path), {1: "x/000000000001.jpg"})
    scores = score({1: "a dog and a cat"}, {1: ["a wall"]}, metrics=(), objects=found)
    assert scores["CHAIR-i"] == 0
    assert scores["objects-invented"] == 1
    other = open_objects(ObjectConfig(labels=path), {1: "2.jpg"}, required=False)
    assert list(score({1: "a dog"}, {1: ["a dog"]}, metrics=(), objects=other).corpus) == list(EXPECTED)[3:]
    assert "labels of none of the images, such as '2.jpg'" in other.warnings[0]
    assert "objects without labels, left out of CHAIR-i" in scores.warnings[-1]
