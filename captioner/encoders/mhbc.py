"""MHBC, the multi-head bidirectional cross-attention of LookupViT (Koner et al., ECCV 2024, section 3).

Letters: B batch, N lookup tokens, M compressed tokens, D width, H heads, d = D / H the width of a head.
"""

import torch
from torch import nn


class MHBC(nn.Module):
    """Multi-head bidirectional cross-attention between compressed and lookup tokens.

    The direct form and the absorbed form are the same function. In multiply-adds per image and projection, direct costs
    `N*D*D + M*N*D` and absorbed `M*D*D + H*M*N*D`. Keys, values and infusion cost the same, so one comparison of the
    shapes decides for all three. There is no key bias: it adds a constant to a softmax row and so changes nothing.

    Args:
        dim: token width D.
        num_heads: heads H, a divisor of D.
        infuse: whether the layer also infuses context into the lookup tokens (the last block does not).
        absorb: `None` picks the cheaper form from the shapes; `True` or `False` forces one.
    """

    def __init__(self, dim: int, num_heads: int, infuse: bool = True, absorb: bool | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads, self.head_dim, self.absorb = num_heads, dim // num_heads, absorb
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        if infuse:
            self.infuse_v = nn.Linear(dim, dim)
            self.infuse_proj = nn.Linear(dim, dim)

    def absorbs(self, num_compressed: int, num_lookup: int) -> bool:
        """Return whether the absorbed form is used for M compressed and N lookup tokens."""
        if self.absorb is not None:
            return self.absorb
        m, n, heads = num_compressed, num_lookup, self.num_heads
        dim = heads * self.head_dim
        return m * dim + heads * m * n < n * dim + m * n

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Split the width into heads: (B, T, D) -> (B, H, T, d)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def gather(self, compressed: torch.Tensor, lookup: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Information gathering: compute the update of the compressed tokens, and the attention A.

        Args:
            compressed: normed compressed tokens (B, M, D).
            lookup: normed lookup tokens (B, N, D).

        Returns:
            The update of the compressed tokens (B, M, D) and A (B, H, M, N).
        """
        m, n = compressed.shape[1], lookup.shape[1]
        q = self.split(self.q(compressed)) * self.head_dim**-0.5  # (B, H, M, d)
        if self.absorbs(m, n):
            w_k, w_v = (w.weight.unflatten(0, (self.num_heads, self.head_dim)) for w in (self.k, self.v))  # (H, d, D)
            q = per_head(q, w_k).flatten(1, 2)  # (B, H*M, D)
            attn = (q @ lookup.mT).softmax(-1).to(lookup.dtype)  # (B, H*M, N)
            read = (attn @ lookup).unflatten(1, (self.num_heads, m))  # (B, H, M, D)
            read = per_head(read, w_v.mT)  # (B, H, M, d)
            read = read + self.v.bias.to(read.dtype).view(1, self.num_heads, 1, self.head_dim)
            attn = attn.unflatten(1, (self.num_heads, m))  # (B, H, M, N)
        else:
            k, v = self.split(self.k(lookup)), self.split(self.v(lookup))  # (B, H, N, d)
            attn = (q @ k.mT).softmax(-1).to(v.dtype)  # (B, H, M, N)
            read = attn @ v  # (B, H, M, d)
        return self.proj(read.transpose(1, 2).flatten(2)), attn

    def infusion(self, compressed: torch.Tensor, attn: torch.Tensor) -> torch.Tensor:
        """Global context infusion: the update of the lookup tokens (B, N, D) from A (B, H, M, N), transposed.

        Args:
            compressed: normed, refined compressed tokens (B, M, D).
            attn: the attention A that `gather` returned.
        """
        v = self.split(self.infuse_v(compressed))  # (B, H, M, d)
        if self.absorbs(*attn.shape[2:]):
            w_o = self.infuse_proj.weight.unflatten(1, (self.num_heads, self.head_dim)).permute(1, 2, 0)  # (H, d, D)
            context = per_head(v, w_o).flatten(1, 2)  # (B, H*M, D)
            return attn.flatten(1, 2).mT @ context + self.infuse_proj.bias.to(context.dtype)  # (B, N, D)
        read = attn.mT @ v  # (B, H, N, d)
        return self.infuse_proj(read.transpose(1, 2).flatten(2))  # (B, N, D)


def per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply each head by its own matrix: x (B, H, M, i) and weight (H, i, o) give (B, H, M, o).

    One product per head over the whole batch; `x @ weight` would copy the weights for every image.
    """
    batch = x.shape[0]
    x = x.transpose(0, 1).flatten(1, 2)  # (H, B*M, i)
    return (x @ weight.to(x.dtype)).unflatten(1, (batch, -1)).transpose(0, 1)
