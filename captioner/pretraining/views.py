"""Random views of images. A seed decides their order and their content; they are cut on the device of the images.

Letters: B batch, R side of a stored square, S side of a view, both in pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

JITTER = 0.2
"""Largest relative change of brightness, contrast and saturation."""


class ViewOrder:
    """The view at each position of an endless run. It depends on seed and position alone.

    Each epoch has all images in a new order. So processes can share the positions, and a run can resume at any of them.

    Args:
        groups: rows of the images of each source.
        repeats: how often the images of each source occur in an epoch.
        seed: seed of the order.
        versions: number of distinct views of an image, used in turn; `None` for a new view each time.
    """

    def __init__(self, groups: Sequence[np.ndarray], repeats: Sequence[int], seed: int, versions: int | None = None):
        copies = [(np.tile(g, r), np.repeat(np.arange(r), len(g)), r) for g, r in zip(groups, repeats, strict=True)]
        self.rows = np.concatenate([rows for rows, _, _ in copies])
        self.turns = np.concatenate([turns for _, turns, _ in copies])
        self.repeats = np.concatenate([np.full(len(rows), r) for rows, _, r in copies])
        self.seed, self.versions = seed, versions

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as the run
    def shuffled(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch, a permutation of `rows`."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))

    def views(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (B,) and versions (B,) of the views at positions `start` to `start + count`."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self.rows))
        picked = np.concatenate([self.shuffled(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        versions = epochs * self.repeats[picked] + self.turns[picked]
        return self.rows[picked], versions if self.versions is None else versions % self.versions


def uniforms(seed: int, rows: np.ndarray, versions: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` numbers in [0, 1) for each view, (B, count). The same view always gets the same numbers.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) hashes seed, image and version.

    Args:
        seed: seed of the run.
        rows: image of each view, (B,).
        versions: version of each view, (B,).
        count: numbers for each view.
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

    The crop is that of Inception (Szegedy et al., CVPR 2015): a rectangle with a share of the area in [min_crop, 1] and
    an aspect ratio in [4/5, 5/4].

    Args:
        seed: seed of the run. Seed, image and version decide everything.
        rows: image of each view, (B,).
        versions: version of each view, (B,).
        min_crop: smallest share of the image's area.

    Returns:
        Parameters (B, 8): x and y of the centre, half the width and half the height (the square is [-1, 1] in both
        directions); flip (1 or -1); factors of brightness, contrast and saturation.
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
    """Cut views out of squares.

    Args:
        squares: images (B, 3, R, R), uint8.
        views: parameters (B, 8), as `draw_views` returns them.
        size: S, the side of a view in pixels.

    Returns:
        Pixels (B, 3, S, S) in [0, 1].
    """
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
