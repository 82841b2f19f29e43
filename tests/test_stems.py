from dataclasses import replace
from unittest.mock import patch

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_runs import launch

from captioner import recipes
from captioner.encoders import create_encoder, rebuild_encoder, stems
from captioner.encoders.stems import NetworkStem, init_stem
from captioner.modeling import CaptionerConfig, CaptionerModel
from captioner.pretraining.config import TeacherConfig
from captioner.pretraining.loop import pretrain
from captioner.pretraining.student import Student

SMALL = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "grid": (2, 2)}
timm_create = timm.create_model
OWN = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("lookupvit_tiny_patch16_224", **{**SMALL, **kwargs}).double().eval()


@pytest.fixture
def network():
    """A small network with running statistics of its own."""
    torch.manual_seed(1)
    network = timm.create_model("resnet10t", num_classes=7)
    for _ in range(3):
        network(torch.rand(4, 3, 64, 64))
    return network.eval()


@pytest.fixture
def teacher(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    return TeacherConfig("resnet10t", checkpoint=tmp_path / "teacher.safetensors", num_classes=7)


def debug(output, teacher, captioned, **kwargs):
    options = {"depth": 1, "stem": "resnet10t", "img_size": 48}
    config = replace(recipes.pretrain_debug(), output=output, teachers=(teacher,), captions=(str(captioned),))
    return replace(config, **{"encoder_options": options, **kwargs})


def test_a_conv_stem_sees_over_the_edges_of_a_patch():
    for stem, reach in (("patch", 1), ("conv", 4)):  # a strided convolution of width 3 looks up and left
        model = make(stem=stem)
        image = torch.zeros(1, 3, 96, 64, dtype=torch.float64)
        changed = image.clone()
        changed[..., 16:32, 16:32] = 1.0  # one patch
        moved = (model.patch_embed(changed) - model.patch_embed(image)).abs().amax(-1) > 1e-9
        assert moved.shape == (1, 6, 4)
        assert moved.sum() == reach
        assert model.forward_tokens(image, (3, 2)).shape == (1, 7, 24)
        assert model(image).shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "size", "share"),
    [
        ({"stem": "patch"}, 224, 0.340),
        ({"stem": "conv"}, 224, 0.375),
        ({"stem": "mobilenetv2_100"}, 160, 0.399),
    ],
)
def test_every_stem_leaves_the_encoder_well_below_the_vit(options, size, share):
    flops = []
    for name, side, kwargs in (("lookupvit_tiny_patch16_224", size, options), ("vit_tiny_patch16_224", 224, {})):
        model = timm.create_model(name, depth=6, num_classes=0, **kwargs).eval()
        # torch counts no FLOPs of the fused attention of CPUs
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.forward_features(torch.zeros(1, 3, side, side))
        flops.append(counter.get_total_flops())
    assert flops[0] / flops[1] == pytest.approx(share, abs=0.002)


def test_a_conv_stem_takes_the_sizes_that_a_patch_takes():
    patch, conv = (make(stem=stem, img_size=100) for stem in ("patch", "conv"))
    assert patch.patch_embed.grid_size == conv.patch_embed.grid_size == (6, 6)
    assert patch.patch_embed.feat_ratio() == conv.patch_embed.feat_ratio() == 16
    assert conv.default_cfg["first_conv"] == "patch_embed.backbone.0.conv"
    conv.get_submodule(conv.default_cfg["first_conv"])


def test_a_conv_stem_needs_a_patch_of_its_strides():
    assert make(stem="conv", patch_size=8).embed(torch.zeros(1, 3, 64, 64).double())[1].shape == (1, 64, 24)
    with pytest.raises(ValueError, match="do not make a patch of 14 px"):
        make(stem="conv", patch_size=14, img_size=56)
    with pytest.raises(ValueError, match="stem is 'deep'; LookupViT knows 'patch', 'conv' and the networks of timm"):
        make(stem="deep")


def test_a_network_stem_computes_what_the_network_does(network):
    stem = NetworkStem("resnet10t", 64, 16, 3, 24, None).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    init_stem(stem, network, OWN, mean, std)
    pixels = torch.rand(2, 3, 64, 96)
    theirs = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        wanted = network.forward_intermediates(theirs, intermediates_only=True)[3]  # (2, 256, 4, 6), at stride 16
        tokens = stem((pixels - 0.5) / 0.5)
    assert wanted.shape[2:] == (4, 6)
    torch.testing.assert_close(tokens, stem.proj(wanted).movedim(1, -1), atol=1e-5, rtol=1e-4)


def test_a_network_stem_keeps_its_statistics_in_training(network):
    encoder = make(stem="resnet10t").float()
    init_stem(encoder.patch_embed, network, OWN, **OWN)
    before = {key: value.clone() for key, value in encoder.patch_embed.state_dict().items()}
    encoder.train().forward_tokens(torch.rand(2, 3, 64, 64)).sum().backward()
    assert encoder.blocks[0].training
    assert all(torch.equal(before[key], value) for key, value in encoder.patch_embed.state_dict().items())
    assert encoder.patch_embed.backbone.model.conv1[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stem": "resnet10t", "patch_size": 14}, "has strides .*, none of which is the patch, 14 px"),
        ({"stem": "resnet10t", "stem_options": {"pretrained": True}}, "may not hold 'pretrained'"),
        ({"stem": "resnet10t", "stem_options": {"checkpoint_path": "x"}}, "may not hold 'checkpoint_path'"),
        ({"stem": "resnet10t", "stem_options": {"nonsense": 1}}, "'resnet10t' into stages: .*nonsense"),
        ({"stem": "resnet10t", "stem_options": {"output_stride": 7}}, "'resnet10t' into stages: wrong options"),
        ({"stem": "resnet10t", "stem_options": {"out_indices": [3]}}, "may not hold 'out_indices'"),
        ({"stem": "resnet10t", "stem_options": [1]}, "the options of a stem must be a dictionary, not '\\[1\\]'"),
        ({"stem": "resnet10t.c3_in1k"}, "by name without a tag"),
        ({"stem": 5}, "stem is '5'"),
        ({"stem": "conv", "stem_options": {"act_layer": "relu"}}, "a stem of 'conv' takes no options"),
        ({"stem": "lookupvit_tiny_patch16_224"}, "cannot cut the stem 'lookupvit_tiny_patch16_224' into stages"),
    ],
)
def test_stems_that_cannot_be_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_a_configuration_cannot_make_a_stem_fetch_weights():
    options = {"stem": "resnet10t", "stem_options": {"pretrained": True}}
    with pytest.raises(ValueError, match="may not hold 'pretrained'"):
        rebuild_encoder({"name": "lookupvit_tiny_patch16_224", "kwargs": options})


def test_a_configuration_cannot_nest_stems():
    kwargs, built = {}, []
    for _ in range(12):  # each would be built twice for the one around it
        kwargs = {"stem": "lookupvit_tiny_patch16_224", "stem_options": kwargs}
    count = patch.object(stems.timm, "create_model", lambda *a, **k: (built.append(a), timm_create(*a, **k))[1])
    with count, pytest.raises(ValueError, match="cannot cut the stem"):
        rebuild_encoder({"name": "lookupvit_tiny_patch16_224", "kwargs": kwargs})
    assert len(built) <= 14


def test_a_stem_begins_from_the_teacher_and_stays(captioned, teacher, network, tmp_path, monkeypatch):
    sizes = []
    encode = Student.encode
    monkeypatch.setattr(Student, "encode", lambda *args: (sizes.append(args[1].shape[-1]), encode(*args))[1])
    config = debug(tmp_path / "run", teacher, captioned, early_share=0.5, early_size=32, late_size=48, ema=0.9)
    folder = pretrain(config)
    assert sizes == [32, 32, 48, 48]  # of views of 64 px, which the teacher saw
    exported, trained = load_file(folder / "model.safetensors"), network.state_dict()
    kept = {key.removeprefix("patch_embed.backbone.model."): key for key in exported if "backbone" in key}
    assert kept
    assert all(torch.equal(exported[key], trained[name]) for name, key in kept.items())
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(exported["patch_embed.scale"], 0.5 / std)
    torch.testing.assert_close(exported["patch_embed.shift"], (0.5 - mean) / std)
    encoder = create_encoder(f"local-dir:{folder}")
    assert list(encoder.default_cfg["input_size"]) == [3, 48, 48]
    torch.manual_seed(config.seed)
    fresh = create_encoder(config.encoder, **config.encoder_options)
    assert not torch.equal(encoder.patch_embed.proj.weight, fresh.patch_embed.proj.weight)  # that was trained
    again = replace(config, output=tmp_path / "again", encoder=f"local-dir:{folder}", train_stem=1.0)
    pretrain(replace(again, encoder_options={}, steps=1, warmup=0.0))  # it has weights of its own to begin from
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert any(not torch.equal(after[key], exported[key]) for key in kept.values())
    assert all(torch.equal(after[key], exported[key]) for key in kept.values() if "running" in key)


def test_a_stem_joins_in_late(captioned, teacher, network, tmp_path, monkeypatch):
    seen, encode = [], Student.encode

    def watched(student, *args):
        seen.append(student.encoder.patch_embed.backbone.model.conv1[0].weight.detach().clone())
        return encode(student, *args)

    monkeypatch.setattr(Student, "encode", watched)
    folder = pretrain(debug(tmp_path, teacher, captioned, train_stem=0.5, steps=4, learning_rate=1e-2))
    assert [torch.equal(weight, network.conv1[0].weight) for weight in seen] == [True, True, True, False]
    assert not torch.equal(
        load_file(folder / "model.safetensors")["patch_embed.backbone.model.conv1.0.weight"], seen[3]
    )


@pytest.mark.slow
def test_two_processes_let_a_stem_join_in(captioned, teacher, network, tmp_path):
    args = ["pretrain.py", "debug", "--captions", captioned, "--batch-size", "2", "--train-stem", "0.5"]
    args += ["--teachers.0.name", "resnet10t", "--teachers.0.checkpoint", teacher.checkpoint]
    args += ["--teachers.0.num-classes", "7", "--encoder-options", "depth=1", "stem=resnet10t"]
    result = launch(*args, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    after = load_file(tmp_path / "model.safetensors")["patch_embed.backbone.model.conv1.0.weight"]
    assert not torch.equal(after, network.conv1[0].weight)


def test_a_stem_begins_from_a_network_by_name(captioned, network, tmp_path):
    save_for_hf(network, tmp_path / "network", safe_serialization=True)
    config = debug(tmp_path / "run", None, captioned, teachers=(), init_from=f"local-dir:{tmp_path / 'network'}")
    exported = load_file(pretrain(replace(config, steps=1)) / "model.safetensors")
    torch.testing.assert_close(exported["patch_embed.backbone.model.conv1.0.weight"], network.conv1[0].weight.detach())


def test_a_captioner_keeps_its_network_stem(network, tmp_path):
    encoder = make(stem="resnet10t", stem_options={"act_layer": "silu"}, num_classes=0)
    init_stem(encoder.patch_embed, network, OWN, (0.4,) * 3, (0.3,) * 3)
    kwargs = {**SMALL, "num_classes": 0, "stem": "resnet10t", "stem_options": {"act_layer": "silu"}}
    decoder = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50}
    model = CaptionerModel(CaptionerConfig({"name": "lookupvit_tiny_patch16_224", "kwargs": kwargs}, decoder))
    model.encoder.load_state_dict(encoder.float().state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    wanted = model.eval().encoder.encode(pixels)
    model.half().save_pretrained(tmp_path)
    loaded = CaptionerModel.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded.encoder.encode(pixels), wanted, atol=0.02, rtol=0.02)
    assert not loaded.train().encoder.patch_embed.backbone.training


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"teachers": ()},
            "cut from a 'resnet10t' and needs its weights to start from: no network is named",
        ),
        (
            {"encoder_options": {"stem": "resnet10t", "stem_options": {"act_layer": "silu"}}},
            "with the options {'act",
        ),
        ({"encoder_options": {"depth": 1, "stem": "resnet14t"}}, "cut from a 'resnet14t' and needs"),
        ({"init_from": "resnet10t.nobodys"}, "no weights of the network 'resnet10t.nobodys'"),
        ({"late_size": 16}, "grid 3x3 is larger than the lookup grid 1x1 of 16 px views"),
        ({"late_size": 50}, "does not take views of 50 px .image of 50x50 px is not a multiple of the patch"),
    ],
)
def test_beginnings_that_cannot_be_are_named(captioned, teacher, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pretrain(debug(tmp_path / "run", teacher, captioned, **kwargs))
    assert not (tmp_path / "run" / "checkpoints").exists()
