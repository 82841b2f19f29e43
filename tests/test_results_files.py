import json
import math

import pytest
from score_data import CAPTIONS, FAST, GOOD, coco, results
from test_cli import run

from captioner.commands.score import short_names
from captioner.metrics import match_ids, read_references, read_results, score

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
    (
        results(GOOD | {12: "['a dog', 5]"}),
        "1 entry (number 2) with a caption that looks like a list and cannot be read",
    ),
    (
        results(GOOD | {12: "['a dog', 'a cat']"}),
        "1 entry (number 2) with several captions, of which one can be scored",
    ),
    ([{"image_id": None, "caption": "a"}], "neither a whole number nor text, such as None"),
    ('{"image_id": 11, "caption": "a"}\n{"image_id": 12, "capt', "line 2, is not JSON"),
    ("image_id,caption\n11,a dog, red\n", "line 2 has 3 fields, the header 2"),
    (
        "image_id,caption\n11,a dog\n,a cat\n",
        "1 entry (line 3) with an image_id that is neither a whole number nor text",
    ),
    (results(GOOD | {12: "nan"}), "1 image (12) with an empty prediction"),
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
    assert "1 image ('000000000013.jpg') without a prediction" in capsys.readouterr().err  # as results name images
    assert run("score", path, annotations, "--metrics", "CIDEr", "--partial") == 0
    capsys.readouterr()
    assert run("score", write("none.jsonl", json.dumps(failed)), annotations, *FAST) == 1
    assert "only errors, such as: truncated" in capsys.readouterr().err
    annotated = [row | {"error": 0.1} for row in rows]
    assert run("score", write("ours.json", annotated), annotations, "--metrics", "CIDEr") == 0


def test_empty_captions_count_zero_when_allowed(write, annotations, capsys):
    assert run("score", write("ours.json", results(GOOD | {12: ""})), annotations, *FAST, "--allow-empty") == 0
    assert "predictions without words: 1" in capsys.readouterr().out


def test_references_that_are_left_out_are_told(write, capsys):
    content = coco(CAPTIONS | {13: ["a cat", "  "], 14: []})
    content["annotations"].append({"image_id": 77, "id": 1, "caption": "a ghost"})
    content["images"][0]["file_name"] = None
    found = read_references(write("captions_val.json", content))
    assert list(found.captions) == [11, 12, 13]
    assert found.captions[13] == ["a cat"]
    assert found.split == "val"
    assert any("empty references left out: 1" in text for text in found.warnings)
    assert any("images without references left out: 1 image (14)" in text for text in found.warnings)
    assert any("does not list: left out 1 image (77)" in text for text in found.warnings)


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", "image_id,caption\n11,{}\n12,{}\n13,{}\n,\n"),
        ("r.CSV", "Image_ID;Caption\n11;{}\n12;{}\n13;{}\n"),
        ("r.tsv", "image_id\tcaption\n11\t{}\n12\t{}\n13\t{}\n"),
        ("r.csv", "image_id,text\n11.0,\"['{}']\"\n12.0,{}\n13.0,{}\n"),
        ("r.json", "image_id|caption\n11|{}\n12|{}\n13|{}\n"),
        (
            "r.json",
            '{{"image_id":11,"caption":"{}"}}\n{{"image_id":12,"caption":"{}"}}\n{{"image_id":13,"caption":"{}"}}',
        ),
    ],
)
def test_tables_of_results_in_any_dialect(tmp_path, annotations, name, text, capsys):
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / name).write_bytes(text.format(*GOOD.values()).encode(encoding))
        assert run("score", tmp_path / name, annotations, "--metrics", "CIDEr", "--samples", 10) == 0
        assert f"CIDEr  {score(GOOD, CAPTIONS, metrics=('CIDEr',))['CIDEr']:.4f}" in capsys.readouterr().out


def test_tables_whose_columns_cannot_be_told(write, annotations, capsys):
    for text, message in (
        (
            "foo,bar\n11,a dog\n",
            "needs a column that names the image, such as image_id or path, and a column caption; it",
        ),
        ("image_id,text,comment\n11,a,b\n", "'text' and 'comment' both fit the column of captions"),
        ("image_id,caption\n", "is empty: no captions to score"),
        ("", "is empty"),
    ):
        assert run("score", write("ours.csv", text), annotations, *FAST) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_annotations_need_no_more_than_scoring_does(write):
    content = coco()
    files_only = {"images": [{"id": image["id"]} for image in content["images"]]}
    as_text = [row | {"image_id": str(row["image_id"])} for row in content["annotations"]]
    for kind in (files_only, {"annotations": as_text}, {"images": None}):
        found = read_references(write("captions_val.json", content | kind))
        assert found.captions == CAPTIONS
        assert found.files == ({} if "images" in kind else {n: f"{n:012d}.jpg" for n in CAPTIONS})


def test_references_are_read_by_the_rules_of_training(write):
    content = coco({11: ["['a dog', 'a red dog']"], 12: ["nan", None, "a cat"], 13: ["  a  cow "]})
    found = read_references(write("captions_val.json", content))
    assert found.captions == {11: ["a dog", "a red dog"], 12: ["a cat"], 13: ["  a  cow "]}
    assert found.warnings == ["empty references left out: 2"]


@pytest.mark.parametrize(
    ("caption", "counted"),
    [
        ("一只狗在草地上跑", 1),
        ("犬が芝生の上を走っている。", 1),
        ("สุนัขวิ่งบนพื้นหญ้า", 1),
        ("一 只 狗 在 草地 上 跑", 0),
        ("コンピューター の 前 に 猫", 0),
        ("สุนัข วิ่ง บน พื้นหญ้า", 0),
        ("개가 잔디밭에서 달린다", 0),
        ("ein Hund läuft über die Wiese", 0),
        ("собака бежит по траве", 0),
    ],
)
def test_captions_that_are_not_split_into_words_are_told(caption, counted):
    warnings = score(GOOD | {11: caption}, CAPTIONS, metrics=("BLEU",)).warnings
    assert any(
        f"captions without spaces between words (as in Chinese, Japanese, Thai): {counted}" in w for w in warnings
    ) == (counted > 0)
    assert score(GOOD, CAPTIONS | {11: [caption]}, metrics=("BLEU",)).warnings[-1].startswith("captions without") == (
        counted > 0
    )
