"""Every job of the command line, with STViT as the encoder."""

import json

import pytest
import timm
import torch
from commands import succeed
from safetensors.torch import save_file
from training_runs import losses

from captioner import CaptionerModel, cli
from captioner.encoders import create_encoder

SMALL = {
    "stvit_tiny_patch16_224": ["embed_dim=24", "depth=4", "image_layers=1"],
    "stvitr_swin_tiny_patch4_window7_224": ["embed_dim=12", "depths=(1,1,4,1)", "window_size=2", "unit_layers=4"],
}


@pytest.fixture
def teacher(tmp_path):
    """The arguments that name a small random teacher."""
    torch.manual_seed(0)
    file = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), file)
    args = ["--teachers.0.name", "resnet10t", "--teachers.0.checkpoint", str(file)]
    return [*args, "--teachers.0.num-classes", "7"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_pretraining_caching_training_and_captioning(name, captioned, teacher, tmp_path, capsys):
    encoder, tokens, model = tmp_path / "encoder", tmp_path / "tokens", tmp_path / "model"
    args = ["--captions", captioned, "--encoder", name, "--encoder-options", "img_size=64", *SMALL[name]]
    args += [*teacher, "--image-size", "64", "--grids", "1", "2", "--steps", "20"]
    succeed("pretrain", "debug", *args, "--learning-rate", "3e-3", "--output", encoder)
    learned = list(losses(encoder).values())
    assert sum(learned[-4:]) < sum(learned[:4])
    assert set(losses(encoder, "grid").keys()) == set(range(1, 21))

    data = ["--data.root", captioned, "--data.workers", "0"]
    base = ["--model.encoder", f"local-dir:{encoder}"]
    succeed("cache", *data, *base, "--grids", "2x2", "--output", tokens)
    exported = create_encoder(f"local-dir:{encoder}").freeze()
    prefix, width = exported.num_prefix_tokens, exported.embed_dim
    assert json.loads((tokens / "cache.json").read_text())["grids"] == {"2x2": [4 + prefix, width]}

    args = ["debug", *data, *base, "--model.grid", "2x2", "--epochs", "1"]
    succeed("train", *args, "--data.tokens", tokens, "--output", model)
    reloaded = CaptionerModel.from_pretrained(model / "best")
    pixels = torch.randn(2, 3, 64, 96)
    assert torch.equal(reloaded.encode(pixels), exported.encode(pixels, "2x2"))
    capsys.readouterr()
    succeed("caption", captioned / "images" / "val0.png", "--model", model / "best")
    assert capsys.readouterr().out.startswith(f"{captioned}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--image-size", "96"], "96x96 px has 6x6 cells in stage 3, fewer than a window of 7x7"),
        (["--image-size", "120"], "120x120 px is not a multiple of the stride, 32x32 px"),
        (["--image-size", "128", "--grids", "5"], "grid 5x5 is larger than the feature map 4x4 of 128 px views"),
        (["--encoder-options", "depths=(1,1,2,1)"], "semantic tokens need at least 2 layers, not 0"),
    ],
)
def test_what_cannot_be_is_one_line_before_the_run(options, reason, captioned, teacher, tmp_path, capsys):
    args = ["--captions", captioned, "--encoder", "stvit_swin_tiny_patch4_window7_224", "--output", tmp_path / "out"]
    small = ["--encoder-options", "embed_dim=12", "depths=(1,1,4,1)"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "debug", *map(str, args), *teacher, *small, *options])
    assert stopped.value.code not in (0, None)
    error = str(stopped.value.code) + capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "log.jsonl").exists()
