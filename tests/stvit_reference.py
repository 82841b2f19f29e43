"""STViT computed for one image, step by step from the equations, with where each token comes from.

No map is ever cut into windows: every attention is between all tokens, and a table says which pairs may attend. Tokens
are (T, D), and `rows` (T, X) are the rollout of `rollout.py` over the X cells of the image.
"""

import math

import torch


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def affine(x, linear):
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def mlp(x, layers):
    hidden = affine(x, layers.fc1)
    return affine(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), layers.fc2)


def attend(q, k, v, heads, bias=0.0):
    """Return what each query reads (T, D), and the attention (T, S), averaged over the heads."""
    read, maps = [], []
    for head, part in enumerate(torch.arange(q.shape[-1]).chunk(heads)):
        scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))
        maps.append((scores + (bias[head] if torch.is_tensor(bias) and bias.ndim == 3 else bias)).softmax(-1))
        read.append(maps[-1] @ v[:, part])
    return torch.cat(read, -1), sum(maps) / heads


def gamma(block, number):
    scale = getattr(block, f"ls{number}")
    return getattr(scale, "gamma", 1.0)


def self_block(block, x, rows, bias=0.0):
    """A ViT or Swin block: S = softmax(Q K^T / sqrt(d) + bias)."""
    q, k, v = affine(layer_norm(x, block.norm1), block.attn.qkv).chunk(3, -1)
    read, attention = attend(q, k, v, block.attn.num_heads, bias)
    x = x + affine(read, block.attn.proj) * (gamma(block, 1) if hasattr(block, "ls1") else 1)
    x = x + mlp(layer_norm(x, block.norm2), block.mlp) * (gamma(block, 2) if hasattr(block, "ls2") else 1)
    return x, (rows + attention @ rows) / 2


def cross_block(block, x, rows, source, source_rows, allowed=None):
    """CA(x, source) where `allowed` (T, S) says who may attend to what, then the MLP."""
    bias = 0.0 if allowed is None else torch.zeros(allowed.shape).double().masked_fill(~allowed, -math.inf)
    own, other = layer_norm(x, block.norm1), layer_norm(source, block.norm1)
    q, k, v = affine(own, block.attn.q), affine(other, block.attn.k), affine(other, block.attn.v)
    read, attention = attend(q, k, v, block.attn.num_heads, bias)
    x = x + affine(read, block.attn.proj) * gamma(block, 1)
    return x + mlp(layer_norm(x, block.norm2), block.mlp) * gamma(block, 2), (rows + attention @ source_rows) / 2


def bins(size, count):
    """The cells from first to last that each part of an adaptive pooling covers."""
    return [range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def pool(x, size, grid, how):
    """Pool a map (h * w, D) to (r * c, D)."""
    x = x.reshape(*size, -1)
    picked = [x[ys][:, xs].flatten(0, 1) for ys in bins(size[0], grid[0]) for xs in bins(size[1], grid[1])]
    return torch.stack([how(cells) for cells in picked])


def mean(cells):
    return cells.mean(0)


def largest(cells):
    return cells.amax(0)


def bilinear(x, size, grid):
    """Resize a map (h * w, D) with half-pixel centres and clamped edges."""
    result = torch.zeros(*grid, x.shape[-1], dtype=x.dtype)
    for r in range(grid[0]):
        for c in range(grid[1]):
            y = min(max((r + 0.5) * size[0] / grid[0] - 0.5, 0), size[0] - 1)
            z = min(max((c + 0.5) * size[1] / grid[1] - 0.5, 0), size[1] - 1)
            for yy in (math.floor(y), math.floor(y) + 1):
                for zz in (math.floor(z), math.floor(z) + 1):
                    if (weight := (1 - abs(y - yy)) * (1 - abs(z - zz))) > 0:
                        result[r, c] += weight * x[yy * size[1] + zz]
    return result.flatten(0, 1)


def windows_of(size, grid, window):
    """How many windows lie along each side: as many as have enough cells and share the grid's side evenly."""
    return [
        [n for n in range(1, cells + 1) if n * window <= cells and side % n == 0]
        for cells, side in zip(size, grid, strict=True)
    ]


def unit(module, x, rows, size, grid):
    """One `SemanticUnit`, on prefix and image tokens (P+N, D)."""
    prefix, count = module.num_prefix, grid[0] * grid[1]
    image, image_rows = x[prefix:], rows[prefix:]
    centres = pool(image, size, grid, mean if module.window is None else largest)
    centre_rows = pool(image_rows, size, grid, mean)
    allowed = None
    if module.window is not None:
        numbers = [options[-1] for options in windows_of(size, grid, module.window)]
        allowed = torch.zeros(count, count + size[0] * size[1], dtype=torch.bool)
        for r in range(grid[0]):
            for c in range(grid[1]):
                near = []
                for place, side, cells, number in zip((r, c), grid, size, numbers, strict=True):
                    own = place * number // side
                    length = min(cells, math.ceil(cells / number) + module.overlap)
                    start = 0 if number == 1 else math.floor(own * (cells - length) / (number - 1))
                    near.append((own, range(start, start + length)))
                for rr in range(grid[0]):
                    for cc in range(grid[1]):
                        same = [p * n // s for p, n, s in zip((rr, cc), numbers, grid, strict=True)]
                        allowed[r * grid[1] + c, rr * grid[1] + cc] = same == [near[0][0], near[1][0]]
                for y in near[0][1]:
                    for z in near[1][1]:
                        allowed[r * grid[1] + c, count + y * size[1] + z] = True
    c0, c0_rows = torch.cat([x[:prefix], centres]), torch.cat([rows[:prefix], centre_rows])
    source, source_rows = torch.cat([c0, image]), torch.cat([c0_rows, image_rows])
    c1, c1_rows = cross_block(module.generation[0], c0, c0_rows, source, source_rows, allowed)
    stored = module.centres.shape[1:3]
    guides = bilinear(module.centres.flatten(0, 2), stored, grid)
    guided = torch.cat([c1[:prefix], c1[prefix:] + guides])
    source, source_rows = torch.cat([c1, image]), torch.cat([c1_rows, image_rows])
    s, s_rows = cross_block(module.generation[1], guided, c1_rows, source, source_rows)
    for block in module.blocks:
        s, s_rows = self_block(block, s, s_rows)
    if module.recovery is None:
        return s, s_rows, grid
    x, rows = torch.cat([s[:prefix], image]), torch.cat([s_rows[:prefix], image_rows])
    return *cross_block(module.recovery, x, rows, s, s_rows), size


def swin_bias(attn, size, window, shift):
    """Relative position bias within shifted windows, and minus infinity between them: (H, N, N)."""
    places = [(y, z) for y in range(size[0]) for z in range(size[1])]
    bias = torch.full((attn.num_heads, len(places), len(places)), -math.inf, dtype=torch.float64)

    def box(place):  # the shifted windows tile the map from -shift on, and are cut at its edges
        return tuple((p + w - s) // w if s else p // w for p, w, s in zip(place, window, shift, strict=True))

    for i, one in enumerate(places):
        for j, other in enumerate(places):
            if box(one) == box(other):
                dy, dz = one[0] - other[0] + window[0] - 1, one[1] - other[1] + window[1] - 1
                bias[:, i, j] = attn.relative_position_bias_table[dy * (2 * window[1] - 1) + dz]
    return bias


def merge(merging, x, rows, size):
    """Swin's patch merging: 2 x 2 tokens side by side in the width, column by column, then a norm and a layer."""
    half = size[0] // 2, size[1] // 2
    tokens, cells = x.reshape(*size, -1), rows.reshape(*size, -1)
    parts = [tokens[y::2, z::2] for z in (0, 1) for y in (0, 1)]
    merged = affine(layer_norm(torch.cat(parts, -1), merging.norm), merging.reduction)
    return merged.flatten(0, 1), sum(cells[y::2, z::2] for y in (0, 1) for z in (0, 1)).flatten(0, 1) / 4, half


def swin_stage(stage, x, rows, size):
    """Swin's own stage."""
    if hasattr(stage.downsample, "reduction"):
        x, rows, size = merge(stage.downsample, x, rows, size)
    for block in stage.blocks:
        x, rows = self_block(block, x, rows, swin_bias(block.attn, size, block.window_size, block.shift_size))
    return x, rows, size


def patches(kernel, image, side):
    """One linear layer on each patch."""
    cuts = image.unfold(1, side, side).unfold(2, side, side)  # (C, h, w, side, side)
    return torch.einsum("chwij,dcij->hwd", cuts, kernel.weight).flatten(0, 1) + kernel.bias
