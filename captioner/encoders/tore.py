"""TORE: glimpses of an image are encoded one by one, and none of them twice (Olszewski et al., 2023, arXiv 2311.15335).

Letters: B batch, C image channels, (h, w) the map of cells of the whole image, N tokens, p prefix tokens (class token,
registers), D width, L blocks, K blocks of the iterator.

A network of L blocks is cut at block K:

    iterator     blocks [0, K) on one glimpse alone, a rectangle of cells: its patches at their true positions, and the
                 prefix tokens; what comes out are the midway tokens of the glimpse
    aggregator   blocks [K, L) and the last norm on the midway tokens of all glimpses together, and on the mean of
                 their prefix tokens

A new glimpse costs one iterator pass over its own cells and one aggregator pass; of older glimpses nothing is computed
again. Midway tokens are values that the caller holds, the encoder remembers nothing. K = 0 is the plain network on the
cells that were seen; with a larger K, a new glimpse is cheaper, and glimpses learn of each other later.

With one glimpse that covers the image, both parts together are the plain network, whatever K is. That is what a
captioner is given.
"""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import nn

from captioner.encoders.base import TokenEncoder, image_size
from captioner.encoders.vit import Place
from captioner.errors import SettingError
from captioner.grids import Grid, write_grid

Positions = Place | Sequence[Place] | torch.Tensor
"""Where glimpses are: one (row, column) for the whole batch, or one for each image (B, 2), in cells."""


class Rectangle(NamedTuple):
    """A part of an image, in cells."""

    top: int
    left: int
    rows: int
    columns: int


class MidwayTokens(NamedTuple):
    """What the iterator makes of one glimpse in each image of a batch."""

    prefix: torch.Tensor
    """The prefix tokens (B, p, D)."""
    tokens: torch.Tensor
    """The tokens that the encoder returns of this glimpse, midway: patches, or compressed tokens (B, m, D)."""
    lookup: torch.Tensor | None
    """The lookup tokens of this glimpse (B, n, D), of an encoder that has them."""
    places: tuple[Place, ...]
    """Upper left cell of the glimpse: one for the whole batch, or one for each image."""
    shape: Grid
    """Rows and columns of the glimpse, in cells."""
    size: Grid
    """The map of cells (h, w) of the whole image."""
    blocks: int
    """K, the blocks that it has passed."""
    grid: Grid | None
    """Compressed grid (r, c) of the whole image, of an encoder that chooses its grid."""


class Tore(TokenEncoder):
    """Base class of encoders that recycle tokens.

    Args:
        iterator_blocks: K where a call gives none; `None` for half of the blocks.
        options: those of the network.

    Raises:
        ValueError: there are fewer blocks than K.
    """

    def __init__(self, *, iterator_blocks: int | None = None, **options: Any):
        super().__init__(**options)
        self.iterator_blocks = self.check_blocks(self.num_blocks // 2 if iterator_blocks is None else iterator_blocks)

    # What the kinds of networks differ in

    @property
    def network_blocks(self) -> nn.Sequential:
        """The L blocks."""
        raise NotImplementedError(f"{type(self).__name__} must implement network_blocks")

    @property
    def own_map(self) -> Grid:
        """The map of cells (h, w) of an image of the encoder's own size."""
        raise NotImplementedError(f"{type(self).__name__} must implement own_map")

    def embed_glimpse(
        self, glimpse: torch.Tensor, places: Sequence[Place], size: Grid, grid: Grid | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Turn the pixels of a glimpse into what the blocks take: tokens, prefix tokens first, and lookup tokens."""
        raise NotImplementedError(f"{type(self).__name__} must implement embed_glimpse")

    def run_blocks(
        self, tokens: torch.Tensor, lookup: torch.Tensor | None, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the blocks [start, stop)."""
        raise NotImplementedError(f"{type(self).__name__} must implement run_blocks")

    def norm_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the last norm."""
        raise NotImplementedError(f"{type(self).__name__} must implement norm_tokens")

    # Iterator and aggregator

    @property
    def num_blocks(self) -> int:
        """The number of blocks L."""
        return len(self.network_blocks)

    def check_blocks(self, blocks: int) -> int:
        """Return K.

        Raises:
            SettingError: the network cannot be cut there.
        """
        if not 0 <= blocks <= self.num_blocks:
            raise SettingError(
                f"the iterator cannot have {blocks} blocks: the network has {self.num_blocks}", "encoder_options"
            )
        return blocks

    def iterate(
        self,
        glimpse: torch.Tensor,
        positions: Positions,
        *,
        blocks: int | None = None,
        image_size: tuple[int, int] | None = None,
        grid: Grid | None = None,
    ) -> MidwayTokens:
        """Run the iterator on one glimpse alone.

        Args:
            glimpse: pixels (B, C, H', W') of the glimpse, a multiple of the patch.
            positions: row and column of its upper left cell in the whole image: one pair for all images, or one for
                each (B, 2).
            blocks: K; `None` for the encoder's own.
            image_size: height and width in pixels of the whole image; `None` for the encoder's own size.
            grid: compressed grid of the whole image, of which the glimpse gets its share; `None` for the default. An
                encoder that does not choose its grid ignores it.

        Raises:
            ValueError: the glimpse is not a multiple of the patch or not within the image, the positions are not pairs
                of integers, the grid is larger than the map of cells, or there are fewer blocks than K.
        """
        blocks = self.check_blocks(self.iterator_blocks if blocks is None else blocks)
        size = self.own_map if image_size is None else self.largest_grid(image_size)
        shape = self.largest_grid((glimpse.shape[-2], glimpse.shape[-1]))
        places = read_positions(positions, len(glimpse))
        for top, left in places:
            if top < 0 or left < 0 or top + shape[0] > size[0] or left + shape[1] > size[1]:
                raise ValueError(
                    f"a glimpse of {write_grid(shape)} cells at row {top}, column {left} is not within the "
                    f"{write_grid(size)} cells of the image"
                )
        grid = self.check_grid(grid or self.grid, size) if self.chooses_grid else None
        tokens, lookup = self.run_blocks(*self.embed_glimpse(glimpse, places, size, grid), 0, blocks)
        prefix, tokens = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        return MidwayTokens(prefix, tokens, lookup, places, shape, size, blocks, grid)

    def aggregate(self, glimpses: Iterable[MidwayTokens]) -> torch.Tensor:
        """Run the aggregator on all glimpses.

        Args:
            glimpses: what `iterate` returned for each of them; their order decides that of the tokens alone.

        Returns:
            The prefix tokens, then the tokens of each glimpse, in the order of the glimpses (B, p + m_1 + m_2 + .., D).

        Raises:
            ValueError: there are no glimpses, two of them overlap, or they were not made for the same images, K and
                grid.
        """
        glimpses = list(glimpses)
        check_glimpses(glimpses)
        prefix = torch.stack([glimpse.prefix for glimpse in glimpses]).mean(0)  # (B, p, D)
        tokens = torch.cat([prefix, *(glimpse.tokens for glimpse in glimpses)], 1)
        looked = [glimpse.lookup for glimpse in glimpses if glimpse.lookup is not None]
        lookup = torch.cat(looked, 1) if looked else None
        return self.norm_tokens(self.run_blocks(tokens, lookup, glimpses[0].blocks, self.num_blocks)[0])

    def cover(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) as one glimpse that covers the image; arguments and errors as `iterate`."""
        return self.aggregate([self.iterate(pixel_values, (0, 0), image_size=image_size(pixel_values), grid=grid)])

    # Training

    def forward_glimpses(
        self,
        pixel_values: torch.Tensor,
        rectangles: Iterable[Rectangle],
        blocks: int | None = None,
        grid: Grid | None = None,
    ) -> torch.Tensor:
        """Cut the same glimpses out of whole images (B, C, H, W), iterate on each and aggregate, with gradients.

        Args:
            rectangles: the glimpses, as `draw_glimpses` returns them.
            blocks: K; `None` for the encoder's own.
            grid: compressed grid of the whole image; `None` for the default.

        Returns:
            What `aggregate` returns.

        Raises:
            ValueError: as `iterate` and `aggregate`.
        """
        whole = image_size(pixel_values)
        rows, columns = self.largest_grid(whole)
        height, width = whole[0] // rows, whole[1] // columns  # of a cell, in pixels
        midway = []
        for top, left, down, right in rectangles:
            part = pixel_values[..., top * height : (top + down) * height, left * width : (left + right) * width]
            midway.append(self.iterate(part, (top, left), blocks=blocks, image_size=whole, grid=grid))
        return self.aggregate(midway)

    def draw_glimpses(
        self, image_size: tuple[int, int], most: int = 8, generator: torch.Generator | None = None
    ) -> tuple[int, list[Rectangle]]:
        """Draw a training step: K evenly from 0 to L, and a random set of rectangular glimpses that do not overlap.

        The image is cut into a random number of rectangles, of which a random share is seen, in random order.

        Args:
            image_size: height and width in pixels of the whole image.
            most: largest number of glimpses.
            generator: source of the random numbers; `None` for torch's own.

        Returns:
            K and the glimpses, for `forward_glimpses`.

        Raises:
            ValueError: the image is not a multiple of the patch, or no glimpse is allowed.
        """
        if most < 1:
            raise ValueError(f"a step needs at least one glimpse, not {most}")

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        blocks, parts = draw(0, self.num_blocks), [Rectangle(0, 0, *self.largest_grid(image_size))]
        for _ in range(draw(1, most) - 1):
            large = [i for i, part in enumerate(parts) if part.rows * part.columns > 1]
            if not large:
                break
            top, left, rows, columns = parts.pop(large[draw(0, len(large) - 1)])
            cut = draw(1, rows + columns - 2)  # each line between two rows or two columns alike
            if cut < rows:
                parts += [Rectangle(top, left, cut, columns), Rectangle(top + cut, left, rows - cut, columns)]
            else:
                cut -= rows - 1
                parts += [Rectangle(top, left, rows, cut), Rectangle(top, left + cut, rows, columns - cut)]
        order = torch.randperm(len(parts), generator=generator).tolist()
        return blocks, [parts[i] for i in order[: draw(1, len(parts))]]


def read_positions(positions: Any, batch: int) -> tuple[Place, ...]:
    """Return the positions of a glimpse as pairs of integers: one for the whole batch, or one for each image.

    Raises:
        ValueError: they are none of that.
    """
    try:
        values = positions.tolist() if hasattr(positions, "tolist") else list(positions)
        places = (read_pair(values),) if len(values) == 2 and is_integer(values[0]) else tuple(map(read_pair, values))
    except (TypeError, ValueError):
        places = ()
    if not places:
        raise ValueError(f"positions are {positions}, not a row and a column, or one pair for each image")
    if len(places) not in (1, batch):
        raise ValueError(f"there are {len(places)} positions for a glimpse in each of {batch} images")
    return places


def read_pair(values: Any) -> Place:
    """Return two integers.

    Raises:
        TypeError: they are no integers.
        ValueError: they are not two.
    """
    row, column = values
    return index(row), index(column)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python, numpy or torch."""
    return not isinstance(value, Sequence) and hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def check_glimpses(glimpses: Sequence[MidwayTokens]) -> None:
    """Refuse glimpses that cannot be aggregated.

    Raises:
        ValueError: there are none, two overlap in an image, or they were not made for the same images, K and grid.
    """
    if not glimpses:
        raise ValueError("there are no glimpses to aggregate")
    facts: dict[str, list] = {
        "batches": [len(glimpse.tokens) for glimpse in glimpses],
        "iterators' blocks": [glimpse.blocks for glimpse in glimpses],
        "cells of the image": [write_grid(glimpse.size) for glimpse in glimpses],
        "compressed grids": [glimpse.grid and write_grid(glimpse.grid) for glimpse in glimpses],
    }
    for what, values in facts.items():
        if differing := [value for value in values if value != values[0]]:
            raise ValueError(f"glimpses do not belong together: their {what} are {values[0]} and {differing[0]}")
    for number, one in enumerate(glimpses):
        for other in range(number):
            places = zip_places(one, glimpses[other])
            for image, ((top, left), (other_top, other_left)) in enumerate(places):
                shape, other_shape = one.shape, glimpses[other].shape
                rows = top < other_top + other_shape[0] and other_top < top + shape[0]
                if rows and left < other_left + other_shape[1] and other_left < left + shape[1]:
                    where = f" in image {image}" if len(places) > 1 else ""
                    raise ValueError(f"glimpses {other} and {number} overlap{where}; a cell is seen once")


def zip_places(one: MidwayTokens, other: MidwayTokens) -> list[tuple[Place, Place]]:
    """Return the places of two glimpses in each image, once where both have the same for the whole batch."""
    count = max(len(one.places), len(other.places))
    return [(one.places[i % len(one.places)], other.places[i % len(other.places)]) for i in range(count)]
