"""ToSA: in every second layer, only the tokens that matter attend (Singh et al., 2024, arXiv 2406.08816).

Letters: B batch, N tokens (class token and patches), H heads, D width, L layers, r the ratio of tokens that attend,
(h, w) the map of patches.

Layers alternate. An ordinary layer is a ViT's block on all tokens; its scores S = Q K^T / sqrt(d) (B, H, N, N) go to a
selector, which predicts the attention of the next layer, a selective one:

    prediction     P = softmax(conv(relu(conv(S))))      two 1-D convolutions, heads as channels
    importance     I_j = mean over heads and queries of P_hij: the attention that token j receives
    selection      the r N most important tokens run through the next layer's block; prefix tokens are always among them
    bypass         the others stay as they are; all N tokens are put back in their places

The selector learns from the true attention A of the next layer, computed on all tokens, by the Kullback-Leibler
divergence KL(A || P). The choice of the tokens has no gradient, and the divergence reaches the selector alone: neither
its input nor its target gets a gradient. So no weight has to balance it against the other losses.

Kernels of 1, 2 H hidden channels and the first weights are choices of this project. A kernel of 1 mixes the heads of
each pair of tokens alone, so it holds for every image size and is the cheapest. Selectors are what limits the gain on
CPUs (`benchmarks/tosa.py`). A new one predicts that the next layer attends as this one does: relu(S) - relu(-S) = S.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from captioner.encoders.base import TokenMaps, image_size
from captioner.encoders.rollout import AttentionRecorder, mix, normalize
from captioner.encoders.vit import VIT_CFG, ViTEncoder
from captioner.errors import SettingError
from captioner.grids import Grid

CACHED = 2**18
"""Scores that a selector reads at once on CPUs, a few heads of a few queries: they stay in the cache, which halves the
time for large images."""


class TokenSelector(nn.Module):
    """Predicts the next layer's attention from a layer's scores.

    Args:
        num_heads: attention heads H.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.expand = nn.Conv1d(num_heads, 2 * num_heads, 1)
        self.reduce = nn.Conv1d(2 * num_heads, num_heads, 1)
        with torch.no_grad():
            unit = torch.eye(num_heads)
            self.expand.weight[..., 0] = torch.cat([unit, -unit])
            self.reduce.weight[..., 0] = torch.cat([unit, -unit], 1)
            nn.init.zeros_(self.expand.bias)
            nn.init.zeros_(self.reduce.bias)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Predict the logarithm of the next layer's attention from scores, both (B, H, Q, N), for any queries Q."""
        x = self.reduce(F.relu(self.expand(scores.flatten(2)))).unflatten(2, scores.shape[2:])
        return x.log_softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))

    @torch.no_grad()
    def importance(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return the predicted attention that each token receives (B, N), the mean over heads and queries.

        Args:
            q: scaled queries of the ordinary layer (B, H, N, d).
            k: its keys (B, H, N, d).
        """
        batch, heads, count, _ = q.shape
        queries = count
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            queries = max(1, CACHED // (batch * heads * count))
        keys = k.mT.contiguous()
        received = [self(part @ keys).exp_().sum((1, 2)) for part in q.split(queries, 2)]
        return torch.stack(received).sum(0) / (heads * count)


class ToSA(ViTEncoder):
    """A ViT whose layers alternate between ordinary and selective ones; all tokens leave it.

    With the ratio 1 it is the ViT of the same weights. `forward_maps(..., attention=True)` composes attention through
    both kinds of layers: a token that bypasses a layer takes nothing in there.

    Args:
        ratio: share r of the tokens that run through a selective layer, above 0 and at most 1.
        options: those of `ViTEncoder`.

    Raises:
        ValueError: the ratio is no such share.
    """

    def __init__(self, *, ratio: float = 0.5, **options: Any):
        super().__init__(**options)
        self.ratio = check_ratio(ratio)
        heads = self.vit.blocks[0].attn.num_heads
        self.selectors = nn.ModuleList(TokenSelector(heads) for _ in range(len(self.vit.blocks) // 2))

    def forward_tokens(
        self, pixel_values: torch.Tensor, grid: Grid | None = None, ratio: float | None = None
    ) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into prefix tokens and patches (B, M, D).

        Args:
            grid: rows and columns of tokens; `None` for the encoder's default.
            ratio: share of the tokens that run through a selective layer; `None` for the encoder's own.

        Raises:
            SettingError: the image is not a multiple of the patch, the grid is larger than the map of patches, or the
                ratio is not above 0 and at most 1.
        """
        size = self.largest_grid(image_size(pixel_values))
        grid = self.check_grid(grid or self.grid, size)
        x = self.run_blocks(self.embed(pixel_values, size), ratio)[0]
        return self.pool(self.vit.norm(x), size, grid)

    def forward_maps(
        self,
        pixel_values: torch.Tensor,
        grid: Grid | None = None,
        attention: bool = False,
        ratio: float | None = None,
    ) -> TokenMaps:
        """Encode pixels (B, C, H, W) into tokens at their places; arguments and errors as `forward_tokens`."""
        size = self.largest_grid(image_size(pixel_values))
        grid = self.check_grid(grid or self.grid, size)
        x, rows = self.embed(pixel_values, size), None
        if attention:
            with AttentionRecorder() as recorder:
                x, chosen, _ = self.run_blocks(x, ratio)
            rows = self.compose(recorder.maps, chosen)
        else:
            x = self.run_blocks(x, ratio)[0]
        return self.make_maps(self.vit.norm(x), size, grid, rows)

    def forward_with_losses(
        self, pixel_values: torch.Tensor, grid: Grid | None = None
    ) -> tuple[TokenMaps, dict[str, torch.Tensor]]:
        """As `forward_maps`, and the loss `selector`: KL(A || P), the mean over images, heads, queries and layers."""
        size = self.largest_grid(image_size(pixel_values))
        grid = self.check_grid(grid or self.grid, size)
        x, _, losses = self.run_blocks(self.embed(pixel_values, size), None, learn=True)
        named = {"selector": torch.stack(losses).mean()} if losses else {}
        return self.make_maps(self.vit.norm(x), size, grid), named

    def run_blocks(
        self, x: torch.Tensor, ratio: float | None, learn: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor | None], list[torch.Tensor]]:
        """Run all layers on embedded tokens (B, N, D).

        Args:
            ratio: share of the tokens that run through a selective layer; `None` for the encoder's own.
            learn: compute also the selectors' losses.

        Returns:
            The tokens (B, N, D); for each layer the places (B, r N) of the tokens that ran through it, in their order,
            or `None` for all of them; and the losses of the selectors.
        """
        count = x.shape[1]
        picks = max(self.num_prefix_tokens, round(check_ratio(self.ratio if ratio is None else ratio) * count))
        chosen: list[torch.Tensor | None] = []
        losses: list[torch.Tensor] = []
        predicted = importance = torch.empty(0)
        for i, block in enumerate(self.vit.blocks):
            places, selective = None, i % 2 == 1
            if selective and learn:
                losses.append(divergence(block, x, predicted))
            if selective and picks < count:
                places = choose(importance, picks, self.num_prefix_tokens)  # (B, r N)
                index = places.unsqueeze(-1).expand(-1, -1, x.shape[-1])
                x = x.scatter(1, index, self.run_layer(block, x.gather(1, index)).to(x.dtype))
            elif not selective and i + 1 < len(self.vit.blocks) and (learn or picks < count):
                x, q, k = self.run_layer(run_with_queries, block, x)
                q, k, selector = q.detach(), k.detach(), self.selectors[i // 2]
                predicted = selector(q @ k.mT) if learn else predicted  # (B, H, N, N)
                importance = selector.importance(q, k) if picks < count else importance  # (B, N)
            else:
                x = self.run_layer(block, x)
            chosen.append(places)
        return x, chosen, losses

    def compose(self, maps: list[torch.Tensor], chosen: list[torch.Tensor | None]) -> torch.Tensor:
        """Compose the attention of all layers into rows over the patches (B, N, h*w), see `rollout.py`.

        Args:
            maps: attention of each layer among the tokens that ran through it, averaged over the heads.
            chosen: places of those tokens; `None` for all.
        """
        unit = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
        rows = unit[:, self.num_prefix_tokens :].expand(len(maps[0]), -1, -1)
        for weights, places in zip(maps, chosen, strict=True):
            if places is None:
                rows = mix(rows, weights, rows)
            else:
                index = places.unsqueeze(-1).expand(-1, -1, rows.shape[-1])
                attending = rows.gather(1, index)
                rows = rows.scatter(1, index, mix(attending, weights, attending))
        return normalize(rows)


def check_ratio(ratio: float) -> float:
    """Return the ratio.

    Raises:
        SettingError: it is not above 0 and at most 1.
    """
    if not 0 < ratio <= 1:
        raise SettingError(
            f"the ratio of tokens that attend is {ratio}; it must be above 0 and at most 1", "encoder_options"
        )
    return ratio


def queries_and_keys(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the queries, keys and values (B, H, N, d) of timm's attention on tokens (B, N, D)."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, d)
    q, k, v = qkv.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def run_with_queries(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a ViT's block on tokens (B, N, D), as timm does; returned with its scaled queries and its keys."""
    attn = block.attn
    q, k, v = queries_and_keys(attn, block.norm1(x))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
    x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attn.norm(y)))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), q * attn.scale, k


def choose(importance: torch.Tensor, count: int, prefix: int) -> torch.Tensor:
    """Return the places (B, count) of the most important tokens in their order, the prefix tokens among them.

    Args:
        importance: importance of each token (B, N).
        count: how many tokens.
        prefix: number of prefix tokens, which are always chosen.
    """
    first = torch.full_like(importance[:, :prefix], torch.inf)
    importance = torch.cat([first, importance[:, prefix:]], 1)
    return importance.topk(count, sorted=False).indices.sort().values


def divergence(block: Any, x: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Return KL(A || P) of the attention that a block would have on all tokens and the predicted one, a scalar.

    Args:
        x: input of the block (B, N, D).
        predicted: logarithm of P (B, H, N, N).
    """
    with torch.no_grad():
        q, k, _ = queries_and_keys(block.attn, block.norm1(x))
        truth = (q * block.attn.scale @ k.mT).log_softmax(-1, dtype=predicted.dtype)
    return F.kl_div(predicted, truth, log_target=True, reduction="none").sum(-1).mean()


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ToSA:
    return build_model_with_cfg(ToSA, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs({f"tosa_{size}_patch16_224": dict(VIT_CFG) for size in ("tiny", "small")})


@register_model
def tosa_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ToSA:
    """ToSA on ViT-Ti/16: width 192, 12 layers, 3 heads."""
    return _create("tosa_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


@register_model
def tosa_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ToSA:
    """ToSA on ViT-S/16: width 384, 12 layers, 6 heads."""
    return _create("tosa_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})
