import csv
import json
import os
import subprocess
import sys

import pytest
from score_data import CAPTIONS, FAST, GOOD, POOR, coco, karpathy, results
from test_cli import run

from captioner.metrics import score


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "annotations": []}, "holds no captions"),
        ({"images": [{"id": 1, "file_name": "a"}]}, "has no list 'annotations'"),
        ({"annotations": []}, "it has no list 'images'"),
        (results(GOOD), "the last file must hold the annotations"),
        (
            coco({11: ["a"]}) | {"annotations": [{"image_id": 11, "caption": 5}]},
            "1 image (11) with a caption that is no",
        ),
        (coco({11: ["a"]}) | {"images": [{"id": 11, "file_name": "a"}] * 2}, "1 image (11) listed more than once"),
        (coco({11: ["a"]}) | {"images": [{"id": [1], "file_name": "a"}]}, "neither a whole number nor text: [1]"),
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
        ((ours, annotations, "--output", taken), "exists; pass --overwrite"),
        ((ours, annotations, "--output", ours, "--overwrite"), "is a file to read; name another"),
        ((ours, annotations, "--split", "test"), "so 'test' cannot be selected; only files of Karpathy's splits have"),
        ((ours, annotations, "--samples", 1), "samples must be two or more, not 1; change --samples"),
        ((ours, annotations, "--level", 2), "level must be between 0 and 1, such as 0.95, not 2.0; change --level"),
        ((ours, annotations, "--report", tmp_path / "a.html", "--images", tmp_path / "gone"), "no image folder at"),
        ((ours, annotations, "--report", tmp_path / "a.html", "--images", tmp_path), "none of the 3 images"),
        ((ours, annotations, "--images", tmp_path), "name that too"),
        ((ours, annotations, "--java-timeout", "nan"), "must be a positive number of seconds"),
        ((ours, annotations, "--level", "95"), "level must be between 0 and 1"),
        ((ours, annotations, "--samples", "1"), "samples must be two or more"),
        ((ours, annotations, "--spice", tmp_path), "SPICE needs stanford-corenlp-3.6.0.jar and"),
    ):
        assert run("score", *args, *FAST) == 1, args
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert taken.read_text() == "precious"
    monkeypatch.setattr("captioner.text_files.MAX_TEXT_BYTES", 50)
    assert run("score", ours, annotations, *FAST) == 1
    assert "GiB is refused" in capsys.readouterr().err
    assert run("score", ours, annotations, "--metrics") == 1
    assert "no score to compute; name some of BLEU" in capsys.readouterr().err


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


def test_a_references_file_that_holds_the_predictions_is_told(write, annotations, capsys):
    copied = {n: group[0] for n, group in CAPTIONS.items()}
    assert run("score", write("ours.json", results(copied)), annotations, *FAST) == 0
    assert "predictions equal to one of their own references: 3" in capsys.readouterr().out


def test_needs_neither_torch_nor_images(write, annotations):
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
