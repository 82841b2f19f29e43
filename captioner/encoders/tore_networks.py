"""Networks that recycle tokens (see `tore.py`): a ViT and a LookupViT, each with the weights of the plain one.

Letters: B batch, (h, w) the map of cells of the whole image, (r, c) its compressed grid, N tokens, D width.

ViT. A glimpse is its patches, with the positions that they have in the whole image, and the prefix tokens.

LookupViT (Koner et al., 2024) has two streams, and both are cut at block K. A glimpse of a x b cells at row y and
column x of the image has

    lookup tokens       L = X + pos_l[y : y+a, x : x+b]
    compressed tokens   P = resize(X, r' x c') + pos_p at the centres of the new cells
                        r' = ceil(r a / h), c' = ceil(c b / w): the density of the whole image's grid, or a little more
    class token         its own, in P

In the iterator, P gathers from the lookup tokens of its own glimpse and infuses them alone. In the aggregator, the
compressed tokens of all glimpses, with the mean class token, gather from the lookup tokens of all glimpses and infuse
all of them: blocks are the same functions on longer streams. The gathering softmax then runs over all lookup tokens.
A glimpse that covers the image has the plain network's L and P.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from captioner.encoders.base import TokenMaps, image_size
from captioner.encoders.lookupvit import LookupViT
from captioner.encoders.lookupvit import default_cfgs as lookupvit_cfgs
from captioner.encoders.maps import resize_tokens
from captioner.encoders.registry import create_timm
from captioner.encoders.rollout import AttentionRecorder, roll_out
from captioner.encoders.tore import Tore
from captioner.encoders.vit import VIT_CFG, Place, ViTEncoder, cut_map
from captioner.errors import SettingError
from captioner.grids import Grid


class ToreViT(Tore, ViTEncoder):
    """A ViT that recycles tokens.

    Args:
        iterator_blocks: K where a call gives none; `None` for half of the blocks.
        options: those of `ViTEncoder`.
    """

    @property
    def network_blocks(self) -> nn.Sequential:
        """The ViT's blocks."""
        return self.vit.blocks

    @property
    def own_map(self) -> Grid:
        """The map of patches (h, w) of an image of the encoder's own size."""
        return self.vit.patch_embed.grid_size

    def embed_glimpse(
        self, glimpse: torch.Tensor, places: Sequence[Place], size: Grid, grid: Grid | None
    ) -> tuple[torch.Tensor, None]:
        """Turn the pixels of a glimpse into prefix tokens and patches (B, N, D)."""
        return self.embed(glimpse, size, places), None

    def run_blocks(
        self, tokens: torch.Tensor, lookup: torch.Tensor | None, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the blocks [start, stop) on tokens (B, N, D)."""
        for block in self.vit.blocks[start:stop]:
            tokens = self.run_layer(block, tokens)
        return tokens, lookup

    def norm_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the last norm."""
        return self.vit.norm(tokens)

    def forward_tokens(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W), as one glimpse, into prefix tokens and patches (B, M, D)."""
        size = self.largest_grid(image_size(pixel_values))
        grid = self.check_grid(grid or self.grid, size)
        return self.pool(self.cover(pixel_values), size, grid)

    def forward_maps(self, pixel_values: torch.Tensor, grid: Grid | None = None, attention: bool = False) -> TokenMaps:
        """Encode pixels (B, C, H, W), as one glimpse, into tokens at their places; see `TokenMaps`.

        Attention is rolled out through the blocks, see `rollout.py`.
        """
        size = self.largest_grid(image_size(pixel_values))
        grid = self.check_grid(grid or self.grid, size)
        if not attention:
            return self.make_maps(self.cover(pixel_values), size, grid)
        with AttentionRecorder() as recorder:
            x = self.cover(pixel_values)
        return self.make_maps(x, size, grid, roll_out(recorder.maps, self.num_prefix_tokens))


class ToreLookupViT(Tore, LookupViT):
    """A LookupViT that recycles tokens.

    What it computes for a whole image is what LookupViT computes, maps included.

    Args:
        iterator_blocks: K where a call gives none; `None` for half of the blocks.
        options: those of `LookupViT`.
    """

    @property
    def network_blocks(self) -> nn.Sequential:
        """The blocks of both streams."""
        return self.blocks

    @property
    def own_map(self) -> Grid:
        """The lookup grid (h, w) of an image of the encoder's own size."""
        return self.patch_embed.grid_size

    def embed_glimpse(
        self, glimpse: torch.Tensor, places: Sequence[Place], size: Grid, grid: Grid | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn the pixels of a glimpse into class token and compressed tokens (B, 1 + r'*c', D), and lookup tokens."""
        x = self.patch_embed(glimpse)  # (B, a, b, D)
        shape = (x.shape[1], x.shape[2])
        lookup = x + cut_map(resize_tokens(self.pos_lookup, size), places, shape)
        rows, columns = grid or size
        grid = -(-rows * shape[0] // size[0]), -(-columns * shape[1] // size[1])
        across = [sample_weights(top, shape[0], grid[0], size[0], self.pos_compressed[:, :, 0]) for top, _ in places]
        along = [sample_weights(left, shape[1], grid[1], size[1], self.pos_compressed[:, 0]) for _, left in places]
        positions = torch.einsum("pri,ijd,pcj->prcd", torch.stack(across), self.pos_compressed[0], torch.stack(along))
        compressed = (resize_tokens(x, grid) + positions).flatten(1, 2)
        cls_token = self.cls_token.expand(len(x), -1, -1).to(compressed.dtype)
        return torch.cat([cls_token, compressed], 1), lookup.flatten(1, 2)

    def run_blocks(
        self, tokens: torch.Tensor, lookup: torch.Tensor | None, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the blocks [start, stop) on compressed tokens with the class token, and on lookup tokens."""
        return self.blocks[start:stop]((tokens, lookup))

    def norm_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the last norm."""
        return self.norm(tokens)

    def init_from(
        self,
        source: str | nn.Module,
        mean: Sequence[float] | torch.Tensor | None = None,
        std: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Start from a LookupViT of the same layers and sizes, or as `LookupViT` does.

        Raises:
            ValueError: the weights cannot be loaded or do not fit.
        """
        network: Any = create_timm("network", source, pretrained=True) if isinstance(source, str) else source
        if not isinstance(network, LookupViT):
            return super().init_from(network, mean, std)
        weights = {key: value for key, value in network.state_dict().items() if not key.startswith("head.")}
        own = {key: value for key, value in self.state_dict().items() if not key.startswith("head.")}
        for key in sorted(own.keys() | weights.keys()):
            if key not in own or key not in weights or own[key].shape != weights[key].shape:
                raise SettingError(f"the LookupViT does not fit the encoder: '{key}' differs", "init_from")
        self.load_state_dict(weights, strict=False)


def sample_weights(start: int, length: int, count: int, size: int, stored: torch.Tensor) -> torch.Tensor:
    """Return by which weights an embedding along one side is interpolated at the centres of new cells.

    It is what `resize_tokens` does to the whole side: linear, half-pixel centres, edges clamped.

    Args:
        start: first cell of a part of the side.
        length: cells of the part.
        count: new cells in the part.
        size: cells of the whole side.
        stored: the embedding, with one value for each of its steps in the second dimension.

    Returns:
        Weights (count, steps), in the precision of the embedding.
    """
    steps, precision = stored.shape[1], torch.promote_types(stored.dtype, torch.float32)
    new = torch.arange(count, device=stored.device, dtype=precision)
    centres = (start + (new + 0.5) * length / count) / size * steps - 0.5
    known = torch.arange(steps, device=stored.device, dtype=precision)
    weights = (1 - (centres.clamp(0, steps - 1).unsqueeze(1) - known).abs()).clamp(min=0)
    return weights.to(stored.dtype)


LOOKUPVIT_CFG = lookupvit_cfgs["lookupvit_tiny_patch16_224"].default.to_dict()
SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
}
default_cfgs = generate_default_cfgs(
    {f"tore_vit_{size}_patch16_224": dict(VIT_CFG) for size in SIZES}
    | {f"tore_lookupvit_{size}_patch16_224": dict(LOOKUPVIT_CFG) for size in SIZES}
)


@register_model
def tore_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ToreViT:
    """ViT-Ti/16 that recycles tokens."""
    return build_model_with_cfg(ToreViT, "tore_vit_tiny_patch16_224", pretrained, **{**SIZES["tiny"], **kwargs})


@register_model
def tore_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ToreViT:
    """ViT-S/16 that recycles tokens."""
    return build_model_with_cfg(ToreViT, "tore_vit_small_patch16_224", pretrained, **{**SIZES["small"], **kwargs})


@register_model
def tore_lookupvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ToreLookupViT:
    """LookupViT-Ti/16 that recycles tokens."""
    name = "tore_lookupvit_tiny_patch16_224"
    return build_model_with_cfg(ToreLookupViT, name, pretrained, **{**SIZES["tiny"], **kwargs})


@register_model
def tore_lookupvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ToreLookupViT:
    """LookupViT-S/16 that recycles tokens."""
    name = "tore_lookupvit_small_patch16_224"
    return build_model_with_cfg(ToreLookupViT, name, pretrained, **{**SIZES["small"], **kwargs})
