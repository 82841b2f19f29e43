"""The stages of STViT's local form: Swin's own, stage 3 with semantic tokens, and stage 4 on semantic tokens alone.

Letters: B batch, D width after the stage, (h, w) the map before it, (r, c) the grid that the encoder returns, X cells
of the image, W windows, T tokens of a window.

Every stage maps tokens (B, T, D), the size of their map and the grid to its own tokens and the size of theirs.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, SwinTransformerStage, window_partition, window_reverse
from torch import nn

from captioner.encoders.maps import pool_tokens
from captioner.encoders.rollout import AttentionRecorder, mix
from captioner.encoders.semantic import init_linear, semantic_block
from captioner.encoders.traced import Traced, refine
from captioner.grids import Grid


class SwinStage(nn.Module):
    """Swin's own stage: patch merging, where `merge` is true, then blocks of attention within shifted windows.

    Args:
        dim: width D after the stage.
        num_heads: attention heads.
        drop_path: rate of stochastic depth of each block.
        window: side of a window in cells.
        size: the stage's map for images of the encoder's own size; a smaller map than a window is one window.
        merge: whether 2 x 2 tokens of half the width are merged into one first.
        mlp_ratio: hidden width of the MLPs, in units of D.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: Sequence[float],
        window: int,
        size: Grid,
        merge: bool,
        mlp_ratio: float,
    ):
        super().__init__()
        before = tuple(2 * side for side in size) if merge else size
        self.stage = SwinTransformerStage(
            dim // 2 if merge else dim,
            dim,
            before,
            len(drop_path),
            downsample=merge,
            num_heads=num_heads,
            window_size=window,
            dynamic_mask=True,
            mlp_ratio=mlp_ratio,
            drop_path=list(drop_path),
        )

    def init_weights(self) -> None:
        """Initialise as Swin does."""
        init_linear(self)

    def forward(self, x: Traced, size: Grid, grid: Grid) -> tuple[Traced, Grid]:
        """Turn tokens (B, h*w, D/2) into (B, h*w/4, D), or without merging into (B, h*w, D)."""
        x = x.apply(lambda t: t.unflatten(1, size))
        x = merge_patches(self.stage.downsample, x)
        for block in self.stage.blocks:
            x = run_swin_block(block, x)
        size = (x.tokens.shape[1], x.tokens.shape[2])
        return x.apply(lambda t: t.flatten(1, 2)), size


class SemanticStage(nn.Module):
    """Stage 3: Swin's patch merging and blocks on image tokens, then semantic tokens, once or several times.

    Args:
        parts: a `SwinStage`, a `SemanticUnit`, and so on.
    """

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def init_weights(self) -> None:
        """Initialise every part."""
        for part in self.parts:
            part.init_weights()

    def forward(self, x: Traced, size: Grid, grid: Grid) -> tuple[Traced, Grid]:
        """Turn tokens (B, h*w, D/2) into semantic tokens (B, 2r*2c, D), or into image tokens again (B, h*w/4, D)."""
        for part in self.parts:
            x, size = part(x, size, (2 * grid[0], 2 * grid[1]))
        return x, size


class MergedStage(nn.Module):
    """Stage 4 on semantic tokens: patch merging, then ViT blocks.

    Args:
        dim: width D after the stage.
        num_heads: attention heads.
        drop_path: rate of stochastic depth of each block.
        mlp_ratio: hidden width of the MLPs, in units of D.
        init_values: the factor by which LayerScale multiplies each branch at first.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: Sequence[float], mlp_ratio: float, init_values: float):
        super().__init__()
        self.downsample = PatchMerging(dim // 2)
        self.blocks = nn.ModuleList(semantic_block(dim, num_heads, mlp_ratio, init_values, rate) for rate in drop_path)

    def init_weights(self) -> None:
        """Initialise as ViT does."""
        init_linear(self)

    def forward(self, x: Traced, size: Grid, grid: Grid) -> tuple[Traced, Grid]:
        """Turn semantic tokens (B, 2r*2c, D/2) into the tokens of the grid (B, r*c, D)."""
        x = merge_patches(self.downsample, x.apply(lambda t: t.unflatten(1, size)))
        x = x.apply(lambda t: t.flatten(1, 2))
        for block in self.blocks:
            x = refine(block, x)
        return x, grid


def merge_patches(merging: nn.Module, x: Traced) -> Traced:
    """Merge 2 x 2 tokens of a map (B, h, w, D) into one, (B, h/2, w/2, 2D); an `Identity` merges nothing."""
    tokens = merging(x.tokens)
    half = (tokens.shape[1], tokens.shape[2])
    return Traced(tokens, None if x.rows is None else pool_tokens(x.rows, half))


def run_swin_block(block: Any, x: Traced) -> Traced:
    """Run a block of timm's Swin on a map (B, h, w, D); rows are shifted, cut into windows and mixed as tokens are."""
    if x.rows is None:
        return Traced(block(x.tokens))
    with AttentionRecorder() as recorder:
        tokens = block(x.tokens)
    (height, width), (down, right) = x.rows.shape[1:3], block.shift_size
    rows = x.rows.roll((-down, -right), (1, 2))
    rows = F.pad(rows, (0, 0, 0, -width % block.window_size[1], 0, -height % block.window_size[0]))
    padded = (rows.shape[1], rows.shape[2])
    parts = window_partition(rows, block.window_size).flatten(1, 2)  # (B*W, T, X)
    parts = mix(parts, recorder.maps[-1], parts).unflatten(1, block.window_size)
    rows = window_reverse(parts, block.window_size, *padded)[:, :height, :width]
    return Traced(tokens, rows.roll((down, right), (1, 2)))
