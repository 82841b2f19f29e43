"""STViT and STViT-R in their local form, a Swin whose third stage runs on semantic tokens (Chang et al., CVPR 2023).

Letters: B batch, C image channels, H W pixels, D width of a stage, (h, w) its map, (r, c) the grid returned.

Stages 1 and 2 are those of Swin (Liu et al., ICCV 2021), at strides of 4 and 8 pixels. In stage 3, at stride 16, each
window is max-pooled to a few cluster centres, which attend to themselves and to the overlapping neighbourhood of their
window; then the centres of all windows attend to the whole map (`semantic.py`). At 224 px, 2 x 2 windows of 7 x 7 cells
with 3 x 3 centres each make 36 semantic tokens. STViT-R recovers the map of stage 3 from them.

Stage 4 merges 2 x 2 tokens into one, as Swin does: a grid of r x c tokens comes from 2r x 2c semantic tokens. It runs
on semantic tokens with global attention (STViT), or on the recovered map with that of Swin (STViT-R).
Section 3.3 (local form) and 3.4 (STViT-R) of arXiv 2303.08685.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging, SwinTransformerStage, window_partition, window_reverse
from torch import nn

from captioner.encoders.maps import pool_tokens
from captioner.encoders.rollout import AttentionRecorder, mix
from captioner.encoders.semantic import SemanticUnit, init_linear, semantic_block, split_layers
from captioner.encoders.semantic_encoder import DEFAULT_CFG, SemanticEncoder
from captioner.encoders.traced import Traced, refine
from captioner.errors import SettingError
from captioner.grids import Grid, parse_grid, write_grid


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
            *(dim // 2 if merge else dim, dim, before, len(drop_path), merge, num_heads),
            **{"window_size": window, "dynamic_mask": True, "mlp_ratio": mlp_ratio, "drop_path": list(drop_path)},
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


class STViTSwin(SemanticEncoder):
    """STViT in its local form, a timm image model without a class token.

    Args:
        img_size: training image size in pixels; any multiple of 32 (8 patches) works at call time, if it has a window.
        patch_size: patch side in pixels.
        in_chans: image channels C.
        num_classes: classifier outputs; 0 for none.
        global_pool: what the classifier reads: `avg`, the mean of the grid.
        embed_dim: width of stage 1; each further stage is twice as wide.
        depths: layers of the four stages.
        num_heads: attention heads of the four stages.
        window_size: side of a window in cells.
        overlap: cells by which the neighbourhood of a window is longer than the window, on each axis.
        mlp_ratio: hidden width of the MLPs, in units of the width.
        image_layers: Swin's layers in stage 3 before each generation of semantic tokens.
        unit_layers: layers of stage 3 from one of these to the recovery of the image tokens (STViT-R), all included;
            `None` never recovers them (STViT).
        grid: grid of tokens used when a call names none; the global centres are stored at twice its sides.
        init_values: the factor by which LayerScale multiplies each branch of the semantic layers at first.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last layer, growing linearly from 0 at the first.

    Raises:
        SettingError: the layers of stage 3 do not divide into units or are too few, or images of `img_size` have no
            window.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        overlap: int = 3,
        mlp_ratio: float = 4.0,
        image_layers: int = 2,
        unit_layers: int | None = None,
        grid: Grid = (3, 3),
        init_values: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if len(depths) != 4 or len(num_heads) != 4:
            raise SettingError(
                f"depths {tuple(depths)} and num_heads {tuple(num_heads)} must each have 4 numbers, one for each stage",
                "encoder_options",
            )
        grid = parse_grid(grid)
        dims = [embed_dim * 2**i for i in range(4)]
        super().__init__(embed_dim=dims[-1], num_prefix_tokens=0, stride=8 * patch_size, grid=grid)
        self.patch_size, self.window_size = patch_size, window_size
        self.recovers = self.has_dense_tokens = unit_layers is not None
        rows, columns = self.largest_grid(to_2tuple(img_size))
        sizes = [(rows * 2**i, columns * 2**i) for i in (3, 2, 1, 0)]
        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        rates = [rates[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(4)]

        def swin(i: int, rates: Sequence[float], merge: bool) -> SwinStage:
            return SwinStage(dims[i], num_heads[i], rates, window_size, sizes[i], merge, mlp_ratio)

        count = split_layers(depths[2], unit_layers)
        length = depths[2] // count
        parts: list[nn.Module] = []
        for start in range(0, depths[2], length):
            parts.append(swin(2, rates[2][start : start + image_layers], merge=start == 0))
            parts.append(
                SemanticUnit(
                    *(dims[2], num_heads[2], rates[2][start + image_layers : start + length]),
                    **{"grid": (2 * grid[0], 2 * grid[1]), "window": window_size, "overlap": overlap},
                    **{"recover": self.recovers, "mlp_ratio": mlp_ratio, "init_values": init_values},
                )
            )
        if self.recovers:
            last: nn.Module = swin(3, rates[3], merge=True)
        else:
            last = MergedStage(dims[3], num_heads[3], rates[3], mlp_ratio, init_values)
        self.patch_embed = PatchEmbed(
            *(img_size, patch_size, in_chans, embed_dim, nn.LayerNorm),
            **{"output_fmt": "NHWC", "flatten": False, "strict_img_size": False},
        )
        stages = [swin(0, rates[0], merge=False), swin(1, rates[1], merge=True), SemanticStage(parts), last]
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": dims[i], "reduction": patch_size * 2**i} for i in range(4)
        ]
        self.norm = nn.LayerNorm(dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        init_linear(self.head)
        for stage in stages:
            stage.init_weights()

    def largest_grid(self, image_size: tuple[int, int]) -> Grid:
        """Return the map of cells (h, w) of stage 4: no grid can be larger.

        Raises:
            SettingError: the image is not a multiple of the stride, or has not a whole window in stage 3.
        """
        cells = super().largest_grid(image_size)
        if 2 * min(cells) < self.window_size:
            raise SettingError(
                f"image of {write_grid(image_size)} px has {write_grid(2 * side for side in cells)} cells in stage 3, "
                f"fewer than a window of {write_grid((self.window_size, self.window_size))}",
                *("image_size", "encoder_options"),
            )
        return cells

    def embed(self, pixel_values: torch.Tensor, size: Grid, attention: bool) -> tuple[Traced, Grid]:
        """Make the tokens of patches (B, N, D) from pixels (B, C, H, W)."""
        tokens = self.patch_embed(pixel_values)  # (B, 8h, 8w, D)
        x = Traced(tokens, self.cell_rows(pixel_values, size, 8, attention))
        return x.apply(lambda t: t.flatten(1, 2)), (tokens.shape[1], tokens.shape[2])

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that an optimiser leaves undecayed, beside vectors."""
        kinds = ("relative_position_bias_table", "centres")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Group parameters by depth, for timm's layer-wise learning rates."""
        return {"stem": r"^patch_embed", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (9999,))]}


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


_NAMES = ("stvit_swin_tiny", "stvit_swin_small", "stvit_swin_base")
_NAMES += ("stvitr_swin_tiny", "stvitr_swin_small", "stvitr_swin_base")
default_cfgs = generate_default_cfgs({f"{name}_patch4_window7_224": dict(DEFAULT_CFG) for name in _NAMES})

_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_RECOVER: dict[str, Any] = {"unit_layers": 6, "image_layers": 1}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> STViTSwin:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(STViTSwin, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def stvit_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT on Swin-T: widths 96 to 768, layers 2, 2, 6, 2."""
    return _create("stvit_swin_tiny_patch4_window7_224", pretrained, **kwargs)


@register_model
def stvit_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT on Swin-S: widths 96 to 768, layers 2, 2, 18, 2."""
    return _create("stvit_swin_small_patch4_window7_224", pretrained, **{**_SMALL, **kwargs})


@register_model
def stvit_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT on Swin-B: widths 128 to 1024, layers 2, 2, 18, 2."""
    return _create("stvit_swin_base_patch4_window7_224", pretrained, **{**_BASE, **kwargs})


@register_model
def stvitr_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-R on Swin-T: stage 3 is one unit, which has no layer of Swin so that it saves 30% of the FLOPs."""
    options = {**_RECOVER, "image_layers": 0, **kwargs}
    return _create("stvitr_swin_tiny_patch4_window7_224", pretrained, **options)


@register_model
def stvitr_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-R on Swin-S: stage 3 is three units, each of which starts with a layer of Swin."""
    return _create("stvitr_swin_small_patch4_window7_224", pretrained, **{**_SMALL, **_RECOVER, **kwargs})


@register_model
def stvitr_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-R on Swin-B: stage 3 is three units, each of which starts with a layer of Swin."""
    return _create("stvitr_swin_base_patch4_window7_224", pretrained, **{**_BASE, **_RECOVER, **kwargs})
