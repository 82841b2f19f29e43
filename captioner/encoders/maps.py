"""Maps of tokens (B, h, w, D): resize them, pool them, and find which cells of the map make a token.

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
    """Return the weights (r*c, h*w) by which a linear function of maps makes each of its tokens from the cells.

    Args:
        change: the function, `resize_tokens` or `pool_tokens`.
        size: size of its input (h, w).
        grid: size of its output (r, c).
        like: a tensor on the device of the weights; they have its precision, but at least float32.
    """
    cells = size[0] * size[1]
    precision = torch.promote_types(like.dtype, torch.float32)
    each = torch.eye(cells, dtype=precision, device=like.device).view(1, *size, cells)
    return change(each, grid).flatten(0, 2)
