"""The encoder of the captioner that comes with this package, under the name `shipped`."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import nn

SHIPPED = "shipped"
"""Name of the encoder, and of the whole captioner."""

WEIGHTS = Path(__file__).parents[1] / "weights"
"""Folder of the captioner."""

PREFIX = "encoder."
"""Prefix of the names of the encoder's tensors in the captioner's file."""


def describe_shipped() -> dict:
    """Return the description of the encoder for `rebuild_encoder`: `{"name": timm name, "kwargs": {...}}`."""
    return json.loads((WEIGHTS / "config.json").read_text())["encoder_config"]


def load_shipped(encoder: nn.Module) -> None:
    """Load the weights into an encoder built from the description, and set the image size of its `default_cfg`."""
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
        encoder.load_state_dict({name.removeprefix(PREFIX): file.get_tensor(name) for name in names})
    size = json.loads((WEIGHTS / "processor_config.json").read_text())["image"]["input_size"]
    encoder.default_cfg = {**encoder.default_cfg, "input_size": tuple(size)}
