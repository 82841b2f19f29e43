"""Attention rollout: how much of each output token comes from each cell of the image.

Abnar & Zuidema (ACL 2020, arXiv 2005.00928, section 3) describe a block with a residual connection by the matrix
(I + A) / 2, where A is its attention, averaged over the heads, and multiply the matrices of all blocks. A row of the
product has the share of each input token in an output token. Here, a row has the N cells of the image alone:

    P (M x N)   rows of the tokens that the encoder returns
    L (N x N)   rows of LookupViT's lookup tokens; at first each is its own cell, L = I

A ViT with self-attention S has one stream, P <- (P + S P) / 2. LookupViT (Koner et al., 2024) has two, and each of its
steps is one such mixture, with A (M x N) the attention of information gathering:

    gathering    P <- (P + A L) / 2
    refinement   P <- (P + S P) / 2         S the self-attention of the refinement block
    infusion     L <- (L + T P) / 2         T = A^T with each row divided by its sum: the lookup token's own shares

A class token or a register starts as a row of zeros, because it contains nothing of the image yet. A compressed token
starts with the weights of the bilinear resize that makes it. At the end, each row is divided by its sum. MLPs, norms
and values do not move content between tokens and are left out, as in the paper.

Letters: B batch, H heads, M tokens returned, N cells of the image (or tokens of a ViT), d width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


class AttentionRecorder(TorchFunctionMode):
    """Records the self-attention (B, N, N), averaged over the heads, of each layer that runs within the context.

    It intercepts the calls of `scaled_dot_product_attention`, by which the layers of timm and torch attend, and of a
    softmax of shape (B, H, N, N), by which they attend if that function is switched off. It does so in this thread
    alone, and changes no output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a torch function; if it is attention, record its weights."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.maps.append(attention_weights(*args, **kwargs))
        elif func in SOFTMAX and result.ndim == 4 and result.shape[-1] == result.shape[-2]:
            self.maps.append(result.detach().to(torch.promote_types(result.dtype, torch.float32)).mean(1))
        return result


@torch.no_grad()
def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return the weights (B, N, N), averaged over the heads, by which attention mixes its values (B, H, N, d).

    The arguments are those of `scaled_dot_product_attention`; dropout is left out.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scores = query.to(precision) @ key.to(precision).mT  # (B, H, N, N)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(-1).mean(-3)


@torch.no_grad()
def mix(rows: torch.Tensor, weights: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return the rows after a residual step: the mean of `rows` and of `source` mixed by attention `weights`."""
    with torch.autocast(rows.device.type, enabled=False):
        return (rows + weights.to(rows.dtype) @ source) / 2


@torch.no_grad()
def shares(attention: torch.Tensor) -> torch.Tensor:
    """Transpose the attention of gathering (B, M, N) into shares T (B, N, M), whose rows sum to 1."""
    return normalize(attention.mT)


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Divide each row by its sum; a row of zeros is unchanged."""
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


@torch.no_grad()
def roll_out(maps: list[torch.Tensor], prefix: int) -> torch.Tensor:
    """Compose the self-attention of a ViT's blocks into rows over the image.

    Args:
        maps: attention (B, N, N) of each block, from first to last, averaged over the heads.
        prefix: number of tokens before the patches: class token, registers.

    Returns:
        One row for each token, over the patches (B, N, N - prefix); each sums to 1.
    """
    rows = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)[:, prefix:].expand(
        len(maps[0]), -1, -1
    )
    for weights in maps:
        rows = mix(rows, weights, rows)
    return normalize(rows)
