import io
import json

import datasets
import pytest
from PIL import Image

from captioner.data.readers import read_captions
from captioner.errors import SettingError


@pytest.fixture
def root(tmp_path):
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.jpg")
    return tmp_path


def read(root, rows, **kwargs):
    """Read rows of (image, caption, id) from JSON Lines."""
    keys = ("image", "caption", "image_id", "split")
    text = "\n".join(json.dumps(dict(zip(keys, row, strict=False))) for row in rows)
    (root / "captions.jsonl").write_text(text)
    return {row["image_id"]: row["captions"] for row in read_captions(root, **kwargs)}


@pytest.mark.parametrize("ids", [(7, 7), (7, "7"), (7, 7.0), ("x", "x")])
def test_images_with_one_id_are_never_merged(root, caplog, ids):
    rows = [("a.jpg", "a dog", ids[0]), ("c.jpg", "a cow", 8), ("b.jpg", "a car", ids[1])]
    assert list(read(root, rows).values()) == [["a cow"]]
    assert f"2 duplicate ids ({ids[0]}: a.jpg, {ids[0] if ids[1] == 7.0 else ids[1]}: b.jpg)" in caplog.text
    with pytest.raises(SettingError, match="2 duplicate ids") as raised:
        read(root, rows, on_bad="refuse")
    assert raised.value.settings == ("on_bad",)
    with pytest.raises(ValueError, match="no captioned images; unusable: 2 duplicate ids"):
        read(root, rows[::2])


def test_rows_of_one_image_are_joined_whatever_the_type_of_its_id(root):
    rows = [("a.jpg", "one", 7), ("./a.jpg", "two", "7"), ("a.jpg", "three", 7.0)]
    assert read(root, rows, on_bad="refuse") == {7: ["one", "two", "three"]}


def test_ids_may_begin_anew_in_each_split(root):
    rows = [("a.jpg", "one", 1, "train"), ("b.jpg", "two", 1, "val")]
    assert read(root, rows, split="train", on_bad="refuse") == {1: ["one"]}
    assert read(root, rows, split="val", on_bad="refuse") == {1: ["two"]}


def test_rows_without_an_id_take_nobody_else_s(root, caplog):
    rows = [("a.jpg", "one", 1), (None, "two", 1), (None, "three", None), ("b.jpg", "four", None)]
    assert read(root, rows) == {"1": ["one"], "b.jpg": ["four"]}
    assert "2 missing images (1, line 3)" in caplog.text


def coco(images, annotations):
    return {
        "images": [{"id": i, "file_name": name} for i, name in images],
        "annotations": [{"image_id": i, "caption": text} for i, text in annotations],
    }


def test_ids_of_coco_images_and_annotations_are_compared_as_text(root, caplog):
    content = coco(
        [(1, "a.jpg"), ("2", "b.jpg")], [("1", "one"), (1.0, "two"), (2, "three"), (None, "four"), ([], "x")]
    )
    (root / "captions_train.json").write_text(json.dumps(content))
    assert read_captions(root, "train")["captions"][:] == [["one", "two"], ["three"]]
    assert "missing images (None" in caplog.text


def test_coco_images_with_one_id_are_never_merged(root, caplog):
    content = coco([(1, "a.jpg"), (1, "b.jpg"), (3, "c.jpg"), (3, "./c.jpg")], [(1, "one"), (3, "['two', 'three']")])
    (root / "captions_train.json").write_text(json.dumps(content))
    assert read_captions(root, "train")["captions"][:] == [["two", "three"]]
    assert "3 duplicate ids (1: a.jpg, 1: b.jpg, 3)" in caplog.text


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_rows_of_a_datasets_set_are_joined_if_they_hold_one_image(tmp_path, caplog):
    rows = {
        "image": [
            png("red"),
            png("blue"),
            png("red"),
            png("lime"),
            png("navy"),
            None,
            png("pink"),
        ],
        "caption": ["one", "two", "three", "four", "five", "six", "seven"],
        "image_id": [1, 2, 1, 3, 3, 2, None],
    }
    types = {"image": datasets.Image(), "caption": datasets.Value("string"), "image_id": datasets.Value("int64")}
    features = datasets.Features(types)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "set")
    table = read_captions(tmp_path / "set", "train")
    assert table["image_id"][:] == ["1", "2", "row 6"]
    assert table["captions"][:] == [["one", "three"], ["two"], ["seven"]]
    assert table[0]["image"]["bytes"] == rows["image"][0]["bytes"]
    assert "1 missing images (2); 2 duplicate ids (3: 3, 3: 4)" in caplog.text
