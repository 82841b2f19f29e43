import json

import pytest
from score_data import CAPTIONS, FAST, GOOD, coco, results
from test_cli import run

from captioner.metrics import match_ids, score
from captioner.metrics.files import ReferenceSet
from captioner.metrics.matching import ImageNames

FILES = {1: "train/a/1.jpg", 2: "train/b/1.jpg", 3: "2.v1.jpg", 4: "2.jpg", 5: "é/x.png"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("train/a/1.jpg", 1),
        ("a/1.jpg", 1),
        ("/data/train/b/1.jpg", 2),
        ("C:\\data\\b\\1.jpg", 2),
        ("out/b/1", 2),
        ("b/1.png", 2),
        ("1.jpg", "1.jpg"),
        ("c/1.jpg", "c/1.jpg"),
        ("2", 4),
        ("2.v1", 3),
        ("some/2.v1.jpg", 3),
        ("e\u0301/x.png", 5),
        ("y.jpg", "y.jpg"),
        ("", ""),
    ],
)
def test_the_longest_ending_of_a_path_decides(name, found):
    assert ImageNames(FILES).find(name) == found


def test_a_name_of_several_files_is_nobodys():
    references = ReferenceSet({n: ["a"] for n in (1, 2, 3)}, {1: "1.jpg", 2: "y/1.jpg", 3: "z/3.jpg"})
    rows = [{"image_id": name, "caption": "a"} for name in ("1.jpg", "y/1.jpg", "w/1.jpg", "x/3.jpg")]
    assert [row["image_id"] for row in match_ids(rows, references)[0]] == [1, 2, "w/1.jpg", 3]


def named(*names):
    return [{"image_id": name, "caption": text} for name, text in zip(names, GOOD.values(), strict=True)]


@pytest.fixture
def nested(write):
    """Annotations of images that have one name, in two folders, and of a third."""
    content = coco()
    for image, name in zip(content["images"], ("a/1.jpg", "b/1.jpg", "b/2.jpg"), strict=True):
        image["file_name"] = name
    return write("captions_val.json", content)


def test_names_that_may_be_several_images_are_told(write, nested, capsys):
    path = write("ours.json", named("1.jpg", "b/1.jpg", "2.jpg"))
    assert run("score", path, nested, *FAST) == 1
    error = capsys.readouterr().err
    assert "the image '1.jpg' may be 'a/1.jpg' or 'b/1.jpg' of the annotations; the results must write more" in error
    assert run("score", path, nested, *FAST, "--partial") == 0
    assert "images scored: 2; without a prediction: 1; without references: 1" in capsys.readouterr().out
    path = write("ours.json", named("a/1.jpg", "x/2.jpg", "y/2.jpg"))
    assert run("score", path, nested, *FAST, "--partial") == 1
    assert "'x/2.jpg' and 'y/2.jpg' both stand for image 13 of the annotations" in capsys.readouterr().err


def test_images_are_called_what_results_call_them(write, nested, tmp_path, capsys):
    names = ["data/a/1.jpg", "data/b/1.jpg", "data/b/2.jpg"]
    files = write("ours.json", named(*names)), write("theirs.json", results(GOOD))
    output = tmp_path / "scores.json"
    assert run("score", *files, nested, *FAST, "--output", output, "--samples", 10) == 0
    expected = score(GOOD, CAPTIONS, metrics=("CIDEr",))["CIDEr"]
    for system in json.loads(output.read_text())["systems"]:
        assert [row["image_id"] for row in system["images"]] == names
        assert [row["caption"] for row in system["images"]] == list(GOOD.values())
        assert system["corpus"]["CIDEr"] == expected
    assert run("score", write("ours.json", named(*names)[:2]), nested, *FAST) == 1
    assert "1 image ('b/2.jpg') without a prediction" in capsys.readouterr().err
    assert run("score", files[1], nested, *FAST, "--output", output, "--overwrite") == 0
    assert [row["image_id"] for row in json.loads(output.read_text())["images"]] == [11, 12, 13]


def test_the_report_shows_images_that_results_name(write, nested, tmp_path, capsys):
    from PIL import Image

    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    page = tmp_path / "page.html"
    path = write("ours.json", named("x/a/1.jpg", "x/b/1.jpg", "x/b/2.jpg"))
    assert run("score", path, nested, *FAST, "--report", page, "--samples", 10) == 0
    assert "with 2 images of 3" in capsys.readouterr().out
    assert "x/a/1.jpg" in page.read_text()
