"""The contract every encoder keeps: pixels in, a few tokens out; and freezing, in its one place.

Letters: B batch, C channels, H W pixels, M tokens handed on, D their width.
"""

import json
import logging
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from timm.models import is_model_in_modules
from torch import nn

from captioner.grids import Grid, parse_grid
from captioner.hub import hub_options

logger = logging.getLogger(__name__)

EXPORTED = ("hf-hub:", "local-dir:")
"""How names of encoders begin that are not timm's own."""


class TokenEncoder(nn.Module):
    """Base class of all encoders: turns pixels (B, C, H, W) into tokens (B, M, D).

    A subclass sets `embed_dim` and implements `forward_tokens` and `num_tokens`. Where an encoder can choose how many
    tokens it hands on, `grid` (rows, columns of compressed tokens) says so at call time; `None` is its own default.
    """

    embed_dim: int
    frozen: bool = False

    def forward_tokens(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into tokens (B, M, D), gradients flowing."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it must implement forward_tokens")

    def num_tokens(self, grid: Grid | None = None) -> int:
        """Count the tokens M that `forward_tokens` returns for an image of the encoder's own size."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it must implement num_tokens")

    @property
    def timm_model(self) -> nn.Module:
        """The model as timm knows it: what is exported."""
        return self

    def freeze(self) -> "TokenEncoder":
        """Hold every parameter and running statistic still from now on, `train()` notwithstanding; returns self."""
        self.frozen = True
        return self.eval()

    def train(self, mode: bool = True) -> "TokenEncoder":
        """Switch training mode; a frozen encoder stays in eval mode, its parameters without gradient.

        Loaders that put fresh parameters in place, as transformers' does, call this afterwards.
        """
        if self.frozen:
            self.requires_grad_(False)
        return super().train(mode and not self.frozen)

    def encode(self, pixel_values: torch.Tensor, grid: Grid | str | int | None = None) -> torch.Tensor:
        """`forward_tokens` in the encoder's own dtype, and without building a graph when it is frozen.

        Args:
            pixel_values: pixels (B, C, H, W).
            grid: compressed grid as people write it, see `parse_grid`.
        """
        dtype = next(self.parameters()).dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.forward_tokens(pixel_values.to(dtype), parse_grid(grid))  # (B, M, D)


def create_encoder(name: str, **kwargs) -> TokenEncoder:
    """Build an encoder by its timm name: this package's own, or any stock timm model through `PooledEncoder`.

    Args:
        name: a timm model name, such as `lookupvit_small_patch16_224`; or, with its weights, a timm name with a tag
            (`vit_small_patch16_224.augreg_in21k`), `local-dir:FOLDER` as `pretrain.py` exports it, `hf-hub:OWNER/NAME`.
        kwargs: handed to `timm.create_model` (`img_size`, `pretrained`, `checkpoint_path`, ...).

    Raises:
        ValueError: timm knows no model of that name, or its weights cannot be had.
    """
    from captioner.encoders.pooling import PooledEncoder

    exported = name.startswith(EXPORTED)
    architecture = exported_config(name)["architecture"] if exported else name.split(".")[0]
    if not timm.is_model(architecture):
        close = ", ".join(timm.list_models(f"*{architecture.split('_')[0]}*")[:5])
        raise ValueError(f"no encoder named '{name}' in timm" + (f"; did you mean one of: {close}?" if close else ""))
    settings = {"num_classes": 0, "pretrained": has_weights(name)}
    if is_model_in_modules(architecture, ["vision_transformer"]):
        settings["dynamic_img_size"] = True  # any size divisible by the patch, as the contract has it
    try:
        model = timm.create_model(name, **{**settings, **kwargs})
    except TypeError as error:
        raise ValueError(f"the encoder '{name}' has no such option: {error}") from None
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"no weights of the encoder '{name}': {str(error).splitlines()[0]}") from None
    return model if isinstance(model, TokenEncoder) else PooledEncoder(model)


def frozen_encoder(name: str) -> TokenEncoder:
    """Build an encoder to be used as it is; one without trained weights gets a warning, since it will never have any.

    Raises:
        ValueError: as `create_encoder`.
    """
    encoder = create_encoder(name).freeze()
    if not has_weights(name):
        logger.warning(
            "the encoder '%s' has random weights, and is frozen: for more than a trial name a trained one, "
            "local-dir:FOLDER of captioner pretrain, hf-hub:OWNER/NAME, or a timm name with a tag",
            name,
        )
    return encoder


def has_weights(name: str) -> bool:
    """Tell whether an encoder of this name comes with trained weights; others begin at random."""
    return name.startswith(EXPORTED) or "." in name


def exported_config(name: str) -> dict:
    """Read what timm wrote beside the weights of `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.

    Raises:
        ValueError: there is no such encoder, or its weights are not safetensors.
    """
    kind, _, place = name.partition(":")
    folder = Path(place)
    try:
        if kind == "hf-hub":
            hub_options(place)  # refuses one that cannot be had
            return json.loads(Path(hf_hub_download(place, "config.json")).read_text())
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"no encoder at '{name}': {str(error).splitlines()[0]}") from None
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"no weights of the encoder '{name}': it has no model.safetensors")
    if "architecture" not in config:
        raise ValueError(f"'{folder / 'config.json'}' describes no timm model; export one with captioner pretrain")
    return config


def encoder_config(name: str, encoder: TokenEncoder) -> dict:
    """Say how to rebuild an encoder without the folder or hub it came from: `{"name": timm name, "kwargs": {...}}`.

    Args:
        name: what `create_encoder` built it from.
        encoder: what it built.
    """
    kwargs = {}
    if name.startswith(EXPORTED):
        kwargs = exported_config(name).get("model_args", {})
        kwargs = {k: v for k, v in kwargs.items() if k not in ("num_classes", "global_pool")}
    return {"name": encoder.default_cfg["architecture"], "kwargs": kwargs}


def build_encoder(description: dict) -> TokenEncoder:
    """Build the encoder that a configuration describes, without weights: these are the captioner's own.

    Args:
        description: `{"name": timm name, "kwargs": {...}}`.

    Raises:
        ValueError: it names what lies elsewhere, or what timm does not know; a configuration may be hostile.
    """
    name, kwargs = description["name"], description.get("kwargs", {})
    if elsewhere := [name] * name.startswith(EXPORTED) + loading_options(kwargs):
        raise ValueError(f"a captioner's configuration may not ask for '{elsewhere[0]}' of its encoder")
    return create_encoder(name.split(".")[0], **kwargs, pretrained=False)


def loading_options(kwargs: dict) -> list[str]:
    """Name those of timm's keyword arguments that make it load something."""
    return [key for key in kwargs if str(key).startswith(("pretrained", "checkpoint")) or key == "cache_dir"]
