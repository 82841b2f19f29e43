"""Maps of tokens (B, h, w, D): resized, pooled, and which cells of the map a token stands for.

Letters: B batch, (h, w) the map, (r, c) a grid of rows and columns, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from captioner.grids import Grid


def resize_tokens(tokens: torch.Tensor, size: Grid) -> torch.Tensor:
    """Resize a token map (B, h, w, D) bilinearly to (B, *size, D)."""
    if tuple(tokens.shape[1:3]) == tuple(size):
        return tokens
    return F.interpolate(tokens.movedim(-1, 1), size=tuple(size), mode="bilinear").movedim(1, -1)


def pool_tokens(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Average a token map (B, h, w, D) within the cells of a grid, to (B, r, c, D)."""
    return F.adaptive_avg_pool2d(tokens.movedim(-1, 1), grid).movedim(1, -1)


def cell_weights(
    change: Callable[[torch.Tensor, Grid], torch.Tensor], size: Grid, grid: Grid, like: torch.Tensor
) -> torch.Tensor:
    """Return by which weights a linear change of maps makes each of its tokens from the cells, (r*c, h*w).

    Args:
        change: `resize_tokens` or `pool_tokens`.
        size: the map's size (h, w).
        grid: the size (r, c) it is changed to.
        like: a tensor on the device wanted, in the precision wanted or a lower one.
    """
    cells = size[0] * size[1]
    precision = torch.promote_types(like.dtype, torch.float32)
    each = torch.eye(cells, dtype=precision, device=like.device).view(1, *size, cells)
    return change(each, grid).flatten(0, 2)
