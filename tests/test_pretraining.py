import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from training_runs import COLOURS, full_disk, losses

from captioner import recipes
from captioner.encoders import create_encoder
from captioner.encoders.from_vit import init_from_vit
from captioner.pretraining import loop as encoder_training
from captioner.pretraining.config import TeacherConfig
from captioner.pretraining.image_store import open_source, store_images
from captioner.pretraining.loop import pretrain
from captioner.pretraining.targets import TargetStore
from captioner.pretraining.teachers import create_teacher
from captioner.pretraining.views import ViewOrder, cut_views, draw_views, whole_views


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Plain images with captions in a JSON lines file."""
    root = tmp_path_factory.mktemp("captioned")
    lines = []
    for number, (name, rgb) in enumerate(list(COLOURS.items()) * 2):
        Image.new("RGB", (32, 32), rgb).save(root / f"{number}.png")
        lines.append({"image": f"{number}.png", "captions": [f"a {name} square", f"all {name}"], "split": "train"})
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture
def teacher(tmp_path) -> TeacherConfig:
    """A small random teacher, saved as safetensors."""
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "teacher.safetensors")
    return TeacherConfig("resnet10t", checkpoint=tmp_path / "teacher.safetensors", num_classes=7)


def debug(output, *teachers, **kwargs):
    return replace(recipes.pretrain_debug(), output=output, teachers=teachers, **kwargs)


@pytest.mark.parametrize(("words_from", "stem"), [("captions", "patch"), ("teachers", "conv")])
def test_distillation_learns_and_exports(captioned, classes, teacher, words_from, stem, tmp_path):
    config = debug(tmp_path / "run", teacher, captions=(str(captioned),), num_words=8, images=(str(classes),), steps=30)
    config = replace(config, words_from=words_from, encoder_options={"depth": 2, "stem": stem}, learning_rate=3e-3)
    folder = pretrain(config)
    grid, words = (list(losses(folder, key).values()) for key in ("grid", "words"))
    assert sum(grid[-5:]) < 0.8 * sum(grid[:5])
    assert sum(words[-5:]) < sum(words[:5])
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    encoder = create_encoder(f"local-dir:{folder}")
    fresh = create_encoder("lookupvit_tiny_patch16_224", depth=2)
    assert encoder.forward_tokens(torch.randn(1, 3, 64, 64), (3, 3)).shape == (1, 10, 192)
    assert not torch.equal(encoder.pos_lookup, fresh.pos_lookup)


def test_labels_are_learned_and_probed(classes, tmp_path):
    config = debug(tmp_path, images=(str(classes),), label_weight=1.0, label_smoothing=0.0, steps=40, batch_size=8)
    config = replace(config, learning_rate=2e-3, probe_train=str(classes), probe_val=str(classes), ema=0.5)
    folder = pretrain(config)
    labels = list(losses(folder, "labels").values())
    assert sum(labels[-5:]) < 0.5 * sum(labels[:5])
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    probes = {record["grid"]: record["probe_top1"] for record in records if "probe_top1" in record}
    assert set(probes) == {2, 3}
    assert min(probes.values()) > 0.9
    assert min(record["label_top1"] for record in records if "label_top1" in record) > 0.5  # of four classes


def test_mixed_labels_leave_unlabelled_images_out(captioned, classes, tmp_path):
    config = debug(tmp_path, images=(str(classes),), captions=(str(captioned),), label_weight=1.0)
    assert all(
        np.isfinite(list(losses(pretrain(replace(config, views=None, mixup=0.2, cutmix=1.0)), "labels").values()))
    )
    with pytest.raises(ValueError, match="and views are fixed"):
        replace(config, mixup=0.2)


def test_it_resumes_exactly(captioned, teacher, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(encoder_training, "SLOW", float("inf"))  # the clock is looked at every tenth step
    config = debug(tmp_path / "whole", teacher, captions=(str(captioned),), steps=22, save_minutes=0, ema=0.9)
    options = {"depth": 2, "drop_path_rate": 0.3, "stem": "conv"}
    config = replace(config, early_share=0.5, early_size=48, encoder_options=options, words_from="teachers")
    pretrain(config)
    broken = replace(config, output=tmp_path / "broken")
    pretrain(replace(broken, max_minutes=0))
    assert list(losses(broken.output)) == [1]
    assert not (broken.output / "model.safetensors").exists()
    pretrain(broken)
    newest = broken.output / "checkpoints" / "step_00000022" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    (broken.output / "model.safetensors").unlink()
    pretrain(broken)  # from step 12: the newest checkpoint is damaged
    assert "model.safetensors has" in caplog.text
    assert losses(broken.output) == losses(config.output)
    exported = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert exported[0] == exported[1]
    with pytest.raises(ValueError, match="was saved with seed 0, this run has 1"):
        pretrain(replace(broken, seed=1))
    with pytest.raises(ValueError, match="was saved with image_size 64, this run has 48"):
        pretrain(replace(broken, image_size=48, early_size=32))
    with pytest.raises(ValueError, match="was saved with weights of teachers.0 {.*'grid_weight': 2.0"):
        pretrain(replace(broken, teachers=(replace(teacher, grid_weight=3.0),)))
    with pytest.raises(ValueError, match="was saved with digest of teachers.0 'resnet10t .*', this run has 'resnet10t"):
        pretrain(replace(broken, teachers=(replace(teacher, mean=(0.5,) * 3),)))
    with pytest.raises(ValueError, match="was saved with digest of the images"):
        pretrain(replace(broken, store_size=48))


def test_an_exported_encoder_is_gone_on_with(captioned, tmp_path):
    options = {"depth": 2, "pretrained": False}  # how weights are found is no part of what is exported
    config = debug(tmp_path / "first", captions=(str(captioned),), steps=1, encoder_options=options)
    folder = pretrain(config)
    with full_disk(), pytest.raises(OSError, match=r"cannot write the encoder '.*first' .*; free some disk space"):
        encoder_training.export_encoder(create_encoder("lookupvit_tiny_patch16_224"), {}, 224, folder)
    again = replace(config, output=tmp_path / "second", encoder=f"local-dir:{folder}", encoder_options={}, steps=0)
    first, second = (create_encoder(f"local-dir:{f}").state_dict() for f in (folder, pretrain(again)))
    assert all(torch.equal(first[key], second[key]) for key in first | second)


def test_a_grid_larger_than_the_lookup_grid_is_refused(captioned, tmp_path):
    with pytest.raises(ValueError, match="grid 5x5 is larger than the lookup grid 4x4 of 64 px views"):
        pretrain(debug(tmp_path, captions=(str(captioned),), grids=(2, 5)))


def test_a_stock_vit_goes_through_the_same_recipe(captioned, teacher, tmp_path):
    options = {"img_size": 64, "depth": 1}
    config = debug(
        tmp_path, teacher, captions=(str(captioned),), encoder="vit_tiny_patch16_224", encoder_options=options
    )
    encoder = create_encoder(f"local-dir:{pretrain(config)}")
    assert encoder.forward_tokens(torch.randn(1, 3, 64, 64)).shape == (1, 17, 192)


def test_a_teacher_that_does_not_fit_is_named(captioned, teacher, tmp_path):
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"not weights")
    for change, message in (
        ({"num_classes": 9}, "does not fit resnet10t with 9 classes"),
        ({"name": "resnet18"}, "does not fit|lacks weights"),
        ({"checkpoint": tmp_path / "gone.safetensors"}, "no teacher weights at"),
        ({"checkpoint": junk}, "not a safetensors file"),
        ({"name": "resnet_of_nobody"}, "no teacher named"),
        ({"kind": "transformers", "name": str(tmp_path / "gone"), "checkpoint": None}, "no teacher at"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            pretrain(debug(tmp_path / "run", replace(teacher, **change), captions=(str(captioned),)))


def test_a_transformers_teacher_gives_pooled_feature_and_map(tmp_path):
    from transformers import ViTConfig, ViTModel

    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **options)).save_pretrained(tmp_path)
    targets = create_teacher(TeacherConfig(str(tmp_path), kind="transformers"))(torch.rand(2, 3, 32, 32))
    assert {name: tuple(value.shape) for name, value in targets.items()} == {"pooled": (2, 16), "grid": (2, 16, 4, 4)}


def test_an_onnx_detector_teaches_class_maps(captioned, shared, tmp_path):
    pytest.importorskip("onnx2torch")
    path = str(shared / "teacher" / "yolox_nano_coco80_maps.onnx")
    detector = replace(recipes.COCO_TEACHER, name=path, image_size=64)
    targets = create_teacher(detector)(torch.rand(2, 3, 64, 64))
    assert targets["maps"].shape == (2, 80, 10, 10)
    assert targets["maps"].min() >= 0
    assert targets["maps"].max() <= 1
    maps = losses(pretrain(debug(tmp_path, detector, captions=(str(captioned),), steps=12)), "maps")
    assert maps[12] < maps[1]
    with pytest.raises(ValueError, match="has no output 'boxes', only map_stride8"):
        create_teacher(replace(detector, maps=("boxes",)))


def test_a_file_that_is_no_onnx_is_named(tmp_path):
    pytest.importorskip("onnx2torch")
    (tmp_path / "x.onnx").write_bytes(b"\xff\xff nothing")
    with pytest.raises(ValueError, match="is not an ONNX file"):
        create_teacher(TeacherConfig(str(tmp_path / "x.onnx"), kind="onnx", maps=("a",)))
    with pytest.raises(ValueError, match="no output of the teacher"):
        TeacherConfig("x.onnx", kind="onnx")


def test_shards_are_streamed_with_their_classes(classes, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for number, path in enumerate(sorted(classes.rglob("*.png"))):
            for suffix, data in (("png", path.read_bytes()), ("cls", str(number // 4).encode())):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    store = store_images([open_source(str(tmp_path / "*.tar"))], 16, tmp_path / "store")
    assert store.labels.tolist() == [n // 4 for n in range(16)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shard-0.tar").rename(tmp_path / "pipe:touch owned .tar")  # no address, and no pattern
    assert len(store_images([open_source("*.tar")], 16, tmp_path / "store")) == 16
    assert not (tmp_path / "owned").exists()
    (tmp_path / "shard-1.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(ValueError, match=r"shard '.*shard-1.tar' is not readable"):
        store_images([open_source(str(tmp_path / "*.tar"))], 16, tmp_path / "store")


def test_broken_images_are_left_out_and_stores_reused(classes, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    for path in classes.rglob("red/*.png"):
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    store = store_images([open_source(str(tmp_path / "in"))], 16, tmp_path / "store")
    assert store.usable.tolist() == [True] * 4 + [False]
    assert "1 of 5 images could not be opened" in caplog.text
    assert store.squares[0, :, 8, 8].tolist() == list(COLOURS["red"])
    before = (tmp_path / "store" / "images.u8").stat().st_mtime_ns
    store_images([open_source(str(tmp_path / "in"))], 16, tmp_path / "store")
    assert (tmp_path / "store" / "images.u8").stat().st_mtime_ns == before
    (tmp_path / "in" / "broken.jpg").unlink()
    assert len(store_images([open_source(str(tmp_path / "in"))], 16, tmp_path / "store")) == 4


def test_views_are_seeded_and_the_whole_view_is_the_image():
    squares = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    whole = cut_views(squares, whole_views(2), 8)
    torch.testing.assert_close(whole, squares / 255, atol=1e-5, rtol=0)
    rows, versions = np.arange(2000), np.zeros(2000, int)
    views = draw_views(0, rows, versions, 0.25)
    assert torch.equal(views, draw_views(0, rows, versions, 0.25))
    assert not torch.equal(views, draw_views(0, rows, versions + 1, 0.25))
    assert not torch.equal(views, draw_views(1, rows, versions, 0.25))
    x, y, width, height = views[:, :4].T
    assert ((x.abs() + width <= 1 + 1e-6) & (y.abs() + height <= 1 + 1e-6)).all()
    assert 0.55 < (width * height).mean() < 0.65
    assert 0.45 < (views[:, 4] > 0).float().mean() < 0.55
    flipped = whole_views(2)
    flipped[:, 4] = -1
    torch.testing.assert_close(cut_views(squares, flipped, 8), squares.flip(-1) / 255, atol=1e-5, rtol=0)


def test_colours_change_in_brightness_then_contrast_then_saturation():
    squares = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    views = whole_views(3)
    views[:, 5:] = torch.tensor([[1.2, 1.0, 1.0], [0.9, 1.3, 0.6], [0.7, 0.8, 1.3]])
    brightness, contrast, saturation = views[:, 5:].view(3, 3, 1, 1, 1).unbind(1)
    wanted = squares / 255 * brightness
    mean = wanted.mean((1, 2, 3), keepdim=True)
    wanted = mean + (wanted - mean) * contrast
    grey = wanted.mean(1, keepdim=True)
    wanted = (grey + (wanted - grey) * saturation).clamp(0, 1)
    torch.testing.assert_close(cut_views(squares, views, 8), wanted, atol=1e-5, rtol=0)


def test_an_order_visits_all_and_takes_versions_in_turn():
    order = ViewOrder([np.arange(3), np.arange(3, 5)], [2, 1], seed=0, versions=3)
    seen = [order.views(start, 4) for start in range(0, 48, 4)]
    rows, versions = (np.concatenate(part) for part in zip(*seen, strict=True))
    assert sorted(rows[:8].tolist()) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert sorted(versions[rows == 0][:6].tolist()) == [0, 0, 1, 1, 2, 2]
    assert sorted(versions[rows == 4][:3].tolist()) == [0, 1, 2]
    again = order.views(7, 6)
    assert (again[0] == rows[7:13]).all()
    assert (again[1] == versions[7:13]).all()


def test_targets_are_asked_for_once_and_refused_when_stale(tmp_path):
    asked = []

    def compute(places):
        asked.append(places.tolist())
        return {"pooled": places[:, None].float()}

    rows = np.array([0, 1, 2])
    shapes = {"pooled": (1,)}
    first = TargetStore(tmp_path, "a", 4, 2, shapes)
    assert first.get(rows, rows * 0, compute)["pooled"].flatten().tolist() == [0, 1, 2]
    reopened = TargetStore(tmp_path, "a", 4, 2, shapes)
    assert reopened.get(np.array([2, 3]), np.array([0, 0]), compute)["pooled"].flatten().tolist() == [2, 1]
    assert asked == [[0, 1, 2], [1]]
    TargetStore(tmp_path, "another teacher", 4, 2, shapes).get(rows, rows * 0, compute)
    assert asked[2] == [0, 1, 2]


@pytest.mark.parametrize("depth", [2, 3])
def test_a_block_from_a_vit_refines_as_the_vit_does(depth):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0, img_size=64).eval()
    encoder = create_encoder("lookupvit_tiny_patch16_224", depth=depth, img_size=64).eval()
    init_from_vit(encoder, vit)
    tokens = torch.randn(2, 17, 192)
    for i, j in enumerate([0, 2] if depth == 2 else [0, 1, 2]):
        torch.testing.assert_close(encoder.blocks[i].refine(tokens), vit.blocks[j](tokens))
    compressed, lookup = encoder.embed(torch.randn(2, 3, 64, 64), (3, 3))
    after = encoder.blocks[0]((compressed, lookup))[1]
    torch.testing.assert_close(after, lookup)
    # gathering begins as the ViT's attention over the patches
    block, attention = encoder.blocks[0], vit.blocks[0].attn
    read, _ = block.cross.gather(tokens, tokens)
    torch.testing.assert_close(read, attention(tokens), atol=1e-5, rtol=1e-4)


def test_a_vit_that_does_not_fit_is_refused():
    encoder = create_encoder("lookupvit_tiny_patch16_224", depth=2)
    with pytest.raises(ValueError, match="the ViT's width is 384, the encoder's 192"):
        init_from_vit(encoder, timm.create_model("vit_small_patch16_224", depth=2))
    with pytest.raises(ValueError, match="1 blocks, fewer than the encoder's 2"):
        init_from_vit(encoder, timm.create_model("vit_tiny_patch16_224", depth=1))
    with pytest.raises(ValueError, match="only one of them has 'ls1.gamma'"):
        init_from_vit(encoder, timm.create_model("vit_tiny_patch16_224", depth=2, init_values=0.1))
    with pytest.raises(ValueError, match="is not a ViT"):
        init_from_vit(encoder, timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="a ResNet cannot start from the weights of another network"):
        create_encoder("resnet10t").init_from("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="conv stem has no place for a ViT's patch embedding: give stem=patch"):
        init_from_vit(create_encoder("lookupvit_tiny_patch16_224", depth=1, stem="conv"), "vit_tiny_patch16_224")
