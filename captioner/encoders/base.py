"""The contract every encoder keeps: pixels in, a few tokens out; and freezing, in its one place.

Letters: B batch, C channels, H W pixels, M tokens handed on, D their width.
"""

import logging

import torch
from torch import nn

from captioner.grids import Grid, parse_grid

logger = logging.getLogger(__name__)


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
