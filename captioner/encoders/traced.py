"""Tokens that carry with them where they come from, so that one forward pass serves encoding and attention rollout.

Each token has a row over the cells of the image, see `rollout.py`. Without a request for attention there are no rows,
and the functions below compute tokens alone.

Letters: B batch, T tokens, S source tokens, D width, X cells of the image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from captioner.encoders.rollout import AttentionRecorder, mix, normalize
from captioner.grids import Grid


class Traced(NamedTuple):
    """Tokens, and the cells that each of them comes from."""

    tokens: torch.Tensor
    """Tokens (..., D)."""
    rows: torch.Tensor | None = None
    """Their rows over the cells (..., X), of the same leading shape; `None` without a request for attention."""

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Traced":
        """Rearrange tokens and rows alike."""
        return Traced(change(self.tokens), None if self.rows is None else change(self.rows))

    def with_tokens(self, tokens: torch.Tensor) -> "Traced":
        """Return other tokens that come from the same cells."""
        return Traced(tokens, self.rows)

    def attention(self, size: Grid) -> torch.Tensor | None:
        """Return the rows as maps (..., h, w) that each sum to 1."""
        return None if self.rows is None else normalize(self.rows).unflatten(-1, size)


def join(*parts: Traced | None) -> Traced:
    """Concatenate tokens (B, T, D); parts that are `None` are left out."""
    present = [part for part in parts if part is not None]
    rows = [part.rows for part in present if part.rows is not None]
    return Traced(torch.cat([part.tokens for part in present], 1), torch.cat(rows, 1) if rows else None)


def own_cells(like: torch.Tensor, size: Grid, repeat: int = 1) -> torch.Tensor:
    """Return rows (B, h * repeat, w * repeat, h * w) of a map in which each token is its own cell.

    Args:
        like: a tensor of the batch, on the device and in the precision of the rows or in a lower one.
        size: the cells (h, w).
        repeat: tokens along each side of a cell.
    """
    precision = torch.promote_types(like.dtype, torch.float32)
    rows = torch.eye(size[0] * size[1], dtype=precision, device=like.device).unflatten(0, size)
    rows = rows.repeat_interleave(repeat, 0).repeat_interleave(repeat, 1)
    return rows.expand(len(like), -1, -1, -1)


def refine(block: nn.Module, x: Traced) -> Traced:
    """Run a block of self-attention on tokens (B, T, D)."""
    if x.rows is None:
        return Traced(block(x.tokens))
    with AttentionRecorder() as recorder:
        tokens = block(x.tokens)
    return Traced(tokens, mix(x.rows, recorder.maps[-1], x.rows))


def attend(block: Any, x: Traced, source: Traced) -> Traced:
    """Run a block in which tokens (B, T, D) attend to source tokens (B, S, D).

    Args:
        block: returns the tokens and its attention (B, H, T, S), as `CrossBlock` does.
        x: the tokens.
        source: the source tokens.
    """
    tokens, attention = block(x.tokens, source.tokens)
    if x.rows is None or source.rows is None:
        return Traced(tokens)
    return Traced(tokens, mix(x.rows, attention.to(x.rows.dtype).mean(1), source.rows))
