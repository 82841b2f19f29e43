import math
import os
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from training_runs import launch, losses

from captioner import recipes
from captioner.encoders import create_encoder
from captioner.encoders.from_vit import init_from_vit
from captioner.errors import SettingError
from captioner.pretraining import loop as encoder_training
from captioner.pretraining.config import PretrainConfig, TeacherConfig
from captioner.pretraining.image_store import open_source, stamp_images, store_images
from captioner.pretraining.loop import pretrain
from captioner.pretraining.student import Student
from captioner.pretraining.targets import TargetStore
from captioner.pretraining.teachers import create_teacher


@pytest.fixture
def weights(tmp_path):
    """Weights of a small random teacher."""
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def teach(weights, **kwargs):
    return TeacherConfig("resnet10t", checkpoint=weights, num_classes=7, **kwargs)


def debug(output, *teachers, **kwargs):
    return replace(recipes.pretrain_debug(), output=output, teachers=teachers, **kwargs)


def test_a_lower_learning_rate_holds_on_resuming(captioned, tmp_path):
    config = debug(tmp_path, captions=(str(captioned),), steps=24)
    pretrain(replace(config, max_minutes=0))
    pretrain(replace(config, learning_rate=1e-4))
    rates = losses(tmp_path, "learning_rate")
    assert (rates[1], rates[2]) == (0, 1e-4)  # of the step itself: one step of warmup, then the new peak
    for step in (20, 23):
        expected = 1e-4 * (1 + math.cos(math.pi * (step - 2) / 23)) / 2
        assert rates[step] == pytest.approx(expected, abs=1e-6)


def test_a_batch_without_labels_leaves_the_label_head_in_the_graph():
    encoder = create_encoder("lookupvit_tiny_patch16_224", depth=1)
    student = Student(encoder, PretrainConfig(label_weight=1.0), [], num_classes=3)
    pixels, labels = torch.rand(2, 3, 64, 64), torch.zeros(2, 3)
    losses = student(pixels, (2, 2), [], labels)
    assert losses["labels"] == 0
    losses["loss"].backward()
    assert student.label_head.weight.grad.abs().sum() == 0
    labels[1] = torch.tensor([0.1, 0.8, 0.1])
    summary = student.encode((pixels - student.mean) / student.std, (2, 2))[0].summary
    wanted = torch.nn.functional.cross_entropy(student.label_head(summary[1:]), labels[1:])
    torch.testing.assert_close(student(pixels, (2, 2), [], labels)["labels"], wanted)


@pytest.mark.slow
def test_two_processes_share_stores_and_probe_once(captioned, classes, weights, tmp_path):
    args = ["pretrain.py", "debug", "--captions", captioned, "--images", classes, "--label-weight", "1"]
    args += ["--teachers.0.name", "resnet10t", "--teachers.0.checkpoint", weights, "--teachers.0.num-classes", "7"]
    args += ["--probe-train", classes, "--probe-val", classes, "--batch-size", "2", "--steps", "24", "--views", "2"]
    args += ["--workers", "1", "--mixed-precision", "no"]
    result = launch(*args, "--output", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    alone = [*args, "--batch-size", "4", "--steps", "1", "--output", tmp_path / "one"]
    assert launch(*alone, processes=1).returncode == 0
    first = [losses(tmp_path / name, "logits")[1] for name in ("one", "two")]
    assert first[0] == pytest.approx(first[1], rel=1e-4)  # of the whole batch, before the first update
    records = (tmp_path / "two" / "log.jsonl").read_text()
    assert records.count("probe_top1") == 2  # a record for each grid
    assert 0 in losses(tmp_path / "two", "labels").values()  # some batches have none
    store = tmp_path / "two" / "store" / "teacher_1"
    filled = np.fromfile(store / "filled.bin", np.uint8)
    pooled = np.fromfile(store / "pooled.bin", np.float16).reshape(len(filled), -1)
    assert filled.all()
    assert (pooled != 0).any(1).all()


def test_targets_of_one_layout_are_shared_by_those_who_open_it(tmp_path):
    opened = [TargetStore(tmp_path, "a", 4, 2, {"pooled": (1,)}) for _ in range(2)]
    for number, store in enumerate(opened):
        row = np.array([number])
        store.get(row, row, lambda places: {"pooled": torch.ones(len(places), 1)})
    assert opened[0].filled.sum() == opened[1].filled.sum() == 2
    other = TargetStore(tmp_path, "another teacher", 4, 2, {"grid": (1, 2, 2)})
    assert other.filled.sum() == 0
    assert not (tmp_path / "pooled.bin").exists()
    assert opened[0].files["pooled"][0] == 1  # who has the old file mapped keeps it
    (tmp_path / "targets.json").write_text("{")
    assert TargetStore(tmp_path, "another teacher", 4, 2, {"grid": (1, 2, 2)}).filled.sum() == 0


def test_a_teacher_is_shown_what_it_was_trained_on(weights, tmp_path, caplog):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    assert create_teacher(teach(weights)).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert create_teacher(teach(weights)).std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    given = create_teacher(teach(weights, mean=(0.1, 0.2, 0.3)))
    assert given.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert recipes.IMAGENET_TEACHER.mean == recipes.IMAGENET_TEACHER.std == (0.5, 0.5, 0.5)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **options)).save_pretrained(tmp_path)
    config = TeacherConfig(str(tmp_path), kind="transformers")
    assert create_teacher(config).mean.flatten().tolist() == [0.5] * 3
    assert "the mean and std of the input of" in caplog.text
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3).save_pretrained(tmp_path)
    assert create_teacher(config).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert create_teacher(config).std.flatten().tolist() == pytest.approx([0.4] * 3)


def test_a_teacher_is_known_by_its_weights_and_input(weights, tmp_path):
    stamp = create_teacher(teach(weights)).stamp
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    assert create_teacher(teach(moved, grid_weight=5.0)).stamp == stamp
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), moved)
    others = {create_teacher(config).stamp for config in (teach(moved), teach(weights, mean=(0.5,) * 3))}
    assert len(others | {stamp}) == 3


def test_changed_images_are_decoded_again_and_the_same_ones_have_the_same_stamp(tmp_path):
    folder, image = tmp_path / "in", tmp_path / "in" / "a.png"
    folder.mkdir()

    def store(colour):
        Image.new("RGB", (8, 8), colour).save(image)
        return store_images([open_source(str(folder))], 8, tmp_path / "store")

    red = store("red")
    before = (tmp_path / "store" / "images.u8").stat().st_mtime_ns
    os.utime(image, (0, 0))
    assert store_images([open_source(str(folder))], 8, tmp_path / "store").stamp == red.stamp
    assert (tmp_path / "store" / "images.u8").stat().st_mtime_ns > before
    assert store("blue").stamp != red.stamp  # a file of the same name and size
    assert red.squares[0, :, 0, 0].tolist() == [255, 0, 0]  # who has the old file mapped keeps it
    (tmp_path / "store" / "images.u8").write_bytes(b"")
    assert store_images([open_source(str(folder))], 8, tmp_path / "store").squares[0, 2, 0, 0] == 255


def test_captioned_images_are_known_by_content(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    stamps = {stamp_images([{"path": str(path), "bytes": None}])}
    os.utime(path, (0, 0))  # as a file written at another time
    stamps |= {stamp_images([{"path": str(path), "bytes": None}]), stamp_images([{"path": "gone.png", "bytes": None}])}
    stamps |= {stamp_images([{"path": "a.png", "bytes": content}]) for content in (b"one", b"two")}
    assert len(stamps) == 5
    assert stamp_images([{"path": "b.png", "bytes": b"two"}]) in stamps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_every": 0}, "log_every must be positive, not 0"),
        ({"views": 0}, "views must be positive, not 0"),
        ({"num_words": 0}, "num_words must be positive"),
        ({"early_share": 1.5}, "early_share must be a share between 0 and 1, not 1.5"),
        ({"mixup": 0.2, "label_weight": 1.0, "views": None, "batch_size": 3}, "mix pairs, and batch_size 3 is odd"),
        ({"mixup": 0.2, "label_weight": 1.0}, "make a new view every time, and views are fixed"),
        ({"probe_train": "x"}, "a probe needs images to be fitted on and others"),
        ({"grids": ()}, "grids must be positive"),
        ({"words_from": "teachers", "teachers": ()}, "words cannot come from teachers, as there are none"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(change, message):
    with pytest.raises(SettingError, match=message) as caught:
        replace(recipes.pretrain_debug(), **change)
    assert set(caught.value.settings) <= {field.name for field in fields(PretrainConfig)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "onnx"}, "no output of the teacher 'resnet18' is named"),
        ({"kind": "transformers", "checkpoint": Path("x.safetensors")}, "of kind transformers, not timm"),
        ({"nodes": {"logits": "out"}}, "of kind timm, not onnx"),
        ({"kind": "onnx", "nodes": {"words": "out"}}, "a teacher has no 'words'"),
        ({"map_classes": "5"}, "'5' is not of the form FIRST:END"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_teachers_that_cannot_be_are_refused_at_once(settings, message):
    with pytest.raises(SettingError, match=message):
        TeacherConfig(**settings)


def test_what_cannot_be_learned_or_built_is_said_before_training(captioned, classes, weights, tmp_path):
    (tmp_path / "words").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "words" / "a.png")
    (tmp_path / "words" / "captions.csv").write_text("image,caption,split\na.png,猫,train\n", encoding="utf-8")
    wordless = str(tmp_path / "words")
    probe = {"probe_train": str(classes), "probe_val": str(classes)}
    for change, message in (
        ({"images": (str(classes),)}, "nothing to learn from"),
        ({"captions": (str(captioned),), "word_weight": 0.0}, "nothing to learn from"),
        ({"captions": (wordless,)}, "have no words of a-z"),
        ({"teachers": (TeacherConfig("resnet18.nobodys"),)}, "no weights of the teacher 'resnet18.nobodys'"),
        ({"teachers": (teach(weights, options={"foo": 1}),)}, "the teacher 'resnet10t' does not take its options"),
        ({"encoder_options": {"foo": 1}}, "does not take its options, foo=1: .*'foo'"),
        (
            {"encoder": "resnet10t", "encoder_options": {}, **probe},
            "grid 3x3 is larger than the feature map 2x2",
        ),
        ({"encoder": "vit_tiny_patch16_224", "encoder_options": {"depth": 1}, "image_size": 72}, "views of 72 px"),
        ({**probe, "probe_val": str(captioned / "images")}, "the probe's images have no classes"),
        ({"train_stem": 0.5}, "the stem of 'lookupvit_tiny_patch16_224' is no timm network"),
    ):
        change = {"captions": () if "images" in change else (str(captioned),), **change}
        with pytest.raises(ValueError, match=message):
            pretrain(debug(tmp_path / "run", *change.pop("teachers", ()), **change))
    with pytest.raises(ValueError, match="no weights of the ViT 'vit_tiny_patch16_224.nobodys'"):
        init_from_vit(create_encoder("lookupvit_tiny_patch16_224", depth=1), "vit_tiny_patch16_224.nobodys")


def test_an_encoder_without_a_class_token_is_probed(classes, tmp_path):
    config = debug(tmp_path, images=(str(classes),), label_weight=1.0, encoder="resnet10t", encoder_options={})
    pretrain(replace(config, grids=(2,), steps=1, probe_train=str(classes), probe_val=str(classes)))
    assert list(losses(tmp_path, "probe_top1")) == [1]


def test_slow_steps_look_for_signals_each_time(captioned, tmp_path, monkeypatch):
    looks = []
    agree = encoder_training.Interruption.agree
    monkeypatch.setattr(encoder_training.Interruption, "agree", lambda *a: looks.append(1) or agree(*a))
    config = debug(tmp_path, captions=(str(captioned),), steps=12)
    for slow, count in ((0.0, 12), (float("inf"), 2)):
        looks.clear()
        monkeypatch.setattr(encoder_training, "SLOW", slow)
        pretrain(replace(config, output=tmp_path / str(slow)))
        assert len(looks) == count


def test_processes_wait_two_hours_for_one_another(captioned, tmp_path, monkeypatch):
    started = []
    start = encoder_training.start_processes
    monkeypatch.setattr(encoder_training, "start_processes", lambda *a, **k: started.append(1) or start(*a, **k))
    pretrain(debug(tmp_path, captions=(str(captioned),), steps=0))
    assert started


def test_a_signal_ends_a_slow_run_at_its_next_step(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_training, "SLOW", 0.0)
    batch, seen = encoder_training.Batches.batch, []

    def killed_in_third(self, position):
        seen.append(position)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, position)

    monkeypatch.setattr(encoder_training.Batches, "batch", killed_in_third)
    config = debug(tmp_path, captions=(str(captioned),), steps=8)
    with pytest.raises(SystemExit, match="143"):
        pretrain(config)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    pretrain(config)
    assert list(losses(tmp_path)) == list(range(1, 9))
