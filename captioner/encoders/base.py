"""The interface of all encoders: pixels in, a few tokens out. Freezing is implemented here, too.

Letters: B batch, C channels, H W pixels, M tokens returned, D their width, (r, c) the grid of tokens in rows and
columns, (h, w) the map of cells that the image is cut into.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from captioner.encoders.maps import cell_weights, pool_tokens
from captioner.errors import SettingError
from captioner.grids import Grid, parse_grid, write_grid


class TokenMaps(NamedTuple):
    """An encoded batch with the place of each token in the image."""

    summary: torch.Tensor
    """One vector for the whole image (B, D): the class token, or the mean of `tokens` where there is none."""
    tokens: torch.Tensor
    """The tokens of the grid, without prefix tokens (B, r, c, D)."""
    dense: torch.Tensor | None = None
    """Tokens of every cell (B, h, w, D), for an encoder that `has_dense_tokens`, such as LookupViT's lookup tokens."""
    attention: torch.Tensor | None = None
    """Share of each cell of the image in each token (B, M, h, w), in the order of `forward_tokens`; a map sums to 1."""


class PretrainedPart(NamedTuple):
    """A part of an encoder that is cut from a trained timm network."""

    name: str
    """timm name of the network."""
    options: dict[str, Any]
    """Keyword arguments that the network was built with."""
    module: nn.Module
    """The part itself; training may keep its weights fixed."""


class TokenEncoder(nn.Module):
    """Base class of all encoders: it turns pixels (B, C, H, W) into tokens (B, M, D).

    A new encoder subclasses it, passes the arguments below to `__init__`, implements `forward_tokens` and registers a
    function with timm. The tokens are `num_prefix_tokens` tokens of the whole image (class token, registers), then the
    tokens of a grid, row by row. All other methods have defaults, which an encoder may override.

    Args:
        embed_dim: width D of the tokens.
        num_prefix_tokens: tokens before those of the grid; the first is the class token.
        stride: side in pixels of a cell of the map.
        grid: the default grid (r, c); `None` for a token of every cell.

    Attributes:
        chooses_grid: whether a grid changes what the encoder computes, so that pretraining draws one for each step. An
            encoder without a choice computes its own map, and pools it to the grid of a call.
        has_class_token: whether the first prefix token sums up the image.
        has_dense_tokens: whether `forward_maps` returns `dense` tokens.
        map_name: name of the map of cells in error messages.
        default_cfg: timm's configuration: `input_size` (C, H, W), `mean`, `std`; `build_model_with_cfg` sets it.
        frozen: see `freeze`.

    Raises:
        ValueError: the encoder chooses its grid, but has no default grid.
    """

    chooses_grid: bool = False
    has_dense_tokens: bool = False
    map_name: str = "feature map"
    frozen: bool = False
    default_cfg: dict[str, Any]

    def __init__(self, *, embed_dim: int, num_prefix_tokens: int, stride: int, grid: Grid | None = None):
        super().__init__()
        if self.chooses_grid and grid is None:
            raise ValueError(f"{type(self).__name__} chooses its grid, so it needs a default one: pass grid")
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim  # timm knows the width by these names
        self.num_prefix_tokens, self.stride, self.grid = num_prefix_tokens, stride, parse_grid(grid)
        self.has_class_token = num_prefix_tokens > 0
        self.num_classes, self.global_pool = 0, "token" if self.has_class_token else "avg"
        self.head_drop: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()

    # For decoders

    def forward_tokens(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into tokens (B, M, D), with gradients.

        Args:
            grid: rows and columns of tokens; `None` for the encoder's default.

        Raises:
            ValueError: the encoder does not take images of this size.
            SettingError: the grid is larger than the map of cells.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward_tokens(pixel_values, grid)")

    def largest_grid(self, image_size: tuple[int, int]) -> Grid:
        """Return the map of cells (h, w) of an image of H x W pixels: no grid can be larger.

        Raises:
            ValueError: the encoder does not take images of this size.
        """
        return image_size[0] // self.stride, image_size[1] // self.stride

    def resolve_grid(self, grid: Grid | None, image_size: tuple[int, int]) -> Grid:
        """Return the grid of a call: the one given, else the default, else the whole map.

        Raises:
            SettingError: it is larger than the map of cells.
        """
        return self.check_grid(grid or self.grid, self.largest_grid(image_size))

    def check_grid(self, grid: Grid | None, largest: Grid) -> Grid:
        """Return the grid, or the largest for `None`.

        Raises:
            SettingError: it is larger than the largest.
        """
        rows, columns = grid = grid or largest
        if not (1 <= rows <= largest[0] and 1 <= columns <= largest[1]):
            raise SettingError(
                f"compressed grid {write_grid(grid)} is not within the {self.map_name} {write_grid(largest)}, "
                "the largest grid at this image size",
                *("grid", "grids", "image_size"),
            )
        return rows, columns

    def num_tokens(self, grid: Grid | None = None) -> int:
        """Count the tokens M that `forward_tokens` returns, for an image of the encoder's own size."""
        rows, columns = grid or self.grid or self.largest_grid(self.default_cfg["input_size"][1:])
        return self.num_prefix_tokens + rows * columns

    # For pretraining, probes and explanations

    def forward_maps(self, pixel_values: torch.Tensor, grid: Grid | None = None, attention: bool = False) -> TokenMaps:
        """Encode pixels (B, C, H, W) into tokens at their places; see `TokenMaps`.

        Args:
            grid: rows and columns of tokens; `None` for the encoder's default.
            attention: whether to compute the share of each cell in each token. In an encoder that does not override
                this method, a token has equal shares of the cells that it covers, and a prefix token of all cells.

        Raises:
            ValueError: as `forward_tokens`.
        """
        size = self.largest_grid(image_size(pixel_values))
        grid = self.check_grid(grid or self.grid, size)
        tokens = self.forward_tokens(pixel_values, grid)  # (B, M, D)
        maps = self.lay_out(tokens, grid)
        return maps._replace(attention=self.covered_cells(tokens, size, grid)) if attention else maps

    def forward_with_losses(
        self, pixel_values: torch.Tensor, grid: Grid | None = None
    ) -> tuple[TokenMaps, dict[str, torch.Tensor]]:
        """Encode pixels (B, C, H, W) in pretraining: the maps, and the encoder's own losses.

        Args:
            grid: rows and columns of tokens; `None` for the encoder's default.

        Returns:
            What `forward_maps` returns, and the encoder's own losses by name, scalars that pretraining adds to its
            loss as they are. Here there are none; an encoder with parts that no other loss reaches overrides this
            method, such as ToSA for its selectors.

        Raises:
            ValueError: as `forward_tokens`.
        """
        return self.forward_maps(pixel_values, grid), {}

    def lay_out(self, tokens: torch.Tensor, grid: Grid) -> TokenMaps:
        """Split tokens (B, M, D) into the summary and the tokens at their places in the grid."""
        places = tokens[:, self.num_prefix_tokens :].unflatten(1, grid)  # (B, r, c, D)
        return TokenMaps(tokens[:, 0] if self.has_class_token else places.mean((1, 2)), places)

    def covered_cells(self, tokens: torch.Tensor, size: Grid, grid: Grid) -> torch.Tensor:
        """Return maps (B, M, h, w) with equal shares of the cells that each token covers; a prefix token covers all."""
        cells = cell_weights(pool_tokens, size, grid, tokens)  # (r*c, h*w)
        whole = torch.full_like(cells[:1], 1 / cells.shape[1]).expand(self.num_prefix_tokens, -1)
        return torch.cat([whole, cells]).unflatten(-1, size).expand(len(tokens), -1, -1, -1)

    @property
    def pretrained_part(self) -> PretrainedPart | None:
        """The part that is cut from a trained network and needs its weights, if there is one."""
        return None

    def init_from(
        self,
        source: str | nn.Module,
        mean: Sequence[float] | torch.Tensor | None = None,
        std: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Copy the weights of another network, in place, to start training from.

        Args:
            source: timm name of the network, which is loaded with pretrained weights, or the network itself.
            mean: mean of the network's input, for pixels in [0, 1]; `None` for timm's value.
            std: standard deviation of the network's input, likewise.

        Raises:
            ValueError: the weights cannot be loaded or do not fit, or this kind of encoder cannot use them.
        """
        raise SettingError(
            f"a {type(self.timm_model).__name__} cannot start from the weights of another network", "init_from"
        )

    # For timm: https://huggingface.co/docs/timm

    @property
    def timm_model(self) -> nn.Module:
        """The model as timm builds and exports it."""
        return self

    def forward_features(self, x: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into tokens (B, M, D)."""
        return self.forward_tokens(x, grid)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Classify tokens (B, M, D) into logits (B, num_classes), or stop at the pooled feature (B, D)."""
        x = self.head_drop(x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(1))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify pixels (B, C, H, W) into logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier of `num_classes` outputs (0 for none).

        Args:
            global_pool: input of the classifier: `token` (the class token) or `avg` (the mean of the grid); `None`
                leaves it as it is.

        Raises:
            ValueError: there is no such pooling, or no class token.
        """
        known = ("token", "avg") if self.has_class_token else ("avg",)
        if global_pool is not None and global_pool not in known:
            raise ValueError(f"global_pool is '{global_pool}'; a {type(self).__name__} has {' and '.join(known)}")
        self.num_classes, self.global_pool = num_classes, global_pool or self.global_pool
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay, in addition to vectors."""
        return set()

    # Freezing

    def freeze(self) -> "TokenEncoder":
        """Freeze the encoder: no parameter gets a gradient, and it stays in eval mode after `train()`; returns self."""
        self.frozen = True
        return self.eval()

    def train(self, mode: bool = True) -> "TokenEncoder":
        """Switch training mode; a frozen encoder stays in eval mode, its parameters without gradient.

        transformers replaces the parameters when it loads a model, and calls this method afterwards.
        """
        if self.frozen:
            self.requires_grad_(False)
        return super().train(mode and not self.frozen)

    def optimize_for_inference(self, dtype: torch.dtype = torch.float32) -> "TokenEncoder":
        """Return a copy that computes the same tokens faster on a CPU, up to rounding; or the encoder itself.

        The copy is for `encode` alone, not for training or saving. Later changes of the weights do not reach it.

        Args:
            dtype: dtype in which the copy computes, see `fast_dtype`. Its tokens have this dtype, too.
        """
        if dtype == next(self.parameters()).dtype:
            return self
        return copy.deepcopy(self).to(dtype).freeze()

    def encode(self, pixel_values: torch.Tensor, grid: Grid | str | int | None = None) -> torch.Tensor:
        """Encode pixels into tokens (B, M, D) in the encoder's own dtype; without a graph if it is frozen.

        Args:
            pixel_values: pixels (B, C, H, W).
            grid: compressed grid in any form that `parse_grid` reads.
        """
        dtype = next(self.parameters()).dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.forward_tokens(pixel_values.to(dtype), parse_grid(grid))  # (B, M, D)


def image_size(pixel_values: torch.Tensor) -> tuple[int, int]:
    """Return height and width in pixels of images (B, C, H, W)."""
    return pixel_values.shape[-2], pixel_values.shape[-1]


def unsaved_buffers(module: nn.Module) -> dict[nn.Module, dict[str, torch.Tensor]]:
    """Copy the buffers that a module's state dict leaves out, such as an index of positions.

    Returns:
        For each part of the module that has any, its buffers by name.
    """
    saved, found = module.state_dict(), {}
    for path, part in module.named_modules():
        own = {f"{path}.{name}".lstrip("."): name for name, _ in part.named_buffers(recurse=False)}
        if names := [name for full, name in own.items() if full not in saved]:
            found[part] = {name: part.get_buffer(name).clone() for name in names}
    return found
