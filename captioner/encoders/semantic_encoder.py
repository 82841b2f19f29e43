"""What the two forms of STViT share as encoders: the contract around one traced forward pass, and dense features.

Letters: B batch, C channels, H W pixels, P prefix tokens, M tokens returned, D width, (r, c) their grid, (h, w) cells.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import nn

from captioner.encoders.base import TokenEncoder, TokenMaps, image_size
from captioner.encoders.maps import pool_tokens
from captioner.encoders.registry import timm_config
from captioner.encoders.semantic import split_prefix
from captioner.encoders.traced import Traced, join
from captioner.errors import SettingError
from captioner.grids import Grid, write_grid


class SemanticEncoder(TokenEncoder):
    """An encoder of stages, one of which replaces image tokens by semantic tokens, or recovers them from these.

    Without recovery (STViT) the tokens returned are the semantic tokens. With recovery (STViT-R) they are the image
    tokens at the end, averaged within the cells of the grid, and all image tokens are the `dense` tokens.

    A subclass builds `stages`, `norm` and `feature_info`, and implements `embed`. A stage maps tokens (B, P+T, D), the
    size of their map and the grid to the next tokens and the size of their map.

    Attributes:
        recovers: whether the last stage returns image tokens.
    """

    chooses_grid = True
    recovers: bool = False
    stages: nn.ModuleList
    norm: nn.Module
    feature_info: list[dict[str, Any]]
    grad_checkpointing: bool = False

    def embed(self, pixel_values: torch.Tensor, size: Grid, attention: bool) -> tuple[Traced, Grid]:
        """Make prefix and image tokens (B, P+N, D) from pixels (B, C, H, W); returned with the size of their map.

        Args:
            pixel_values: the pixels.
            size: the map of cells (h, w).
            attention: whether the tokens have rows.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement embed(pixel_values, size, attention)")

    def run_stages(
        self,
        pixel_values: torch.Tensor,
        grid: Grid | None,
        attention: bool = False,
        outputs: list[tuple[torch.Tensor, Grid]] | None = None,
    ) -> tuple[Traced, Grid, Grid]:
        """Return the tokens (B, P+T, D) after the last stage, the size of their map, and the grid.

        Args:
            pixel_values: pixels (B, C, H, W).
            grid: rows and columns of tokens; `None` for the encoder's default.
            attention: whether the tokens have rows.
            outputs: a list that is given the tokens after each stage and the size of their map.
        """
        size = self.largest_grid(image_size(pixel_values))
        grid = self.check_grid(grid or self.grid, size)
        x, side = self.embed(pixel_values, size, attention)
        for stage in self.stages:
            if self.grad_checkpointing and self.training:
                x, side = checkpoint(stage, x, side, grid)
            else:
                x, side = stage(x, side, grid)
            if outputs is not None:
                outputs.append((x.tokens, side))
        return x, side, grid

    def finish(self, x: Traced, size: Grid, grid: Grid) -> tuple[Traced, torch.Tensor | None]:
        """Norm the last stage's tokens; return those of the grid (B, P+M, D), and the dense ones (B, h, w, D)."""
        x = x.with_tokens(self.norm(x.tokens))
        if not self.recovers:
            return x, None
        prefix, image = split_prefix(x, self.num_prefix_tokens)
        dense = image.apply(lambda t: t.unflatten(1, size))  # (B, h, w, D)
        return join(prefix, dense.apply(lambda t: pool_tokens(t, grid).flatten(1, 2))), dense.tokens

    def forward_tokens(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into normed tokens (B, P+r*c, D), the class token first where there is one.

        Raises:
            SettingError: the encoder does not take images of this size, or the grid is larger than the map of cells.
        """
        return self.finish(*self.run_stages(pixel_values, grid))[0].tokens

    def forward_maps(self, pixel_values: torch.Tensor, grid: Grid | None = None, attention: bool = False) -> TokenMaps:
        """Encode pixels (B, C, H, W) into tokens at their places; see `TokenMaps`.

        Attention is rolled out through every layer, see `rollout.py` and `traced.py`.

        Raises:
            SettingError: as `forward_tokens`.
        """
        x, size, grid = self.run_stages(pixel_values, grid, attention)
        x, dense = self.finish(x, size, grid)
        cells = x.attention(self.largest_grid(image_size(pixel_values)))
        return self.lay_out(x.tokens, grid)._replace(dense=dense, attention=cells)

    def largest_grid(self, image_size: tuple[int, int]) -> Grid:
        """Return the map of cells (h, w) of an image of H x W pixels: no grid can be larger.

        Raises:
            SettingError: the image is not a multiple of the stride.
        """
        if image_size[0] % self.stride or image_size[1] % self.stride or 0 in image_size:
            raise SettingError(
                f"image of {write_grid(image_size)} px is not a multiple of the stride, "
                f"{write_grid((self.stride, self.stride))} px",
                "image_size",
            )
        return image_size[0] // self.stride, image_size[1] // self.stride

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute each stage in the backward pass."""
        self.grad_checkpointing = enable

    # What timm's `features_only=True` needs

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the feature maps (B, D, h, w) of stages, as timm's models do.

        Args:
            x: pixels (B, C, H, W).
            indices: the stages: their numbers, the last so many, or `None` for all.
            norm: whether the map of the last stage is normed.
            stop_early: whether stages after the last one requested are skipped; the maps alone are then returned.
            output_fmt: `NCHW` alone is known.
            intermediates_only: return the maps without the tokens of the grid.

        Raises:
            ValueError: the encoder does not recover its image tokens, or the format is unknown.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is '{output_fmt}'; a {type(self).__name__} has NCHW alone")
        self.check_recovers()
        chosen, _ = feature_take_indices(len(self.stages), indices)
        outputs: list[tuple[torch.Tensor, Grid]] = []
        last = self.run_stages(x, None, outputs=outputs)
        maps = []
        for number in chosen:
            tokens, size = outputs[number]
            image = tokens[:, self.num_prefix_tokens :]
            normed = norm and number == len(self.stages) - 1
            maps.append((self.norm(image) if normed else image).mT.unflatten(2, size))  # (B, D, h, w)
        if intermediates_only or stop_early:
            return maps
        return self.finish(*last)[0].tokens, maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after those requested, the last norm and the classifier; return the stages requested.

        Raises:
            ValueError: the encoder does not recover its image tokens.
        """
        self.check_recovers()
        chosen, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def check_recovers(self) -> None:
        """Refuse dense features of an encoder that has none.

        Raises:
            ValueError: it does not recover its image tokens.
        """
        if not self.recovers:
            raise ValueError(
                f"a {type(self).__name__} that does not recover its image tokens has no dense features: "
                "choose a variant of STViT-R, whose name starts with stvitr_"
            )


DEFAULT_CFG = timm_config(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What timm knows of every variant of STViT."""
