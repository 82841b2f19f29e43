"""The contract every encoder keeps: pixels in, a few tokens out; and freezing, in its one place.

Letters: B batch, C channels, H W pixels, M tokens handed on, D their width.
"""

import json
from pathlib import Path

import timm
import torch
from torch import nn

Grid = tuple[int, int]


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

    def encode(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """`forward_tokens` in the encoder's own dtype, and without building a graph when it is frozen."""
        dtype = next(self.parameters()).dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.forward_tokens(pixel_values.to(dtype), grid)  # (B, M, D)


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

    exported = name.startswith(("hf-hub:", "local-dir:"))
    if not exported and not timm.is_model(name.split(".")[0]):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(f"no encoder named '{name}' in timm" + (f"; did you mean one of: {close}?" if close else ""))
    try:
        model = timm.create_model(name, **{"num_classes": 0, "pretrained": exported or "." in name, **kwargs})
    except (RuntimeError, OSError) as error:
        raise ValueError(f"no weights of the encoder '{name}': {str(error).splitlines()[0]}") from None
    return model if isinstance(model, TokenEncoder) else PooledEncoder(model)


def encoder_config(name: str, encoder: TokenEncoder) -> dict:
    """Say how to rebuild an encoder without the folder or hub it came from: `{"name": timm name, "kwargs": {...}}`.

    Args:
        name: what `create_encoder` built it from.
        encoder: what it built.
    """
    kwargs = {}
    if name.startswith("local-dir:"):
        exported = json.loads((Path(name.removeprefix("local-dir:")) / "config.json").read_text())
        kwargs = {k: v for k, v in exported.get("model_args", {}).items() if k not in ("num_classes", "global_pool")}
    return {"name": encoder.default_cfg["architecture"], "kwargs": kwargs}
