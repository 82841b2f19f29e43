"""STViT and STViT-R in their global form, a DeiT that runs mostly on 16 semantic tokens (Chang et al., CVPR 2023).

Letters: B batch, C channels, H W pixels, N = h * w patches, M = r * c semantic tokens, D width.

The first layers are those of a ViT. Then semantic tokens are generated (`semantic.py`), and all later layers run on
them and the class token alone. STViT-R recovers the patches from them, and generates and recovers every few layers.
See section 3 of arXiv 2303.08685.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import nn

from captioner.encoders.maps import resize_tokens
from captioner.encoders.semantic import LayerNorm, SemanticUnit, check_least, init_linear, split_layers
from captioner.encoders.semantic_encoder import DEFAULT_CFG, SemanticEncoder
from captioner.encoders.semantic_init import init_from_deit
from captioner.encoders.traced import Traced, own_cells, refine
from captioner.grids import Grid, parse_grid


class ImageLayer(nn.Module):
    """One ordinary ViT block, on the class token and all patches."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.block = Block(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_layer=LayerNorm)

    def init_weights(self) -> None:
        """Initialise as ViT does."""
        init_linear(self)

    def forward(self, x: Traced, size: Grid, grid: Grid) -> tuple[Traced, Grid]:
        """Update tokens (B, 1+N, D)."""
        return refine(self.block, x), size


class STViT(SemanticEncoder):
    """STViT in its global form, a timm image model.

    Args:
        img_size: training image size in pixels; any multiple of the patch works at call time.
        patch_size: patch side in pixels.
        in_chans: image channels C.
        num_classes: classifier outputs; 0 for none.
        global_pool: what the classifier reads: `token` (the class token) or `avg` (the mean of the grid).
        embed_dim: width D.
        depth: number of layers.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs, in units of D.
        image_layers: ordinary layers before the first semantic tokens.
        unit_layers: layers from one generation of semantic tokens to the recovery of the image tokens, both included
            (STViT-R); `None` never recovers them (STViT).
        grid: grid of semantic tokens used when a call names none; the global centres are stored at this size.
        init_values: the factor by which LayerScale multiplies each branch of the semantic layers at first.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last layer, growing linearly from 0 at the first.

    Raises:
        SettingError: the layers do not divide into units, or are too few.
        ValueError: the heads or the pooling do not fit.
    """

    map_name = "patch grid"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        image_layers: int = 4,
        unit_layers: int | None = None,
        grid: Grid = (4, 4),
        init_values: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        check_least(0, image_layers=image_layers)
        check_least(1, patch_size=patch_size)
        grid = parse_grid(grid)
        super().__init__(embed_dim=embed_dim, num_prefix_tokens=1, stride=patch_size, grid=grid)
        self.recovers = self.has_dense_tokens = unit_layers is not None
        formats: dict[str, Any] = {"output_fmt": "NHWC", "flatten": False, "strict_img_size": False}
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, **formats)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, *self.patch_embed.grid_size, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        images = [ImageLayer(embed_dim, num_heads, mlp_ratio, rate) for rate in rates[:image_layers]]
        later = rates[image_layers:]
        length = len(later) // split_layers(len(later), unit_layers)
        units = [
            SemanticUnit(
                embed_dim,
                num_heads,
                drop_path=later[start : start + length],
                grid=grid,
                num_prefix=1,
                recover=self.recovers,
                mlp_ratio=mlp_ratio,
                init_values=init_values,
            )
            for start in range(0, max(len(later), 1), max(length, 1))
        ]
        self.stages = nn.ModuleList([*images, *units])
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(len(self.stages))
        ]
        self.norm = LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as ViT does: truncated normal weights of deviation 0.02, zero biases."""
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        init_linear(self.head)
        for stage in self.stages:
            stage.init_weights()

    def embed(self, pixel_values: torch.Tensor, size: Grid, attention: bool) -> tuple[Traced, Grid]:
        """Make the class token and the patches (B, 1+N, D) from pixels (B, C, H, W)."""
        x = self.patch_embed(pixel_values) + resize_tokens(self.pos_embed, size)  # (B, h, w, D)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x.flatten(1, 2)], 1)
        rows = None
        if attention:  # the class token has seen no cell yet
            rows = own_cells(pixel_values, size)
            rows = torch.cat([torch.zeros_like(rows[:, 0, :1]), rows.flatten(1, 2)], 1)
        return Traced(tokens, rows), size

    def init_from(
        self,
        source: str | nn.Module,
        mean: Sequence[float] | torch.Tensor | None = None,
        std: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Start from a ViT or DeiT, see `init_from_deit`.

        Raises:
            SettingError: the weights cannot be loaded or do not fit.
        """
        init_from_deit(self, source, mean, std)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that an optimiser leaves undecayed, beside vectors."""
        centres = {name for name, _ in self.named_parameters() if name.endswith(".centres")}
        return {"cls_token", "pos_embed"} | centres

    def group_matcher(self, coarse: bool = False) -> dict:
        """Group parameters by depth, for timm's layer-wise learning rates."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (9999,))]}


default_cfgs = generate_default_cfgs(
    {
        f"{name}_patch16_224": dict(DEFAULT_CFG)
        for name in ("stvit_tiny", "stvit_small", "stvit_base", "stvitr_tiny", "stvitr_small", "stvitr_base")
    }
)

_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
_RECOVER = {"unit_layers": 4}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> STViT:
    return build_model_with_cfg(
        STViT, variant, pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **kwargs
    )


@register_model
def stvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT on DeiT-Ti: width 192, 12 layers, 3 heads."""
    return _create("stvit_tiny_patch16_224", pretrained, **{**_SIZES["tiny"], **kwargs})


@register_model
def stvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT on DeiT-S: width 384, 12 layers, 6 heads."""
    return _create("stvit_small_patch16_224", pretrained, **{**_SIZES["small"], **kwargs})


@register_model
def stvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT on DeiT-B: width 768, 12 layers, 12 heads."""
    return _create("stvit_base_patch16_224", pretrained, **{**_SIZES["base"], **kwargs})


@register_model
def stvitr_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT-R on DeiT-Ti: 4 ordinary layers, then 2 units of 4 layers."""
    return _create("stvitr_tiny_patch16_224", pretrained, **{**_SIZES["tiny"], **_RECOVER, **kwargs})


@register_model
def stvitr_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT-R on DeiT-S: 4 ordinary layers, then 2 units of 4 layers."""
    return _create("stvitr_small_patch16_224", pretrained, **{**_SIZES["small"], **_RECOVER, **kwargs})


@register_model
def stvitr_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT-R on DeiT-B: 4 ordinary layers, then 2 units of 4 layers."""
    return _create("stvitr_base_patch16_224", pretrained, **{**_SIZES["base"], **_RECOVER, **kwargs})
