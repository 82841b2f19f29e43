"""Random views of images: which comes when, drawn from a seed, and cut on the device the images are on.

Letters: B batch, R side of a stored square, S side of a view, both in pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

JITTER = 0.2
"""Most by which brightness, contrast and saturation change, relative."""


class ViewOrder:
    """Which view of which image comes at each position of an endless run; the position alone decides.

    Epoch after epoch, every image comes in a fresh order. So a job shards by position, and resumes at any.

    Args:
        groups: rows of the images of each source.
        repeats: how often each source's images come in an epoch.
        seed: decides the order.
        versions: number of distinct views of an image, taken in turn; `None` for a new one every time.
    """

    def __init__(self, groups: Sequence[np.ndarray], repeats: Sequence[int], seed: int, versions: int | None = None):
        copies = [(np.tile(g, r), np.repeat(np.arange(r), len(g)), r) for g, r in zip(groups, repeats, strict=True)]
        self.rows = np.concatenate([rows for rows, _, _ in copies])
        self.turns = np.concatenate([turns for _, turns, _ in copies])
        self.repeats = np.concatenate([np.full(len(rows), r) for rows, _, r in copies])
        self.seed, self.versions = seed, versions

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as the run
    def shuffled(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))

    def views(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (B,) and versions (B,) of the views at positions `start` to `start + count`."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self.rows))
        picked = np.concatenate([self.shuffled(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        versions = epochs * self.repeats[picked] + self.turns[picked]
        return self.rows[picked], versions if self.versions is None else versions % self.versions


def uniforms(seed: int, rows: np.ndarray, versions: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` numbers in [0, 1) for each view, the same ones for the same view, as (B, count).

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a hash of seed, image and version.
    """
    state = np.full((len(rows), count), seed, np.uint64)
    with np.errstate(over="ignore"):
        for part in (rows[:, None], versions[:, None], np.arange(count)[None]):
            state = (state ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0**-53


def draw_views(seed: int, rows: np.ndarray, versions: np.ndarray, min_crop: float) -> torch.Tensor:
    """Draw a random resized crop, flip and colour change for each view.

    As in Inception's augmentation (Szegedy et al., CVPR 2015): a rectangle of a share of the area in [min_crop, 1] and
    an aspect ratio in [4/5, 5/4].

    Args:
        rows: image of each view, (B,).
        versions: version of each view, (B,); seed, image and version decide all.
        min_crop: least share of the image's area.

    Returns:
        Parameters (B, 8): centre x and y, half width and height, in [-1, 1] coordinates of the square; flip (1 or -1);
        factors of brightness, contrast and saturation.
    """
    area, ratio, x, y, flip, *colour = uniforms(seed, rows, versions, 8).T
    area, ratio = min_crop + (1 - min_crop) * area, np.exp(math.log(1.25) * (2 * ratio - 1))
    width, height = np.sqrt(area * ratio).clip(max=1), np.sqrt(area / ratio).clip(max=1)
    x, y = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    colour = [1 + JITTER * (2 * c - 1) for c in colour]
    return torch.from_numpy(np.stack([x, y, width, height, np.where(flip < 0.5, 1, -1), *colour], 1).astype(np.float32))


def whole_views(count: int) -> torch.Tensor:
    """Return the parameters (count, 8) of views that show the whole, unchanged image."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).repeat(count, 1)


def cut_views(squares: torch.Tensor, views: torch.Tensor, size: int) -> torch.Tensor:
    """Cut views (B, 8) out of uint8 squares (B, 3, R, R): pixels (B, 3, S, S) in [0, 1]."""
    x, y, width, height, flip, brightness, contrast, saturation = views.to(squares.device).unbind(1)
    zero = torch.zeros_like(x)
    affine = torch.stack([torch.stack([flip * width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)  # (B, 2, 3)
    places = F.affine_grid(affine, [len(x), 3, size, size], align_corners=False)
    pixels = F.grid_sample(squares.float().mul_(1 / 255), places, padding_mode="reflection", align_corners=False)
    # brightness, then contrast around the view's mean, then saturation around each pixel's grey, in one pass
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in (brightness, contrast, saturation))
    scale = brightness * contrast
    grey = pixels.mean(1, keepdim=True)  # (B, 1, S, S)
    constant = (1 - contrast) * brightness * grey.mean((2, 3), keepdim=True)
    return pixels.mul_(saturation * scale).add_(grey.mul_((1 - saturation) * scale).add_(constant)).clamp_(0, 1)
