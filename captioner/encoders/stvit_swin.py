"""STViT and STViT-R in their local form, a Swin whose third stage runs on semantic tokens (Chang et al., CVPR 2023).

Letters: B batch, C image channels, H W pixels, D width of a stage, (h, w) its map, (r, c) the grid returned.

Stages 1 and 2 are those of Swin (Liu et al., ICCV 2021), at strides of 4 and 8 pixels. In stage 3, at stride 16, each
window is max-pooled to a few cluster centres, which attend to themselves and to the overlapping neighbourhood of their
window; then the centres of all windows attend to the whole map (`semantic.py`). At 224 px, 2 x 2 windows of 7 x 7 cells
with 3 x 3 centres each make 36 semantic tokens. STViT-R recovers the map of stage 3 from them.

Stage 4 merges 2 x 2 tokens into one, as Swin does: a grid of r x c tokens comes from 2r x 2c semantic tokens. It runs
on semantic tokens with global attention (STViT), or on the recovered map with that of Swin (STViT-R).
See section 3 of arXiv 2303.08685.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from captioner.encoders.semantic import SemanticUnit, check_least, init_linear, split_layers
from captioner.encoders.semantic_encoder import DEFAULT_CFG, SemanticEncoder
from captioner.encoders.semantic_init import init_from_swin
from captioner.encoders.swin_stages import MergedStage, SemanticStage, SwinStage
from captioner.encoders.traced import Traced, own_cells
from captioner.errors import SettingError
from captioner.grids import Grid, parse_grid, write_grid


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
        unit_layers: layers of stage 3 from the first of these to the recovery of the image tokens, both included
            (STViT-R); `None` never recovers them (STViT).
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
        check_least(0, image_layers=image_layers, overlap=overlap)
        check_least(1, window_size=window_size, patch_size=patch_size)
        grid = parse_grid(grid)
        dims = [embed_dim * 2**i for i in range(4)]
        super().__init__(embed_dim=dims[-1], num_prefix_tokens=0, stride=8 * patch_size, grid=grid)
        self.patch_size, self.window_size = patch_size, window_size
        self.recovers = self.has_dense_tokens = unit_layers is not None
        rows, columns = self.largest_grid(to_2tuple(img_size))
        sizes = [(rows * 2**i, columns * 2**i) for i in (3, 2, 1, 0)]
        total = sum(depths)
        grown = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        rates = [grown[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(4)]

        def swin(i: int, rates: Sequence[float], merge: bool) -> SwinStage:
            return SwinStage(dims[i], num_heads[i], rates, window_size, sizes[i], merge, mlp_ratio)

        length = depths[2] // split_layers(depths[2], unit_layers)
        parts: list[nn.Module] = []
        for start in range(0, max(depths[2], 1), max(length, 1)):
            parts.append(swin(2, rates[2][start : start + image_layers], merge=start == 0))
            parts.append(
                SemanticUnit(
                    dims[2],
                    num_heads[2],
                    drop_path=rates[2][start + image_layers : start + length],
                    grid=(2 * grid[0], 2 * grid[1]),
                    window=window_size,
                    overlap=overlap,
                    recover=self.recovers,
                    mlp_ratio=mlp_ratio,
                    init_values=init_values,
                )
            )
        if self.recovers:
            last: nn.Module = swin(3, rates[3], merge=True)
        else:
            last = MergedStage(dims[3], num_heads[3], rates[3], mlp_ratio, init_values)
        formats: dict[str, Any] = {"output_fmt": "NHWC", "flatten": False, "strict_img_size": False}
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, nn.LayerNorm, **formats)
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
            SettingError: the image is not a multiple of the stride, or has no whole window in stage 3.
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
        x = Traced(tokens, own_cells(pixel_values, size, repeat=8) if attention else None)
        return x.apply(lambda t: t.flatten(1, 2)), (tokens.shape[1], tokens.shape[2])

    def init_from(
        self,
        source: str | nn.Module,
        mean: Sequence[float] | torch.Tensor | None = None,
        std: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Start from a Swin, see `init_from_swin`.

        Raises:
            SettingError: the weights cannot be loaded or do not fit.
        """
        init_from_swin(self, source, mean, std)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that an optimiser leaves undecayed, beside vectors."""
        kinds = ("relative_position_bias_table", "centres")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Group parameters by depth, for timm's layer-wise learning rates."""
        return {"stem": r"^patch_embed", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (9999,))]}


default_cfgs = generate_default_cfgs(
    {
        f"{kind}_swin_{size}_patch4_window7_224": dict(DEFAULT_CFG)
        for kind in ("stvit", "stvitr")
        for size in ("tiny", "small", "base")
    }
)

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
