import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from captioner.data import folders
from captioner.data.image_finder import ImageFinder, portable_name
from captioner.data.readers import read_captions
from captioner.errors import SettingError

IMAGEFOLDER = "file_name,text\na.jpg,a dog\n"
KAGGLE = "image,caption\na.jpg,a dog\na.jpg,a red dog\n"


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes files by name, images where the content is None, and returns their folder."""

    def make(**files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                Image.new("RGB", (4, 4)).save(path)
            else:
                path.write_text(content)
        return tmp_path

    return make


def read(*args, **kwargs):
    table = read_captions(*args, **kwargs)
    return {row["image_id"]: row["captions"] for row in table}


def test_an_imagefolder_has_its_splits_in_folders(folder):
    jsonl = json.dumps({"file_name": "a.jpg", "text": "a cat"})
    files = {"train/metadata.csv": IMAGEFOLDER, "validation/metadata.jsonl": jsonl}
    root = folder(**files, **{"train/a.jpg": None, "validation/a.jpg": None})
    assert read(root, "train") == {"train/a.jpg": ["a dog"]}
    assert read(root, "val") == read(root, "validation") == {"validation/a.jpg": ["a cat"]}
    assert read_captions(root, "val")[0]["image"]["path"] == str(root / "validation" / "a.jpg")
    assert read_captions(root)["split"][:] == ["train", "validation"]
    assert len({image["path"] for image in read_captions(root)["image"]}) == 2
    with pytest.raises(SettingError, match="has no split 'test', only train, validation"):
        read_captions(root, "test")
    assert read(root / "validation", "val") == {"a.jpg": ["a cat"]}
    with pytest.raises(SettingError, match="no split 'train'; name one of validation"):
        read_captions(root / "validation", "train")


def test_one_imagefolder_table_has_its_splits_in_names(folder):
    rows = "file_name,text\ntrain/a.jpg,a dog\ntest\\a.jpg,a cat\n"
    root = folder(**{"metadata.csv": rows, "train/a.jpg": None, "test/a.jpg": None})
    assert read(root, "test") == {"test\\a.jpg": ["a cat"]}
    assert read_captions(root, "test")[0]["image"]["path"] == str(root / "test" / "a.jpg")


@pytest.mark.parametrize(
    "name",
    ["captions.txt", "captions.CSV", "Captions.csv", "mine.csv", "mine.TSV", "mine.jsonl", "annotations/captions.csv"],
)
def test_tables_that_a_folder_may_have(folder, name):
    table = KAGGLE.replace(",", "\t") if name.endswith("TSV") else KAGGLE
    if name.endswith("jsonl"):
        table = json.dumps({"image": "a.jpg", "caption": ["a dog", "a red dog"]})
    root = folder(**{name: table, "Images/a.jpg": None})
    assert read(root, "train") == read(root / name) == {"a.jpg": ["a dog", "a red dog"]}
    assert read(root, "all") == read(root, "train")
    with pytest.raises(SettingError, match="no split 'val': its rows have no column 'split', so that all are 'train'"):
        read_captions(root, "val")


def test_a_table_for_each_split(folder):
    root = folder(**{"train.csv": KAGGLE, "captions_val.jsonl": '{"image": "b.jpg", "text": "b"}'})
    folder(**{"images/a.jpg": None, "images/b.jpg": None})
    assert read(root, "train") == {"a.jpg": ["a dog", "a red dog"]}
    assert read(root, "validation") == {"b.jpg": ["b"]}
    assert read_captions(root)["split"][:] == ["train", "val"]


def test_which_of_several_tables_is_asked(folder):
    with pytest.raises(ValueError, match=r"holds a.csv, b.tsv; name one of these files"):
        read_captions(folder(**{"a.csv": KAGGLE, "b.tsv": KAGGLE}), "train")


def test_coco_files_are_read_split_by_split(folder):
    root = folder(**{"annotations/captions_train2017.json": "{}", "annotations/captions_val2017.json": "{}"})
    with pytest.raises(FileNotFoundError, match="hold all splits; name one of captions_train2017.json, captions_val"):
        read_captions(root)


def test_parquet_is_for_streaming(folder):
    with pytest.raises(SettingError, match="holds parquet files") as raised:
        read_captions(folder(**{"data/train-0.parquet": "PAR1"}), "train")
    assert raised.value.settings == ("streaming",)


def test_caption_files_beside_images(folder, caplog):
    texts = {"a.txt": "a dog\n\n a red  dog \n", "b.caption": "['a cat', 'a cow']", "empty.txt": "\n", "lost.txt": "c"}
    root = folder(**texts, **dict.fromkeys(("a.jpg", "b.png", "empty.jpg", "bare.jpg")))
    assert read(root, "train") == {"a.jpg": ["a dog", "a red dog"], "b.png": ["a cat", "a cow"]}
    assert "1 missing images (lost.txt); 2 images without captions (bare.jpg, empty.jpg)" in caplog.text
    with pytest.raises(SettingError, match=r"lost\.txt"):
        read_captions(root, "train", on_bad="refuse")


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are Unicode there")
def test_names_that_are_not_utf_8_are_counted(folder, caplog):
    """No Arrow table holds them; older archives made on Windows unpack to such names."""
    root = folder(**{"a.txt": "a cat", "a.jpg": None, "b.txt": "a dog", "b.jpg": None})
    for ending in ("txt", "jpg"):
        (root / f"b.{ending}").rename(root / os.fsdecode(b"caf\xe9." + ending.encode()))
    assert read(root, "train") == {"a.jpg": ["a cat"]}
    assert r"unusable: 1 images named not in utf 8 (caf\xe9.jpg)" in caplog.text
    (root / "a.jpg").unlink()
    (root / "a.txt").unlink()
    with pytest.raises(ValueError, match="no captioned images; unusable: 1 images named not in utf 8"):
        read_captions(root, "train")


def test_caption_files_in_folders(folder):
    root = folder(**{"train/1_cat/a.txt": "a cat", "train/1_cat/a.jpg": None, "test/a.jpg": None, "test/a.txt": "dog"})
    assert read(root, "train") == {"train/1_cat/a.jpg": ["a cat"]}
    assert read(root, "test") == {"test/a.jpg": ["dog"]}
    assert read(root / "train", "train") == {"1_cat/a.jpg": ["a cat"]}


def test_splits_in_other_words(folder):
    rows = "image,caption,split\na.jpg,a,TRAIN\nb.jpg,b,validation\nc.jpg,c,dev2\n"
    root = folder(**{"captions.csv": rows, "a.jpg": None, "b.jpg": None, "c.jpg": None})
    assert read(root, "train") == {"a.jpg": ["a"]}
    assert read(root, "val") == read(root, "validation") == {"b.jpg": ["b"]}
    assert read(root, "dev2") == {"c.jpg": ["c"]}
    with pytest.raises(SettingError, match="no split 'test'; name one of TRAIN, dev2, validation") as raised:
        read_captions(root, "test")
    assert raised.value.settings[:2] == ("split", "splits")


def test_names_of_images_in_other_forms(folder):
    composed, apart = (unicodedata.normalize(form, "ö/é.jpg") for form in ("NFC", "NFD"))
    assert composed != apart
    rows = f"image,caption\nsub\\a.jpg,one\nsub/a.jpg,two\n./sub//a.jpg,three\n{composed},x\n{apart},y\n"
    root = folder(**{"captions.csv": rows, "sub/a.jpg": None, apart: None, "odd\\name.jpg": None})
    assert read(root) == {"sub\\a.jpg": ["one", "two", "three"], composed: ["x", "y"]}
    assert portable_name("sub\\a.jpg") == "sub/a.jpg"
    find = ImageFinder(root)
    assert find("sub\\a.jpg", "train") == root / "sub" / "a.jpg"
    assert find("odd\\name.jpg", "train") == root / "odd\\name.jpg"  # a name that holds one comes first
    assert find("gone.jpg", "train") is find("", "train") is find(".", "train") is None


@pytest.mark.parametrize(
    "name", ["/x.jpg", "../x.jpg", "a/../../x.jpg", "..", "..\\x.jpg", "\\x.jpg", "C:\\x.jpg", "c:/x.jpg", "/"]
)
def test_no_name_leaves_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="leaves the image folder"):
        ImageFinder(tmp_path)(name, "train")


def test_no_split_leaves_the_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "x2017").mkdir()
    (tmp_path / "x2017" / "a.jpg").touch()
    assert ImageFinder(tmp_path / "data" / "deep", None)("a.jpg", "../../x") is None


def test_a_folder_is_no_image(folder):
    root = folder(**{"captions.csv": "image,caption\nsub,one\na.jpg,two\n", "sub/b.jpg": None, "a.jpg": None})
    assert read(root) == {"a.jpg": ["two"]}
    find = ImageFinder(root)
    assert find("sub", "train") is None
    assert find("sub/b.jpg", "train") == root / "sub" / "b.jpg"


def test_tables_that_are_not_read_are_told(folder, caplog):
    row = '{"image": "b.jpg", "caption": "b"}\n'
    root = folder(**{"captions.csv": "image,caption\na.jpg,a\n", "captions.jsonl": row, "a.jpg": None, "b.jpg": None})
    assert read(root) == {"b.jpg": ["b"]}
    assert "captions.jsonl' is read, '" in caplog.text
    assert "captions.csv' is not; to read another table, give its path" in caplog.text
    assert read(root / "captions.csv") == {"a.jpg": ["a"]}


def test_a_folder_is_listed_once_for_its_tables(folder, monkeypatch):
    listed, list_names = [], os.listdir
    monkeypatch.setattr(folders.os, "listdir", lambda path: listed.append(Path(path)) or list_names(path))
    root = folder(**{"train/Metadata.csv": "file_name,text\na.jpg,a\n", "train/a.jpg": None, "val/a.csv": KAGGLE})
    (root / "annotations").mkdir()
    assert read(root, "train") == {"train/a.jpg": ["a"]}
    for place in (root, root / "annotations", root / "train"):
        assert listed.count(place) == 1
