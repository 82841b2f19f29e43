"""A ViT taken apart: its embedding, its blocks and its norm, for encoders that run them in another way.

Dosovitskiy et al., ICLR 2021, arXiv 2010.11929. The layers are timm's, and so are the names of their weights.

Letters: B batch, C image channels, H W pixels, (h, w) the map of patches of the whole image, N tokens: p prefix tokens
(class token, registers) and the patches, D width, (r, c) a grid of tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from captioner.encoders.base import TokenEncoder, TokenMaps
from captioner.encoders.maps import pool_tokens
from captioner.encoders.registry import create_timm, timm_config
from captioner.errors import SettingError
from captioner.grids import Grid, write_grid

Place = tuple[int, int]
"""Row and column of the upper left cell of a part of an image."""

VIT_CFG = timm_config(first_conv="vit.patch_embed.proj")
"""timm configuration of an encoder that is a `ViTEncoder`."""


class ViTEncoder(TokenEncoder):
    """Base class of encoders that hold a ViT and run its blocks in a way of their own.

    All patches leave the encoder as tokens; a call with a grid gets them average-pooled.

    Args:
        img_size: training image size in pixels; any multiple of the patch works at call time.
        patch_size: patch side in pixels.
        in_chans: image channels C.
        num_classes: classifier outputs; 0 for none.
        global_pool: what the classifier reads: `token` (the class token) or `avg` (the mean of the patches).
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP, in units of D.
        init_values: first value of LayerScale; `None` for no LayerScale.
        reg_tokens: number of register tokens.
        no_embed_class: whether the prefix tokens have no positional embedding.
        pre_norm: whether the embedding ends in a norm, as in CLIP.
        grid: the grid (r, c) that a call without one gets; `None` returns all patches.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: there is no such pooling.
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
        init_values: float | None = None,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        grid: Grid | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(embed_dim=embed_dim, num_prefix_tokens=1 + reg_tokens, stride=patch_size, grid=grid)
        self.vit: Any = VisionTransformer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            init_values=init_values,
            reg_tokens=reg_tokens,
            no_embed_class=no_embed_class,
            pre_norm=pre_norm,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
        )
        self.grad_checkpointing = False
        self.feature_info = [
            {"module": f"vit.blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def largest_grid(self, image_size: tuple[int, int]) -> Grid:
        """Return the map of patches (h, w) of an image of H x W pixels.

        Raises:
            SettingError: the image is not a multiple of the patch, or smaller.
        """
        patch = self.vit.patch_embed.patch_size
        if image_size[0] % patch[0] or image_size[1] % patch[1] or not min(image_size):
            raise SettingError(
                f"image of {write_grid(image_size)} px is not a multiple of the patch, {write_grid(patch)} px",
                "image_size",
            )
        return image_size[0] // patch[0], image_size[1] // patch[1]

    def embed(self, pixel_values: torch.Tensor, size: Grid, places: Sequence[Place] = ((0, 0),)) -> torch.Tensor:
        """Embed images, or parts of images, with the positions that they have in the whole image.

        Args:
            pixel_values: pixels (B, C, H, W) of the part.
            size: the map of patches (h, w) of the whole image.
            places: where the part is: one place for all images of the batch, or one for each.

        Returns:
            Prefix tokens and patches, row by row (B, N, D).
        """
        vit = self.vit
        x = vit.patch_embed(pixel_values)  # (B, rows, columns, D)
        prefix = 0 if vit.no_embed_class else self.num_prefix_tokens
        positions = resample_abs_pos_embed(vit.pos_embed, size, vit.patch_embed.grid_size, prefix)
        cells = cut_map(positions[:, prefix:].unflatten(1, size), places, (x.shape[1], x.shape[2]))
        x = (x + cells).flatten(1, 2)
        first = vit.cls_token if vit.reg_token is None else torch.cat([vit.cls_token, vit.reg_token], 1)
        if prefix:
            first = first + positions[:, :prefix]
        return vit.norm_pre(torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], 1))

    def run_layer(self, layer: Callable[..., Any], *args: Any) -> Any:
        """Run a layer, and again in the backward pass if `set_grad_checkpointing` is on."""
        if self.grad_checkpointing and self.training:
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def pool(self, x: torch.Tensor, size: Grid, grid: Grid) -> torch.Tensor:
        """Average the patches among tokens (B, N, D) within the cells of a grid, to (B, p + r*c, D).

        Args:
            size: the map of patches (h, w).
            grid: the grid (r, c); the whole map leaves the tokens as they are.
        """
        if grid == size:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, pool_tokens(patches.unflatten(1, size), grid).flatten(1, 2)], 1)

    def make_maps(self, x: torch.Tensor, size: Grid, grid: Grid, rows: torch.Tensor | None = None) -> TokenMaps:
        """Lay tokens (B, N, D) out as `TokenMaps`.

        Args:
            size: the map of patches (h, w).
            grid: the grid (r, c) to which the patches are pooled.
            rows: where each token comes from (B, N, h*w), as `rollout.py` composes it.
        """
        maps = self.lay_out(self.pool(x, size, grid), grid)
        return maps if rows is None else maps._replace(attention=self.pool(rows, size, grid).unflatten(-1, size))

    def init_from(
        self,
        source: str | nn.Module,
        mean: Sequence[float] | torch.Tensor | None = None,
        std: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Copy the weights of a ViT of the same width, in place; of a deeper one, blocks evenly from first to last.

        Args:
            source: timm name of a ViT, whose pretrained weights are taken; or a timm ViT, or another `ViTEncoder`.
            mean: not used: the ViT's own input statistics do not change its weights.
            std: not used.

        Raises:
            ValueError: the weights cannot be loaded or do not fit.
        """
        network: Any = create_timm("ViT", source, pretrained=True, num_classes=0) if isinstance(source, str) else source
        network = network.vit if isinstance(network, ViTEncoder) else network
        if not isinstance(network, VisionTransformer):
            raise SettingError(f"{type(network).__name__} is not a ViT", "init_from")
        weights = {key: value for key, value in network.state_dict().items() if not key.startswith(("head", "blocks"))}
        weights["pos_embed"] = self.fit_positions(network)
        mine, last = len(self.vit.blocks), len(network.blocks) - 1
        if last + 1 < mine:
            raise SettingError(f"the ViT has {last + 1} blocks, fewer than the encoder's {mine}", "init_from")
        for i in range(mine):
            block = network.blocks[round(i * last / max(mine - 1, 1))]
            weights |= {f"blocks.{i}.{key}": value for key, value in block.state_dict().items()}
        own = self.vit.state_dict()
        if names := sorted(own.keys() ^ weights.keys()):
            raise SettingError(
                f"the ViT's layers are not those of the encoder: only one of them has '{names[0]}'", "init_from"
            )
        for key, value in own.items():
            if value.shape != weights[key].shape:
                shapes = f"{tuple(weights[key].shape)}, the encoder's {tuple(value.shape)}"
                raise SettingError(f"the ViT's '{key}' has shape {shapes}; they must be equal", "init_from")
        if (heads := network.blocks[0].attn.num_heads) != (own_heads := self.vit.blocks[0].attn.num_heads):
            raise SettingError(
                f"the ViT has {heads} attention heads, the encoder {own_heads}; they must be equal", "init_from"
            )
        self.vit.load_state_dict(weights)

    def fit_positions(self, network: Any) -> torch.Tensor | None:
        """Return another ViT's positional embedding, resized to this encoder's map of patches."""
        if network.pos_embed is None:
            return None
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        size, old = self.vit.patch_embed.grid_size, network.patch_embed.grid_size
        return resample_abs_pos_embed(network.pos_embed.detach(), size, old, prefix)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that an optimiser leaves undecayed, beside vectors."""
        names = {f"vit.{name}" for name in self.vit.no_weight_decay()}
        return names & dict(self.named_parameters()).keys()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Group parameters by depth, for timm's layer-wise learning rates."""
        stem = r"^vit\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)"
        return {"stem": stem, "blocks": [(r"^vit\.blocks\.(\d+)", None), (r"^vit\.norm|^selectors", (99999,))]}


def cut_map(cells: torch.Tensor, places: Sequence[Place], shape: Grid) -> torch.Tensor:
    """Cut the same shape out of one map (1, h, w, D) at each place, to (places, rows, columns, D)."""
    parts = [cells[:, top : top + shape[0], left : left + shape[1]] for top, left in places]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
