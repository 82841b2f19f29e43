"""Layers written from their equations, one image at a time, for encoders to be compared with."""

import math

import torch
import torch.nn.functional as F


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def affine(x, linear):
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def mlp(x, layers):
    hidden = affine(x, layers.fc1)
    return affine(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), layers.fc2)


def bilinear(tokens, rows, columns):
    """Resize one map (h, w, D) sample by sample, half-pixel centres, edges clamped."""
    height, width, _ = tokens.shape
    result = torch.zeros(rows, columns, tokens.shape[-1], dtype=tokens.dtype)
    for r in range(rows):
        for c in range(columns):
            y = min(max((r + 0.5) * height / rows - 0.5, 0), height - 1)
            x = min(max((c + 0.5) * width / columns - 0.5, 0), width - 1)
            for yy in (math.floor(y), math.floor(y) + 1):
                for xx in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - yy)) * (1 - abs(x - xx))
                    if weight > 0:
                        result[r, c] += weight * tokens[yy, xx]
    return result


def scores(x, block):
    """Return the scores Q K^T / sqrt(d) of each head of a ViT's block on tokens (N, D), and the values of each."""
    attn = block.attn
    q, k, v = affine(layer_norm(x, block.norm1), attn.qkv).split(x.shape[1], -1)
    heads = torch.arange(x.shape[1]).chunk(attn.num_heads)
    return [q[:, part] @ k[:, part].T / math.sqrt(len(part)) for part in heads], [v[:, part] for part in heads]


def vit_block(x, block):
    """Run a ViT's block on tokens (N, D)."""
    maps, values = scores(x, block)
    mixed = [F.softmax(s, -1) @ v for s, v in zip(maps, values, strict=True)]
    x = x + affine(torch.cat(mixed, -1), block.attn.proj)
    return x + mlp(layer_norm(x, block.norm2), block.mlp)


def embed_patches(image, proj, size=16):
    """Embed the patches of one image (C, H, W) by a convolution layer, to a map (h, w, D)."""
    rows, columns = image.shape[-2] // size, image.shape[-1] // size
    x = torch.zeros(rows, columns, len(proj.bias), dtype=image.dtype)
    for r in range(rows):
        for c in range(columns):
            pixels = image[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
            x[r, c] = (proj.weight * pixels).sum((1, 2, 3)) + proj.bias
    return x
