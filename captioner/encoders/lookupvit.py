"""LookupViT: a few compressed tokens gather information from many (Koner et al., ECCV 2024, arXiv 2407.12753).

Letters: B batch, N lookup tokens (the patches), M compressed tokens (class token + g x g grid), D width, H heads,
d = D / H the width of a head, C image channels, (h, w) the lookup grid.

A block has two streams, each with its own norms and weights (section 3 of the paper):

1. information gathering       P <- P + W_o (A V_l),        A = softmax(Q_p K_l^T / sqrt(d))
2. representation refinement   P <- ordinary ViT block on P
3. global context infusion     L <- L + W_o' (A^T V_p)      the same A, transposed, not renormalised
4. lookup MLP                  L <- L + MLP(L)              hidden width D / 2

Steps 1 and 3 together are multi-head bidirectional cross-attention (MHBC). Each of its three projections on the N side
can be moved, exactly, to the M side ("absorbed"); `MHBC` takes whichever form costs fewer multiply-adds.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import nn

from captioner.encoders.base import PretrainedPart, TokenEncoder, TokenMaps, image_size
from captioner.encoders.from_vit import init_from_vit
from captioner.encoders.maps import cell_weights, resize_tokens
from captioner.encoders.mhbc import MHBC
from captioner.encoders.registry import create_timm, timm_config
from captioner.encoders.rollout import AttentionRecorder, mix, normalize, shares
from captioner.encoders.stems import NetworkStem, create_stem, init_stem
from captioner.errors import SettingError
from captioner.grids import Grid, parse_grid, write_grid

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class LookupBlock(nn.Module):
    """One LookupViT block on compressed tokens P and lookup tokens L; the last block does not update L."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        cross_heads: int | None = None,
        drop_path: float = 0.0,
        last: bool = False,
        absorb: bool | None = None,
    ):
        super().__init__()
        self.norm_compressed = LayerNorm(dim)
        self.norm_lookup = LayerNorm(dim)
        self.cross = MHBC(dim, cross_heads or num_heads, infuse=not last, absorb=absorb)
        self.refine = Block(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_layer=LayerNorm)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.last = last
        if not last:
            self.norm_refined = LayerNorm(dim)
            self.norm_lookup_mlp = LayerNorm(dim)
            self.lookup_mlp = Mlp(dim, int(dim * lookup_mlp_ratio))

    def forward(self, streams: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Update (P, L) of shapes (B, M, D) and (B, N, D)."""
        return self.update(*streams)[:2]

    def update(self, compressed: torch.Tensor, lookup: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Update P and L; returns both, and the attention A (B, H, M, N) by which P gathered from L."""
        read, attn = self.cross.gather(self.norm_compressed(compressed), self.norm_lookup(lookup))
        compressed = compressed + self.drop_path(read)
        compressed = self.refine(compressed)  # (B, M, D)
        if not self.last:
            lookup = lookup + self.drop_path(self.cross.infusion(self.norm_refined(compressed), attn))
            lookup = lookup + self.drop_path(self.lookup_mlp(self.norm_lookup_mlp(lookup)))  # (B, N, D)
        return compressed, lookup, attn


class LookupViT(TokenEncoder):
    """LookupViT, a timm image model whose output is a few compressed tokens.

    Args:
        img_size: training image size in pixels; any multiple of the patch works at call time.
        patch_size: patch side in pixels.
        stem: the layers that make lookup tokens from pixels: `patch` (one linear layer per patch, as in the paper),
            `conv` (three overlapping convolutions) or the timm name of a network, whose first stages are taken; see
            `create_stem`.
        stem_options: keyword arguments of that network.
        in_chans: image channels C.
        num_classes: classifier outputs; 0 for none.
        global_pool: what the classifier reads: `token` (the class token) or `avg` (the mean of the grid).
        embed_dim: width D.
        depth: number of blocks.
        num_heads: heads H of the refinement block.
        cross_heads: heads of MHBC; `None` for `num_heads`. Fewer make the absorbed form cheaper still.
        mlp_ratio: hidden width of the refinement MLP, in units of D.
        lookup_mlp_ratio: hidden width of the lookup MLP, in units of D (1/q, q = 2 in the paper).
        grid: default compressed grid; the positional embedding is stored at this size.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        absorb: see `MHBC`.

    Raises:
        ValueError: the stem, the heads or the pooling do not exist or do not fit.
    """

    chooses_grid = True
    has_dense_tokens = True
    map_name = "lookup grid"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stem: str = "patch",
        stem_options: dict | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        cross_heads: int | None = None,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        grid: Grid = (5, 5),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        absorb: bool | None = None,
    ):
        patch_embed = create_stem(stem, img_size, patch_size, in_chans, embed_dim, stem_options)
        grid = parse_grid(grid)
        super().__init__(embed_dim=embed_dim, num_prefix_tokens=1, stride=patch_embed.feat_ratio(), grid=grid)
        self.grad_checkpointing = False

        self.patch_embed: Any = patch_embed  # PatchEmbed or HybridEmbed of timm
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_lookup = nn.Parameter(torch.zeros(1, *self.patch_embed.grid_size, embed_dim))
        self.pos_compressed = nn.Parameter(torch.zeros(1, *grid, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                LookupBlock(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    lookup_mlp_ratio,
                    cross_heads,
                    drop_path=rates[i],
                    last=i == depth - 1,
                    absorb=absorb,
                )
                for i in range(depth)
            )
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.norm = LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as ViT does: truncated normal weights of deviation 0.02, zero biases."""
        for parameter in (self.pos_lookup, self.pos_compressed):
            trunc_normal_(parameter, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in (module for part in (self.blocks, self.head) for module in part.modules()):
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def largest_grid(self, image_size: tuple[int, int]) -> Grid:
        """Return the lookup grid (h, w) of an image of H x W pixels: no compressed grid can be larger.

        Raises:
            ValueError: the image is not a multiple of the patch.
        """
        patch = self.patch_embed.feat_ratio(as_scalar=False)
        if image_size[0] % patch[0] or image_size[1] % patch[1]:
            raise SettingError(
                f"image of {write_grid(image_size)} px is not a multiple of the patch, {write_grid(patch)} px",
                "image_size",
            )
        return image_size[0] // patch[0], image_size[1] // patch[1]

    def embed(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the two streams from pixels: compressed tokens (B, 1+g*g, D) and lookup tokens (B, N, D).

        Raises:
            ValueError: the image is not a multiple of the patch, or the grid is larger than the lookup grid.
        """
        grid = self.resolve_grid(grid, image_size(pixel_values))
        x = self.patch_embed(pixel_values)  # (B, h, w, D)
        lookup = x + resize_tokens(self.pos_lookup, x.shape[1:3])
        compressed = resize_tokens(x, grid) + resize_tokens(self.pos_compressed, grid)  # (B, g, g, D)
        cls_token = self.cls_token.expand(len(x), -1, -1).to(x.dtype)
        return torch.cat([cls_token, compressed.flatten(1, 2)], 1), lookup.flatten(1, 2)

    def forward_streams(self, x: torch.Tensor, grid: Grid | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pixels into normed compressed tokens (B, 1+g*g, D) and the last lookup tokens (B, N, D)."""
        streams = self.embed(x, grid)
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            compressed, lookup = checkpoint_seq(self.blocks, streams)
        else:
            compressed, lookup = self.blocks(streams)
        return self.norm(compressed), lookup

    def forward_tokens(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into normed compressed tokens (B, 1+g*g, D), the class token first."""
        return self.forward_streams(pixel_values, grid)[0]

    def forward_maps(self, pixel_values: torch.Tensor, grid: Grid | None = None, attention: bool = False) -> TokenMaps:
        """Encode pixels (B, C, H, W) into class token, compressed tokens and lookup tokens; see `TokenMaps`.

        Attention is rolled out through both streams, see `rollout.py`.
        """
        size = self.largest_grid(image_size(pixel_values))
        grid = self.check_grid(grid or self.grid, size)
        if attention:
            tokens, lookup, cells = self.roll_out(pixel_values, size, grid)
        else:
            tokens, lookup = self.forward_streams(pixel_values, grid)
            cells = None
        return self.lay_out(tokens, grid)._replace(dense=lookup.unflatten(1, size), attention=cells)

    def roll_out(
        self, pixel_values: torch.Tensor, size: Grid, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode pixels as `forward_streams`; also returns the shares of cells in compressed tokens (B, M, h, w)."""
        compressed, lookup = self.embed(pixel_values, grid)
        resize = cell_weights(resize_tokens, size, grid, lookup)  # (g*g, N)
        rows = torch.cat([torch.zeros_like(resize[:1]), resize]).expand(len(lookup), -1, -1)  # (B, M, N)
        lookup_rows = torch.eye(len(resize.T), dtype=resize.dtype, device=resize.device).expand(len(lookup), -1, -1)
        for block in self.blocks:
            with AttentionRecorder() as recorder:
                compressed, lookup, attn = block.update(compressed, lookup)
            attn = attn.to(rows.dtype).mean(1)  # (B, M, N)
            rows = mix(rows, attn, lookup_rows)
            rows = mix(rows, recorder.maps[-1], rows)  # the block attends to itself last
            if not block.last:
                lookup_rows = mix(lookup_rows, shares(attn), rows)  # (B, N, N)
        return self.norm(compressed), lookup, normalize(rows).unflatten(-1, size)

    @property
    def pretrained_part(self) -> PretrainedPart | None:
        """The stem, if it is cut from a network."""
        stem = self.patch_embed
        return PretrainedPart(stem.name, stem.options, stem.backbone) if isinstance(stem, NetworkStem) else None

    def init_from(
        self,
        source: str | nn.Module,
        mean: Sequence[float] | torch.Tensor | None = None,
        std: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Start from a ViT (see `init_from_vit`); with a stem cut from a network, from that network (see `init_stem`).

        Raises:
            ValueError: the weights cannot be loaded or do not fit.
        """
        if not isinstance(self.patch_embed, NetworkStem):
            return init_from_vit(self, source)
        network: Any = create_timm("network", source, pretrained=True) if isinstance(source, str) else source
        mean = network.pretrained_cfg["mean"] if mean is None else mean
        std = network.pretrained_cfg["std"] if std is None else std
        init_stem(self.patch_embed, network, self.default_cfg, mean, std)

    def optimize_for_inference(self, dtype: torch.dtype = torch.float32) -> TokenEncoder:
        """Return a copy; the batch norms of a stem that is cut from a network are folded. See the base class."""
        fast = super().optimize_for_inference(dtype)
        if isinstance(self.patch_embed, NetworkStem):
            stem = self.patch_embed.optimize_for_inference(torch.zeros(1, *self.default_cfg["input_size"]), dtype)
            if stem is not self.patch_embed:
                fast = copy.copy(fast)
                fast._modules = {**fast._modules, "patch_embed": stem.to(dtype)}
        return fast

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether each block is recomputed in the backward pass, which takes time and saves memory."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay, in addition to vectors."""
        return {"cls_token", "pos_lookup", "pos_compressed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Group parameters by depth, for timm's layer-wise learning rates."""
        return {"stem": r"^cls_token|pos_|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> LookupViT:
    if (stem := kwargs.get("stem", "patch")) != "patch":
        overlay = {"first_conv": "patch_embed.backbone.0.conv" if stem == "conv" else None}
        kwargs["pretrained_cfg_overlay"] = overlay | (kwargs.get("pretrained_cfg_overlay") or {})
    return build_model_with_cfg(LookupViT, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs(
    {f"lookupvit_{size}_patch16_224": timm_config() for size in ("tiny", "small", "base", "large")}
)


@register_model
def lookupvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-Ti/16: width 192, 12 blocks, 3 heads."""
    return _create(
        "lookupvit_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs}
    )


@register_model
def lookupvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-S/16: width 384, 12 blocks, 6 heads."""
    return _create(
        "lookupvit_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs}
    )


@register_model
def lookupvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-B/16: width 768, 12 blocks, 12 heads."""
    return _create(
        "lookupvit_base_patch16_224", pretrained, **{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs}
    )


@register_model
def lookupvit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-L/16: width 1024, 24 blocks, 16 heads."""
    return _create(
        "lookupvit_large_patch16_224", pretrained, **{"embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs}
    )
