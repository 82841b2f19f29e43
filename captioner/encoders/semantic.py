"""Semantic tokens: a few cluster centres that stand for many image tokens (Chang et al., CVPR 2023, arXiv 2303.08685).

Letters: B batch, P prefix tokens (class token), N = h * w image tokens, M = r * c semantic tokens, W windows,
D width, G learned global centres (M, D). With CA(Q, S) a cross-attention whose queries are Q and whose keys and values
are S, norms before each branch and LayerScale after it (section 3 of the paper):

    C0 = pool(X) to r x c                                 average (global form) or maximum (local form)
    C1 = C0 + CA(C0, [C0; X])         then an MLP         within a window and its neighbourhood in the local form
    C2 = C1 + G + CA(C1 + G, [C1; X]) then an MLP         over the whole map in both forms
    S  = ordinary ViT blocks on C2                        M tokens instead of N
    X  = X + CA(X, S)                 then an MLP         recovery, in STViT-R alone

The class token, where there is one, is a further centre: it attends with C0 and C1, but is neither pooled nor guided.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from captioner.encoders.maps import pool_tokens, resize_tokens
from captioner.encoders.mhbc import MHBC
from captioner.encoders.traced import Traced, attend, join, refine
from captioner.errors import SettingError
from captioner.grids import Grid

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class CrossBlock(nn.Module):
    """A ViT block in which tokens attend to other tokens.

    Args:
        dim: width D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP, in units of D.
        init_values: the factor by which LayerScale multiplies each branch at first.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, init_values: float = 1e-5, drop_path: float = 0.0
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = MHBC(dim, num_heads, infuse=False)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Update tokens (B, T, D) from source tokens (B, S, D); returned with the attention (B, H, T, S)."""
        read, attention = self.attn.gather(self.norm1(x), self.norm1(source))
        x = x + self.drop_path(self.ls1(read))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))), attention


class SemanticUnit(nn.Module):
    """Generates semantic tokens from image tokens, refines them, and recovers the image tokens if `recover` is true.

    Args:
        dim: width D.
        num_heads: attention heads.
        drop_path: rate of stochastic depth of each layer. Their number is that of the layers: two generate, those that
            follow are ordinary, and the last one recovers if `recover` is true.
        grid: rows and columns of the learned global centres, which are resized bilinearly for other grids.
        num_prefix: prefix tokens P.
        window: side of a window in cells, for the local form; `None` for the global form.
        overlap: cells by which the neighbourhood of a window is longer than the window, on each axis.
        recover: whether the unit returns image tokens (STViT-R) instead of semantic tokens.
        mlp_ratio: hidden width of the MLPs, in units of D.
        init_values: the factor by which LayerScale multiplies each branch at first (1e-5 in the paper).

    Raises:
        SettingError: there are too few layers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: Sequence[float],
        grid: Grid,
        num_prefix: int = 0,
        window: int | None = None,
        overlap: int = 3,
        recover: bool = False,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-5,
    ):
        super().__init__()
        least = 3 if recover else 2
        if len(drop_path) < least:
            recovery = " and one recovers the image tokens" if recover else ""
            raise SettingError(
                f"semantic tokens need at least {least} layers, not {len(drop_path)}: two generate them{recovery}",
                "encoder_options",
            )
        self.num_prefix, self.window, self.overlap = num_prefix, window, overlap
        cross = partial(CrossBlock, dim, num_heads, mlp_ratio, init_values)
        self.generation = nn.ModuleList(cross(rate) for rate in drop_path[:2])
        self.centres = nn.Parameter(torch.zeros(1, *grid, dim))  # G
        ordinary = drop_path[2:-1] if recover else drop_path[2:]
        self.blocks = nn.ModuleList(semantic_block(dim, num_heads, mlp_ratio, init_values, rate) for rate in ordinary)
        self.recovery = cross(drop_path[-1]) if recover else None

    def init_weights(self) -> None:
        """Draw the global centres and linear weights from a truncated normal of deviation 0.02; zero the biases."""
        trunc_normal_(self.centres, std=0.02)
        init_linear(self)

    def forward(self, x: Traced, size: Grid, grid: Grid) -> tuple[Traced, Grid]:
        """Turn image tokens into semantic tokens, or with recovery into image tokens again.

        Args:
            x: prefix and image tokens (B, P+N, D).
            size: rows and columns of the image tokens (h, w).
            grid: rows and columns of the semantic tokens (r, c).

        Returns:
            Prefix and semantic tokens (B, P+M, D), or with recovery prefix and image tokens (B, P+N, D); and the rows
            and columns of their map.
        """
        prefix, image = split_prefix(x, self.num_prefix)
        semantic = self.generate(prefix, image, size, grid)
        for block in self.blocks:
            semantic = refine(block, semantic)
        if self.recovery is None:
            return semantic, grid
        prefix, _ = split_prefix(semantic, self.num_prefix)
        return attend(self.recovery, join(prefix, image), semantic), size

    def generate(self, prefix: Traced | None, image: Traced, size: Grid, grid: Grid) -> Traced:
        """Compute the cluster centres (B, P+M, D) of image tokens (B, N, D)."""
        cells = image.apply(lambda t: t.unflatten(1, size))  # (B, h, w, D)
        windows = (1, 1) if self.window is None else count_windows(size, grid, self.window)
        tokens = pool_tokens(cells.tokens, grid) if self.window is None else max_pool_tokens(cells.tokens, grid)
        # A maximum picks another cell in each channel, so its row is that of the mean.
        centres = Traced(tokens, None if cells.rows is None else pool_tokens(cells.rows, grid))  # (B, r, c, D)
        queries = join(prefix, centres.apply(lambda t: cut_windows(t, windows)))  # (B*W, P+M/W, D)
        around = cells.apply(lambda t: cut_windows(t, windows, self.overlap))
        prefix, centres = split_prefix(attend(self.generation[0], queries, join(queries, around)), self.num_prefix)
        centres = centres.apply(lambda t: join_windows(t, windows, grid).flatten(1, 2))  # (B, M, D)
        guided = centres.with_tokens(centres.tokens + resize_tokens(self.centres, grid).flatten(1, 2))
        return attend(self.generation[1], join(prefix, guided), join(prefix, centres, image))  # (B, P+M, D)


def semantic_block(dim: int, num_heads: int, mlp_ratio: float, init_values: float, drop_path: float) -> Block:
    """Build an ordinary ViT block with LayerScale, to run on semantic tokens."""
    options: dict[str, Any] = {"init_values": init_values, "drop_path": drop_path, "norm_layer": LayerNorm}
    return Block(dim, num_heads, mlp_ratio, qkv_bias=True, **options)


def init_linear(module: nn.Module) -> None:
    """Initialise linear layers as ViT does: truncated normal weights of deviation 0.02, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def check_least(least: int, **options: int) -> None:
    """Refuse numbers below the least that makes sense.

    Raises:
        SettingError: naming the first of them.
    """
    for name, value in options.items():
        if value < least:
            raise SettingError(f"{name} is {value}, which is less than {least}", "encoder_options")


def split_layers(layers: int, unit: int | None) -> int:
    """Return how many units of `unit` layers make up `layers`; `None` stands for one unit of all of them.

    Raises:
        SettingError: the layers do not divide into units.
    """
    if unit is None:
        return 1
    if layers < 1 or unit < 1 or layers % unit:
        raise SettingError(f"{layers} layers do not divide into semantic units of {unit} layers", "encoder_options")
    return layers // unit


def split_prefix(x: Traced, num_prefix: int) -> tuple[Traced | None, Traced]:
    """Split tokens (B, P+T, D) into prefix tokens (B, P, D), `None` where there are none, and the others (B, T, D)."""
    return x.apply(lambda t: t[:, :num_prefix]) if num_prefix else None, x.apply(lambda t: t[:, num_prefix:])


def max_pool_tokens(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Take the largest value of each channel of a token map (B, h, w, D) in each cell of a grid: (B, r, c, D)."""
    return F.adaptive_max_pool2d(tokens.movedim(-1, 1), grid).movedim(1, -1)


def count_windows(size: Grid, grid: Grid, window: int) -> Grid:
    """Count the windows along each side of a map: as many as have `window` cells and divide the grid evenly.

    At 224 px the map is 14 x 14 and the grid is even, so that there are 2 x 2 windows of 7 x 7 cells, as in the paper.
    An odd grid has fewer, larger windows.
    """
    rows, columns = (
        max(n for n in range(1, max(cells // window, 1) + 1) if side % n == 0)
        for cells, side in zip(size, grid, strict=True)
    )
    return rows, columns


def cut_windows(tokens: torch.Tensor, windows: Grid, overlap: int = 0) -> torch.Tensor:
    """Cut a token map (B, h, w, D) into windows (B*W, T, D), each `overlap` cells longer than its share of the side.

    The windows lie evenly between the edges. At 14 x 14 cells, two windows a side and an overlap of 3, they have 10
    cells and start 4 cells apart: the neighbourhoods of the paper, without its stride, which fits no other size.
    """
    for dim, count in zip((1, 3), windows, strict=True):
        cells = tokens.shape[dim]
        length = min(cells, -(-cells // count) + overlap)
        starts = [i * (cells - length) // max(count - 1, 1) for i in range(count)]
        tokens = torch.stack([tokens.narrow(dim, start, length) for start in starts], dim)
    return tokens.transpose(2, 3).flatten(0, 2).flatten(1, 2)  # from (B, rows, T rows, columns, T columns, D)


def join_windows(tokens: torch.Tensor, windows: Grid, grid: Grid) -> torch.Tensor:
    """Put windows (B*W, M/W, D) back into a map (B, r, c, D): the inverse of `cut_windows` without overlap."""
    sides = grid[0] // windows[0], grid[1] // windows[1]
    tokens = tokens.unflatten(1, sides).unflatten(0, (-1, *windows))  # (B, rows, columns, r/rows, c/columns, D)
    return tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)
