"""Tags in pretraining: labels of several classes for an image, from a label file or as teachers predict them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from training_runs import COLOURS, losses

from captioner import recipes
from captioner.data.label_files import read_labels
from captioner.pretraining.config import TeacherConfig
from captioner.pretraining.described import DescribedImages, label_images
from captioner.pretraining.image_store import Source, file_name
from captioner.pretraining.loop import pretrain


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Sixteen plain images and a label file that says which are warm and which are dark."""
    root = tmp_path_factory.mktemp("coloured")
    images = {}
    for number, (name, rgb) in enumerate(list(COLOURS.items()) * 4):
        Image.new("RGB", (32, 32), rgb).save(root / f"{number}.png")
        images[f"{number}.png"] = {"red": [0, 1], "green": [1], "blue": [1], "white": []}[name]
    (root / "labels.json").write_text(json.dumps({"classes": ["warm", "dark"], "images": images}))
    captions = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(4)],
        "annotations": [{"image_id": n, "caption": "a square"} for n in range(4)],
    }
    (root / "captions_val.json").write_text(json.dumps(captions))
    return root


def debug(output, root, *teachers, **kwargs):
    config = replace(recipes.pretrain_debug(), output=output, teachers=teachers, images=(str(root),), views=None)
    return replace(config, tags=root / "labels.json", tag_weight=1.0, **kwargs)


@pytest.mark.parametrize("tags_from", ["labels", "teachers"])
def test_tags_are_learned(coloured, tmp_path, tags_from):
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "teacher.safetensors")
    teacher = TeacherConfig("resnet10t", checkpoint=tmp_path / "teacher.safetensors", num_classes=7)
    options = {"steps": 30, "batch_size": 8, "learning_rate": 3e-3, "tags_from": tags_from}
    run = losses(pretrain(debug(tmp_path / "run", coloured, teacher, **options)), "tags")
    assert np.mean(list(run.values())[-5:]) < 0.7 * np.mean(list(run.values())[:5])


def test_held_out_images_take_no_part(coloured, tmp_path):
    pretrain(debug(tmp_path, coloured, tags_from="labels", steps=1, held_out=(coloured / "captions_val.json",)))
    names = json.loads((tmp_path / "store" / "images.json").read_text())["names"]
    assert sorted(names) == sorted(f"{n}.png" for n in range(4, 16))


def test_captioned_images_in_a_folder_are_taken_once(coloured, tmp_path):
    captions = str(coloured / "captions_val.json")
    run = {"captions": (captions,), "captions_split": "val", "word_weight": 0.0, "tags_from": "labels", "steps": 1}
    pretrain(debug(tmp_path, coloured, **run))
    names = json.loads((tmp_path / "store" / "images.json").read_text())["names"]
    assert names[:4] == [f"{n}.png" for n in range(4)]
    assert sorted(names) == sorted(f"{n}.png" for n in range(16))


def test_held_out_names_change_the_stamp_of_a_source():
    source = Source("a", [("x/1.png", None), ({"path": "y/2.png", "bytes": b""}, None), (b"", None)], "stamp")
    left = source.without(frozenset({"2.png"}))
    assert [file_name(image) for image, _ in left.items] == ["1.png", ""]
    assert left.stamp != source.stamp


def test_targets_are_known_for_described_images_alone():
    described = DescribedImages(["a", "b"], np.array([3, 1]), np.array([[1, 0], [0, 1]], np.float32), 5)
    found = described.expected(torch.tensor([1, 0, 3]), lambda: None)
    assert found[[0, 2]].tolist() == [[0, 1], [1, 0]]
    assert found[1].isnan().all()


def test_labels_find_images_by_name(coloured, caplog):
    labels = read_labels(coloured / "labels.json")
    found = label_images(labels, ["0.png", "", "other.png", "1.png"], np.array([True, True, True, True]))
    assert found.rows.tolist() == [0, 3]
    assert found.targets.tolist() == [[1, 1], [0, 1]]
    assert "14 of 16 labelled images are not among the images" in caplog.text
    with pytest.raises(ValueError, match="two images are named '0.png'"):
        label_images(labels, ["0.png", "0.png"], np.array([True, True]))
    with pytest.raises(ValueError, match="none of the 16 labelled images"):
        label_images(labels, ["0.png"], np.array([False]))


def test_coco_instances_are_labels(write):
    content = {
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "images": [{"id": 1, "file_name": "train2017/a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 9}, {"image_id": 1, "category_id": 9}],
    }
    labels = read_labels(write("instances.json", content))
    assert labels.classes == ["cat", "dog"]
    assert labels.images == {"a.jpg": [1], "b.jpg": []}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], "holds no labels"),
        ({"classes": ["a"], "images": {}}, "labels no image"),
        ({"classes": ["a", "a"], "images": {"x": [0]}}, "'a' is listed twice"),
        ({"classes": ["a"], "images": {"x.jpg": [1]}}, "'x.jpg' has class 1, but there are 1, from 0"),
        ({"classes": ["a"], "images": {"x.jpg": "0"}}, "are not a list of numbers"),
        ({"classes": ["a"], "images": {"p/x.jpg": [0], "q/x.jpg": []}}, "two images are named 'x.jpg'"),
        ({"categories": [], "images": [{"id": 1}], "annotations": []}, "lacks 'file_name'"),
    ],
)
def test_label_files_of_another_form_are_refused(write, content, fault):
    with pytest.raises(ValueError, match=fault):
        read_labels(write("labels.json", content))
