"""A new encoder, whole: one class and one function registered with timm, as the documentation shows it."""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from captioner.encoders import TokenEncoder
from captioner.grids import Grid


class WindowEncoder(TokenEncoder):
    """Convolves patches of 8 pixels, then takes the largest value of each channel in each cell of the grid."""

    chooses_grid = True

    def __init__(
        self, embed_dim: int = 24, grid: Grid = (3, 3), num_classes: int = 0, in_chans: int = 3, **options: Any
    ):
        super().__init__(embed_dim=embed_dim, num_prefix_tokens=0, stride=8, grid=grid)
        self.patches = nn.Conv2d(in_chans, embed_dim, 8, stride=8)
        self.mix = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.reset_classifier(num_classes)

    def forward_tokens(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into tokens (B, r*c, D)."""
        grid = self.resolve_grid(grid, tuple(pixel_values.shape[-2:]))
        x = self.mix(self.patches(pixel_values).relu())  # (B, D, h, w)
        return nn.functional.adaptive_max_pool2d(x, grid).flatten(2).mT


default_cfgs = generate_default_cfgs({"window_patch8_32": {"input_size": (3, 32, 32), "num_classes": 0}})


@register_model
def window_patch8_32(pretrained: bool = False, **kwargs: Any) -> WindowEncoder:
    """Register the encoder under the name of this function."""
    return build_model_with_cfg(WindowEncoder, "window_patch8_32", pretrained, **kwargs)
