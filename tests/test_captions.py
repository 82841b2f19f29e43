import json
import os
import tracemalloc

import datasets
import pyarrow
import pytest
from PIL import Image

from captioner.data.readers import read_captions
from captioner.errors import SettingError


@pytest.fixture
def root(tmp_path):
    """COCO 2017 layout of two training images and one to validate on."""
    for split, names in (("train", ("1.jpg", "2.jpg")), ("val", ("3.jpg",))):
        (tmp_path / f"{split}2017").mkdir()
        for name in names:
            Image.new("RGB", (4, 4)).save(tmp_path / f"{split}2017" / name)
        content = {
            "images": [{"id": int(name[0]), "file_name": name} for name in names],
            "annotations": [
                {"image_id": int(name[0]), "id": k, "caption": f" caption {k}\nof {name} "}
                for name in names
                for k in (0, 1)
            ],
        }
        write(tmp_path / "annotations" / f"captions_{split}2017.json", content)
    return tmp_path


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def edit(root, change):
    path = root / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


def test_coco_layout_is_found_from_its_root(root):
    table = read_captions(root, "train")
    assert table.column_names == ["image_id", "image", "captions", "split"]
    assert table["image_id"][:] == [1, 2]
    assert table[0]["captions"] == ["caption 0 of 1.jpg", "caption 1 of 1.jpg"]
    assert table[0]["image"] == {"bytes": None, "path": str(root / "train2017" / "1.jpg")}
    assert set(read_captions(root, "val")["split"]) == {"val"}


def test_coco_file_and_image_folder(root):
    path = (root / "annotations" / "captions_val2017.json").rename(root / "mine.json")
    table = read_captions(path, images=root / "val2017")
    assert table["image_id"][:] == [3]


def karpathy(flavour):
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        image = {"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": [{"raw": f"text {number}"}]}
        if flavour == "coco":
            image |= {"filepath": "val2014", "cocoid": 100 + number}
        images.append(image)
    return {"images": images, "dataset": flavour}


@pytest.mark.parametrize(("flavour", "folder", "first"), [("coco", "val2014", 100), ("flickr8k", "images", 0)])
def test_karpathy_flavours(tmp_path, flavour, folder, first):
    (tmp_path / folder).mkdir()
    for number in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / folder / f"{number}.jpg")
    write(tmp_path / f"dataset_{flavour}.json", karpathy(flavour))
    assert read_captions(tmp_path, "train")["image_id"][:] == [first]
    assert read_captions(tmp_path, "train", restval=True)["image_id"][:] == [first, first + 1]
    assert read_captions(tmp_path / f"dataset_{flavour}.json", "test")["image_id"][:] == [first + 3]
    assert len(read_captions(tmp_path)) == 4


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_an_image_are_joined(tmp_path, kind):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    rows = [{"file": "x.png", "text": "one"}, {"file": "x.png", "text": "two, three"}]
    if kind == "csv":
        write(tmp_path / "captions.csv", 'file,text\nx.png,one\nx.png,"two, three"\n')
    else:
        write(tmp_path / "captions.jsonl", "\n".join(map(json.dumps, rows)))
    table = read_captions(tmp_path, image_column="file", caption_column="text")
    assert table[0]["captions"] == ["one", "two, three"]
    with pytest.raises(SettingError, match="has no column 'image', only file, text") as raised:
        read_captions(tmp_path)
    assert raised.value.settings == ("image_column", "caption_column")
    with pytest.raises(ValueError, match="no split 'val': its rows have no column 'split'"):
        read_captions(tmp_path, "val", image_column="file")


def test_a_file_of_one_split_is_not_taken_for_another(root):
    path = root / "annotations" / "captions_train2017.json"
    assert len(read_captions(path, "train")) == 2
    with pytest.raises(ValueError, match="holds the split 'train' by its name, not 'val'"):
        read_captions(path, "val")


def test_a_split_from_another_kind_of_annotations_is_told(root, caplog):
    Image.new("RGB", (4, 4)).save(root / "3.jpg")
    write(root / "dataset_coco.json", karpathy("flickr8k"))
    read_captions(root, "train")
    assert not caplog.text
    read_captions(root, "test")
    assert "the split 'test' is read from" in caplog.text
    assert "dataset_coco.json' to read all from it" in caplog.text


def test_captions_of_images_that_are_not_listed_are_counted(root, caplog):
    edit(root, lambda content: content["annotations"].append({"image_id": 77, "caption": "a ghost"}))
    assert len(read_captions(root, "train")) == 2
    assert "1 missing images (77)" in caplog.text
    with pytest.raises(ValueError, match=r"missing images \(77\)"):
        read_captions(root, "train", on_bad="refuse")


def test_odd_values_of_rows_are_told(tmp_path, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    good = {"image": "x.png", "caption": "one"}
    write(tmp_path / "captions.jsonl", "\n".join(map(json.dumps, [good, {"image": 5, "caption": "two"}])))
    assert len(read_captions(tmp_path)) == 1
    assert "1 missing images (5)" in caplog.text
    for record in ({"path": "/x.png"}, {"bytes": "/x.png", "path": "../x.png"}):
        write(tmp_path / "captions.jsonl", json.dumps(good | {"image": record}))
        with pytest.raises(ValueError, match=r"x.png' leaves the image folder"):
            read_captions(tmp_path)
    write(tmp_path / "captions.jsonl", json.dumps(good | {"image_id": [1]}))
    with pytest.raises(ValueError, match="line 1: the image id .* is neither a whole number nor text"):
        read_captions(tmp_path)


def test_usual_names_of_columns_need_no_option(tmp_path):
    for name in "xy":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    write(tmp_path / "metadata.csv", "file_name,caption,split,image_id\nx.png,one,train,0\ny.png,two,val,1\n")
    assert read_captions(tmp_path, "train")[0]["captions"] == ["one"]
    assert read_captions(tmp_path)["image_id"][:] == ["0", "1"]
    with pytest.raises(ValueError, match="no split 'test'; name one of train, val"):
        read_captions(tmp_path, "test")


def test_rows_without_a_split_are_counted(tmp_path, caplog):
    for name in "xyz":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    write(tmp_path / "captions.csv", "image,caption,split\nx.png,one,train\ny.png,two,\nz.png,three,\n")
    assert len(read_captions(tmp_path, "train")) == 1
    assert "left out images that name no split: 2" in caplog.text
    with pytest.raises(SettingError, match="name no split: 2") as raised:
        read_captions(tmp_path, "train", on_bad="refuse")
    assert raised.value.settings == ("on_bad",)


def test_images_in_several_splits_are_in_none(tmp_path, caplog):
    for name in "xy":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    rows = ["x.png,one,train", "x.png,two,val", "y.png,three,", "y.png,four,train"]
    write(tmp_path / "captions.csv", "\n".join(["image,caption,split", *rows]))
    assert read_captions(tmp_path, "train")["captions"][:] == [["three", "four"]]
    assert "1 images in several splits (x.png)" in caplog.text


def test_saved_datasets_set_keeps_images_encoded(tmp_path, caplog):
    data = datasets.Dataset.from_dict(
        {"image": [None, Image.new("RGB", (4, 4), "red")], "text": [["no image"], ["a", "b"]]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}),
    )
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "set")
    table = read_captions(tmp_path / "set", "train", image_column="image", caption_column="text")
    assert table[0]["captions"] == ["a", "b"]
    assert isinstance(table[0]["image"]["bytes"], bytes)
    assert "1 missing images (row 0)" in caplog.text
    with pytest.raises(ValueError, match="no split 'val', only train"):
        read_captions(tmp_path / "set", "val")


def test_images_of_a_datasets_set_are_never_all_in_memory(tmp_path):
    size, count = 2**18, 64
    rows = {
        "image": [{"bytes": os.urandom(size), "path": None} for _ in range(count)],
        "captions": [["a"] if n % 2 else [] for n in range(count)],
    }
    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "set")
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    table = read_captions(tmp_path / "set", caption_column="captions")
    assert pyarrow.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1] < size * count / 4
    tracemalloc.stop()
    assert len(table) == count // 2
    assert [table[n]["image"]["bytes"] for n in (0, 9)] == [rows["image"][n]["bytes"] for n in (1, 19)]


def spoil(content):
    content["images"] += [{"id": 1, "file_name": "1.jpg"}, {"id": 8, "file_name": "gone.jpg"}]
    content["images"] += [{"id": 9, "file_name": "2.jpg"}]
    content["annotations"] += [{"image_id": 8, "caption": "text"}, {"image_id": 2, "caption": "  "}]


def test_what_is_wrong_is_counted_once(root, caplog):
    edit(root, spoil)
    assert read_captions(root, "train")["image_id"][:] == [1, 2]
    assert len(caplog.records) == 1
    for part in (
        "1 missing images (gone.jpg)",
        "1 duplicate ids (1)",
        "1 empty captions (2)",
        "1 images without captions (9)",
    ):
        assert part in caplog.text


def test_what_is_wrong_can_be_refused(root):
    edit(root, spoil)
    with pytest.raises(ValueError, match="gone.jpg") as raised:
        read_captions(root, "train", on_bad="refuse")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_image_names_cannot_leave_the_folder(root, name):
    edit(root, lambda content: content["images"].append({"id": 7, "file_name": name}))
    with pytest.raises(ValueError, match="leaves the image folder"):
        read_captions(root, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "neither COCO nor Karpathy"),
        ({"images": [{"id": 1, "file_name": "1.jpg"}]}, "no list 'annotations'"),
        ({"images": [{"id": 1}], "annotations": []}, "lacks 'file_name'"),
        ({"images": [], "annotations": []}, "no captioned images"),
        ({"images": [{"sentences": []}]}, "not Karpathy captions: an entry lacks 'split'"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    path = write(tmp_path / "wrong.json", content)
    with pytest.raises(ValueError, match=message) as raised:
        read_captions(path)
    assert "wrong.json" in str(raised.value)


def test_missing_data_is_named(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="no annotations at"):
        read_captions(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="no image folder at"):
        read_captions(root, "train", images=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"none of the 1 images was found, such as '3.jpg'; give the folder"):
        read_captions(root / "annotations" / "captions_val2017.json", images=root / "annotations")
    with pytest.raises(FileNotFoundError, match="no annotations under"):
        read_captions(root / "val2017", "train")


def test_flickr8k_and_coco_at_their_size(shared, caplog):
    train = read_captions(shared / "flickr8k", "train")
    karpathy = read_captions(shared / "flickr8k" / "dataset_flickr8k.json", "train")
    assert len(train) == len(karpathy) == 6000
    assert sum(map(len, train["captions"])) == 30_000
    assert len(read_captions(shared / "flickr8k" / "dataset_flickr8k.json", "train", restval=True)) == 6091
    with pytest.raises(FileNotFoundError, match="none of the 5000 images"):
        read_captions(shared / "coco" / "captions_val2017.json")


def test_a_column_that_is_asked_for_is_there(root, tmp_path):
    (tmp_path / "mine.csv").write_text("image,caption\na.jpg,a dog\n")
    with pytest.raises(SettingError, match="has no column 'key', only image, caption") as error:
        read_captions(tmp_path / "mine.csv", id_column="key")
    assert error.value.settings == ("id_column",)
    with pytest.raises(SettingError, match="has no column 'raw': it is JSON in the format of COCO or Karpathy"):
        read_captions(root, "val", caption_column="raw")


def test_what_is_wrong_is_one_line_whatever_the_names(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    rows = [{"image": "a.jpg", "caption": "a dog"}, {"image": "gone\n\x1b[31m.jpg", "caption": "a cat"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_captions(tmp_path)) == 1
    assert caplog.messages[-1].endswith("unusable: 1 missing images (gone\\n\\x1b[31m.jpg)")
