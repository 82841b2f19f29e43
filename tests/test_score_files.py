import csv
import json
import math
import os
import subprocess
import sys

import pytest
from test_cli import run

from captioner.metrics import match_ids, read_references, read_results, score
from captioner.metrics.files import ReferenceSet
from captioner.score_files import short_names

FAST = ("--metrics", "BLEU", "ROUGE-L", "CIDEr")
CAPTIONS = {
    11: ["A dog runs through the grass.", "the dog is running", "a brown dog runs", "dog in a field", "a dog outside"],
    12: ["Two men on a beach", "men at the sea", "two people on sand", "men walk on a beach", "a beach with two men"],
    13: ["A cat sits on a red chair", "the cat sits", "a cat on furniture", "a cat rests", "cat on a chair"],
}
GOOD = {11: "a dog runs in the grass", 12: "two men walk on a beach", 13: "a cat sits on a chair"}
POOR = {11: "a dog", 12: "a man in the snow", 13: "two dogs run"}


def results(captions):
    return [{"image_id": n, "caption": text} for n, text in captions.items()]


def coco(captions=CAPTIONS):
    rows = [
        {"image_id": n, "id": 10 * n + k, "caption": c} for n, group in captions.items() for k, c in enumerate(group)
    ]
    return {"images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in captions], "annotations": rows}


def karpathy(splits=("test", "test", "train")):
    images = [
        {"filename": f"{n}.jpg", "imgid": n, "split": split, "sentences": [{"raw": text} for text in group]}
        for (n, group), split in zip(CAPTIONS.items(), splits, strict=True)
    ]
    return {"images": images, "dataset": "flickr8k"}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def annotations(write):
    return write("captions_val.json", coco())


def test_a_table_and_a_file_with_the_library_s_scores(write, annotations, tmp_path, capsys):
    output = tmp_path / "new" / "scores.json"
    assert run("score", write("ours.json", results(GOOD)), annotations, *FAST, "--output", output) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    expected = score(GOOD, CAPTIONS, metrics=("BLEU", "ROUGE-L", "CIDEr"))
    assert found["corpus"] == pytest.approx(expected.corpus)
    assert list(found["corpus"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert 0 < found["corpus"]["BLEU-1"] <= 1
    assert [row["image_id"] for row in found["images"]] == [11, 12, 13]
    assert found["images"][0]["caption"] == GOOD[11]
    low, high = found["confidence"]["CIDEr"]
    assert low <= found["corpus"]["CIDEr"] <= high
    assert found["statistics"]["mean_length"] == pytest.approx(6)
    assert found["references"]["captions"] == 15
    assert f"CIDEr    {expected['CIDEr']:.4f}  {low:.4f} to {high:.4f}" in printed
    assert "3 images of captions_val.json, 5.0 references each" in printed
    assert [path.name for path in output.parent.iterdir()] == ["scores.json"]


def test_csv_holds_the_set_then_each_image(write, annotations, tmp_path):
    output = tmp_path / "scores.csv"
    assert run("score", write("ours.json", results(GOOD)), annotations, *FAST, "--output", output) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["corpus", "low", "high", "image", "image", "image"]
    expected = score(GOOD, CAPTIONS, metrics=("CIDEr",))
    assert float(rows[0]["CIDEr"]) == pytest.approx(expected["CIDEr"])
    assert [float(row["CIDEr"]) for row in rows[3:]] == pytest.approx(expected.per_image["CIDEr"].tolist())
    assert [row["image_id"] for row in rows[3:]] == ["11", "12", "13"]


def test_two_systems_are_compared(write, annotations, tmp_path, capsys):
    files = write("poor.json", results(POOR)), write("good.json", results(dict(reversed(GOOD.items()))))
    outputs = [tmp_path / "both.json", tmp_path / "both.csv"]
    for output in outputs:
        assert run("score", *files, annotations, *FAST, "--output", output, "--samples", "50") == 0
    printed = capsys.readouterr().out
    assert "A: poor.json" in printed
    assert "B - A" in printed
    found = json.loads(outputs[0].read_text())
    first, second = found["systems"]
    gain = found["differences"]["CIDEr"]
    assert gain["difference"] == pytest.approx(second["corpus"]["CIDEr"] - first["corpus"]["CIDEr"])
    assert gain["difference"] > 0
    assert 0 < gain["p"] <= 1
    assert [row["image_id"] for row in second["images"]] == [11, 12, 13]
    with outputs[1].open(newline="") as file:
        kinds = [row["row"] for row in csv.DictReader(file)]
    assert kinds[6:10] == ["difference", "difference low", "difference high", "p"]
    assert kinds.count("image") == 6


def test_partial_says_what_it_left_out(write, annotations, tmp_path, capsys):
    some = write("some.json", results({11: GOOD[11], 12: GOOD[12], 99: "a bird"}))
    assert run("score", some, annotations, *FAST) == 1
    error = capsys.readouterr().err
    assert "'some.json': 1 image (13) without a prediction; 1 image (99) predicted but without references" in error
    assert "--partial" in error
    output = tmp_path / "scores.json"
    assert run("score", some, annotations, *FAST, "--partial", "--output", output) == 0
    assert "images scored: 2; without a prediction: 1; without references: 1" in capsys.readouterr().out
    assert json.loads(output.read_text())["partial"] == {"scored": 2, "missing": 1, "extra": 1}

    other = write("other.json", results({12: POOR[12], 13: POOR[13]}))
    assert run("score", some, other, annotations, *FAST, "--partial", "--output", output, "--overwrite") == 0
    found = json.loads(output.read_text())
    assert [[row["image_id"] for row in system["images"]] for system in found["systems"]] == [[12], [12]]
    printed = capsys.readouterr().out
    assert "some.json: images scored: 1; without a prediction: 1; without references: 1" in printed
    assert "images that the other system has no caption for, left out: 1" in printed
    alone = write("alone.json", results({13: POOR[13]}))
    assert run("score", some, alone, annotations, *FAST, "--partial") == 1
    assert "no image with references has a caption of both some.json and alone.json" in capsys.readouterr().err


def test_karpathy_annotations_are_scored_on_test_unless_told(write, tmp_path, capsys):
    annotations = write("dataset_flickr8k.json", karpathy())
    output = tmp_path / "scores.json"
    test = write("test.json", results({11: GOOD[11], 12: GOOD[12]}))
    assert run("score", test, annotations, *FAST, "--output", output) == 0
    expected = score({11: GOOD[11], 12: GOOD[12]}, {n: CAPTIONS[n] for n in (11, 12)}, metrics=("CIDEr",))
    assert json.loads(output.read_text())["corpus"]["CIDEr"] == pytest.approx(expected["CIDEr"])
    assert run("score", write("train.json", results({13: GOOD[13]})), annotations, *FAST, "--split", "train") == 0
    assert "CIDEr of a single image is always 0" in capsys.readouterr().out
    assert run("score", test, annotations, *FAST, "--split", "dev") == 1
    assert "has no split 'dev'; name one of test, train" in capsys.readouterr().err


def test_share_of_captions_seen_in_training(write, annotations, tmp_path):
    seen = {1: ["Two men walk on a beach!", "a dog runs in the grass"]}
    train = write("captions_train.json", coco(seen))
    output = tmp_path / "scores.json"
    files = write("ours.json", results(GOOD)), annotations
    assert run("score", *files, *FAST, "--train", train, "--output", output) == 0
    assert json.loads(output.read_text())["statistics"]["seen_in_training"] == pytest.approx(2 / 3)
    train = write("dataset_x.json", karpathy(("train", "restval", "test")))
    copied = write("copied.json", results({n: group[0] for n, group in CAPTIONS.items()}))
    assert run("score", copied, annotations, *FAST, "--train", train, "--output", output, "--overwrite") == 0
    assert json.loads(output.read_text())["statistics"]["seen_in_training"] == pytest.approx(2 / 3)


BAD = [
    ("not JSON", "is not JSON"),
    ("", "is not JSON"),
    ("\ufeff" + "[" * 100_000, "is not JSON"),
    ("1" * 5000, "is not JSON"),
    ({"11": "a"}, "holds no results: it must be a list"),
    (coco(), "holds no results: it must be a list"),
    ([], "is empty: no captions to score"),
    ([{"image_id": 11}, 5], r"2 entries (number 1, 2) with no image_id or no caption"),
    ([{"image_id": [11], "caption": "a"}], "1 entry (number 1) with an image_id that is neither"),
    ([{"image_id": True, "caption": "a"}], "neither a whole number nor text, such as True"),
    ([{"image_id": math.nan, "caption": "a"}], "neither a whole number nor text, such as nan"),
    (results(GOOD | {12: 7}), "1 image (12) with a prediction that is no text but 7"),
    (results(GOOD | {12: math.nan}), "1 image (12) with a prediction that is no text but nan"),
    (results(GOOD | {12: None, 13: ["a"]}), "2 images (12, 13) with a prediction that is no text but None"),
    (results(GOOD | {12: " \n"}), "1 image (12) with an empty prediction"),
    (results(GOOD) + results(GOOD), "3 images (11, 12, 13) predicted more than once"),
    (results({11: "a"}), "2 images (12, 13) without a prediction"),
    (results(dict.fromkeys(range(100), "a")), "97 images (0, 1, 2, ...) predicted but without references"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_results_are_one_line_and_leave_nothing(write, annotations, tmp_path, capsys, content, message):
    path = write("bad.json", content)
    output, report = tmp_path / "out.json", tmp_path / "out.html"
    assert run("score", path, annotations, *FAST, "--output", output, "--report", report) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "bad.json" in captured.err
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 500
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "captions_val.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "annotations": []}, "holds no captions"),
        ({"images": [{"id": 1, "file_name": "a"}]}, "has no list 'annotations'"),
        ({"annotations": []}, "it has no list 'images'"),
        (results(GOOD), "annotations come last: RESULTS [RESULTS_B] ANNOTATIONS"),
        (
            coco({11: ["a"]}) | {"annotations": [{"image_id": 11, "caption": 5}]},
            "1 image (11) with a caption that is no",
        ),
        (coco({11: ["a"]}) | {"images": [{"id": 11, "file_name": "a"}] * 2}, "1 image (11) listed more than once"),
        (coco({11: ["a"]}) | {"images": [{"id": [1], "file_name": "a"}]}, "is not COCO captions"),
        ({"images": [{"sentences": [], "split": "test", "imgid": {}, "filename": "a"}]}, "neither a whole number nor"),
        ({"images": [{"sentences": [], "split": ["a"], "imgid": 1, "filename": "a"}]}, "name one of ['a']"),
        ({"images": [{"sentences": 5, "split": "test", "imgid": 1, "filename": "a"}]}, "an entry is of another form"),
    ],
)
def test_bad_annotations_are_one_line(write, capsys, content, message):
    assert run("score", write("ours.json", results(GOOD)), write("bad.json", content), *FAST) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_lines_that_cannot_be_meant(write, annotations, tmp_path, capsys, monkeypatch):
    ours = write("ours.json", results(GOOD))
    taken = write("taken.json", "precious")
    for args, message in (
        ((ours,), "name RESULTS [RESULTS_B] ANNOTATIONS, two files or three, not 1"),
        ((ours, tmp_path / "gone.json"), "no file '"),
        ((tmp_path, annotations), "is a folder; name the file"),
        ((ours, annotations, "--output", "scores.xml"), "must end in .json or .csv"),
        ((ours, annotations, "--report", "page.pdf"), "must end in .html"),
        ((ours, annotations, "--output", taken), "exists; pass --overwrite to replace it"),
        ((ours, annotations, "--output", ours, "--overwrite"), "is a file to read; name another"),
        ((ours, annotations, "--split", "test"), "has no splits; leave --split out"),
        ((ours, annotations, "--report", tmp_path / "a.html", "--images", tmp_path / "gone"), "no image folder at"),
        ((ours, annotations, "--report", tmp_path / "a.html", "--images", tmp_path), "none of the 3 pictures"),
        ((ours, annotations, "--images", tmp_path), "name that too"),
        ((ours, annotations, "--java-timeout", "nan"), "is a number of seconds"),
        ((ours, annotations, "--level", "95"), "level must be between 0 and 1"),
        ((ours, annotations, "--samples", "1"), "samples must be two or more"),
        ((ours, annotations, "--spice", tmp_path), "SPICE needs stanford-corenlp-3.6.0.jar and"),
    ):
        assert run("score", *args, *FAST) == 1, args
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert taken.read_text() == "precious"
    monkeypatch.setattr("captioner.data.captions.MAX_JSON_BYTES", 50)
    assert run("score", ours, annotations, *FAST) == 1
    assert "GiB is refused" in capsys.readouterr().err
    assert run("score", ours, annotations, "--metrics") == 1
    assert "no score to compute; name some of BLEU" in capsys.readouterr().err


def test_what_the_caption_command_writes_is_scored(write, annotations, capsys):
    rows = [{"path": f"val/{n:012d}.jpg", "caption": text, "logprob": -1.0, "error": None} for n, text in GOOD.items()]
    as_csv = "path,caption,logprob,error\n" + "".join(f"{row['path']},{row['caption']},-1.0,\n" for row in rows)
    expected = f"CIDEr  {score(GOOD, CAPTIONS, metrics=('CIDEr',))['CIDEr']:.4f}"
    for path in (write("ours.jsonl", "\n".join(map(json.dumps, rows))), write("ours.csv", as_csv)):
        assert run("score", path, annotations, "--metrics", "CIDEr") == 0
        printed = capsys.readouterr().out
        assert expected in printed
        assert "matched by the names of image files" in printed
    failed = {"path": "13.jpg", "caption": None, "logprob": None, "error": "truncated"}
    path = write("ours.jsonl", "\n".join(map(json.dumps, [*rows[:2], failed])))
    assert run("score", path, annotations, "--metrics", "CIDEr") == 1
    assert "1 image (13) without a prediction" in capsys.readouterr().err
    assert run("score", path, annotations, "--metrics", "CIDEr", "--partial") == 0
    capsys.readouterr()
    assert run("score", write("none.jsonl", json.dumps(failed)), annotations, *FAST) == 1
    assert "only errors, such as: truncated" in capsys.readouterr().err
    annotated = [row | {"error": 0.1} for row in rows]
    assert run("score", write("ours.json", annotated), annotations, "--metrics", "CIDEr") == 0


def test_a_name_of_several_files_is_nobodys():
    references = ReferenceSet({n: ["a"] for n in (1, 2, 3)}, {1: "1.jpg", 2: "y/1.jpg", 3: "z/3.jpg"})
    rows = [{"image_id": name, "caption": "a"} for name in ("1.jpg", "y/1.jpg", "w/1.jpg", "x/3.jpg")]
    assert [row["image_id"] for row in match_ids(rows, references)[0]] == [1, 2, "w/1.jpg", 3]


def test_a_warning_says_whose_it_is(write, annotations, capsys):
    named = write("named.json", [{"image_id": f"{n:012d}.jpg", "caption": text} for n, text in POOR.items()])
    assert run("score", write("ours.json", results(GOOD)), named, annotations, *FAST) == 0
    printed = capsys.readouterr().out
    assert "warning: named.json: ids of the results were matched by" in printed
    assert printed.count("warning: images") == printed.count("images with fewer than")


def test_a_write_that_fails_leaves_the_old_file(write, annotations, tmp_path, monkeypatch, capsys):
    output = write("scores.json", "old")
    monkeypatch.setattr(
        json, "dump", lambda *args, **kwargs: args[1].write("half") and (_ for _ in ()).throw(OSError(28, "full"))
    )
    assert run("score", write("ours.json", results(GOOD)), annotations, *FAST, "--output", output, "--overwrite") == 1
    assert "full" in capsys.readouterr().err
    assert output.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["captions_val.json", "ours.json", "scores.json"]


def test_empty_captions_count_zero_when_allowed(write, annotations, capsys):
    assert run("score", write("ours.json", results(GOOD | {12: ""})), annotations, *FAST, "--allow-empty") == 0
    assert "predictions without words: 1" in capsys.readouterr().out


def test_references_that_are_left_out_are_told(write, capsys):
    content = coco(CAPTIONS | {13: ["a cat", "  "], 14: []})
    content["annotations"].append({"image_id": 77, "id": 1, "caption": "a ghost"})
    found = read_references(write("captions_val.json", content))
    assert list(found.captions) == [11, 12, 13]
    assert found.captions[13] == ["a cat"]
    assert found.split == "val"
    assert any("empty references left out: 1" in text for text in found.warnings)
    assert any("images without references left out: 1 image (14)" in text for text in found.warnings)
    assert any("does not list: left out 1 image (77)" in text for text in found.warnings)


def test_a_references_file_that_holds_the_predictions_is_told(write, annotations, capsys):
    copied = {n: group[0] for n, group in CAPTIONS.items()}
    assert run("score", write("ours.json", results(copied)), annotations, *FAST) == 0
    assert "predictions equal to one of their own references: 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (str, "by number"),
        (lambda n: f"{n:012d}", "by number"),
        (lambda n: f"{n:012d}.jpg", "file"),
        (lambda n: f"x/{n:012d}.jpg", "file"),
    ],
)
def test_ids_as_other_systems_write_them(write, annotations, name, how, capsys):
    path = write("theirs.json", results({name(n): text for n, text in GOOD.items()}))
    rows, note = match_ids(read_results(path), read_references(annotations))
    assert [row["image_id"] for row in rows] == [11, 12, 13]
    assert how in note
    assert run("score", path, annotations, *FAST) == 0
    assert f"warning: theirs.json: {note}" in capsys.readouterr().out


def test_odd_but_sound_results(write, annotations):
    rows = [{"image_id": 11.0, "caption": "a \ud800 dog", "id": 3, "score": 0.5}]
    found = read_results(write("ours.json", "\ufeff" + json.dumps(rows)))
    assert found == [{"image_id": 11, "caption": "a ? dog"}]
    assert match_ids(found, read_references(annotations)) == (found, None)


def test_names_of_files_that_are_called_the_same(tmp_path):
    assert short_names([tmp_path / "a.json", tmp_path / "b.json"]) == ["a.json", "b.json"]
    assert short_names([tmp_path / "x/r.json", tmp_path / "y/r.json"]) == ["x/r.json", "y/r.json"]
    same = short_names([tmp_path / "r.json", tmp_path / "r.json"])
    assert len(set(same)) == 2


def test_needs_neither_torch_nor_pictures(write, annotations):
    code = """
import sys
from captioner.cli import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, "score", str(write("ours.json", results(GOOD))), str(annotations), *FAST]
    done = subprocess.run([*command, "--report", str(annotations.parent / "page.html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "report written" in done.stdout
