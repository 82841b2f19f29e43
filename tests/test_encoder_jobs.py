"""Encoders of this package through the real jobs: pretraining, the token cache, training on it, captioning."""

import json

import pytest
import timm
import torch
from commands import succeed
from safetensors.torch import save_file
from training_runs import losses

from captioner.encoders import create_encoder, describe_encoder


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "teacher.safetensors")
    args = ["--teachers.0.name", "resnet10t", "--teachers.0.checkpoint", tmp_path / "teacher.safetensors"]
    return [*args, "--teachers.0.num-classes", "7"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tosa_tiny_patch16_224", {"ratio": 0.5}),
        ("tore_vit_tiny_patch16_224", {"iterator_blocks": 1}),
        ("tore_lookupvit_tiny_patch16_224", {"iterator_blocks": 0}),
    ],
)
def test_goes_through_every_job(name, options, captioned, teacher, tmp_path, capsys):
    encoder, tokens, model = tmp_path / "encoder", tmp_path / "tokens", tmp_path / "model"
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64, **options}
    written = [f"{key}={value}" for key, value in options.items()]
    args = ["--captions", captioned, "--encoder", name, "--encoder-options", *written, *teacher, "--grids", "2"]
    succeed("pretrain", "debug", *args, "--image-size", "64", "--steps", "4", "--log-every", "1", "--output", encoder)
    assert len(losses(encoder)) == 4
    own = losses(encoder, "selector")
    assert (len(own) == 4 and min(own.values()) > 0) if name.startswith("tosa") else not own
    exported = create_encoder(f"local-dir:{encoder}")
    described = describe_encoder(f"local-dir:{encoder}")["kwargs"]
    for key in options.keys() & {"ratio", "iterator_blocks"}:
        assert described[key] == getattr(exported, key) == options[key]

    data = ["--data.root", captioned, "--data.workers", "0"]
    base = ["--model.encoder", f"local-dir:{encoder}"]
    succeed("cache", *data, *base, "--grids", "2x2", "--output", tokens)
    assert json.loads((tokens / "cache.json").read_text())["grids"] == {"2x2": [5, 24]}
    args = ["debug", *data, *base, "--model.grid", "2x2", "--epochs", "1", "--data.tokens", tokens]
    succeed("train", *args, "--output", model)
    capsys.readouterr()
    succeed("caption", captioned / "images" / "val0.png", "--model", model / "best")
    assert capsys.readouterr().out.startswith(f"{captioned}")
