import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import captioner
from captioner.encoders import create_encoder, describe_encoder
from captioner.encoders.shipped import WEIGHTS
from captioner.processing import image_settings

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_weights_are_small_half_precision_and_safetensors_alone():
    files = [path for path in WEIGHTS.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60 * 2**20
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        kinds = {key: str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    assert {kind for key, kind in kinds.items() if not key.endswith("num_batches_tracked")} == {"F16"}


def test_images_are_captioned_at_every_grid():
    model = captioner.load()
    image = EXAMPLES / "cat.jpg"
    for grid in (None, (3, 3), "5x5", (7, 7), "10x10"):
        [result] = model.stream(image, grid=grid)
        assert result.error is None
        assert len(result.caption.split()) >= 3
        assert result.logprob < 0


def test_options_that_make_no_sense_are_named():
    model = captioner.load(device="cpu")
    for options in ({"batch_size": 0}, {"num_beams": "3"}, {"num_return_sequences": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            model(EXAMPLES / "cat.jpg", **options)
    with pytest.raises(ValueError, match="no device 'gpu' here; there is .*cpu$"):
        captioner.load(device="gpu")


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    command = [sys.executable, "-m", "captioner.cli", "caption", str(EXAMPLES)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [Path(path).name for path, _ in lines] == ["astronaut.jpg", "cat.jpg", "coffee.jpg", "rocket.jpg"]
    assert all(len(caption.split()) >= 3 for _, caption in lines)


def test_its_encoder_can_be_named_alone():
    model = captioner.load(device="cpu")
    encoder = create_encoder("shipped").eval()
    assert describe_encoder("shipped") == model.model.config.encoder_config
    image = image_settings(encoder.default_cfg)
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in image.items()} == {
        key: list(v) if isinstance(v, tuple) else v for key, v in model.processor.image.items()
    }
    pixels = model.processor.pixels(EXAMPLES / "cat.jpg")[None]
    assert torch.equal(encoder.encode(pixels), model.model.encoder.encode(pixels))


def test_it_can_be_named():
    assert captioner.load("shipped", "cpu")(EXAMPLES / "cat.jpg") == captioner.load(device="cpu")(EXAMPLES / "cat.jpg")
