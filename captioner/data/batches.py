"""Make training batches from the caption table; several captions of an image share its encoding.

Letters: B images, N captions of these images, T text tokens, M image tokens, D their width.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from captioner.data.sets import distinct_rows, join_sets, value_of
from captioner.data.stream import SeededStream
from captioner.data.token_cache import CachedImages, TokenCache
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.images import ImageError
from captioner.processing import CaptionerProcessor

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class ImageFiles:
    """The images of a caption table, read from their files as `pixel_values` (B, 3, H, W).

    `CachedImages` reads them from a token cache, as `image_tokens` (B, M, D).
    """

    views = 1

    def __init__(self, table: "datasets.Dataset", processor: CaptionerProcessor):
        self.table, self.processor = table, processor

    def __len__(self) -> int:
        return len(self.table)

    def workers(self, count: int) -> int:
        """Return the number of loading processes to start, if `count` are configured: `count`."""
        return count

    def open(self, number: int) -> torch.Tensor:
        """Open image `number` as pixels (3, H, W).

        Raises:
            ImageError: the image cannot be used.
        """
        return self.processor.pixels(self.table[number]["image"])

    def batch(
        self, opened: Sequence[torch.Tensor], views: Sequence[int] | None = None, grid: Grid | None = None
    ) -> dict[str, torch.Tensor | Grid]:
        """Stack B opened images into `pixel_values` (B, 3, H, W); a `grid` is added to them.

        Args:
            opened: the images, as `open` returns them.
            views: ignored; a file has one view.
            grid: compressed grid for the encoder.
        """
        return {"pixel_values": torch.stack(list(opened))} | ({"grid": grid} if grid else {})


class JoinedImages:
    """The images of several data sets, numbered as in their joined table.

    Args:
        parts: the images of each set.

    Raises:
        SettingError: token caches of the sets have different numbers of views.
    """

    def __init__(self, parts: Sequence[ImageFiles | CachedImages]):
        self.parts, self.views = list(parts), parts[0].views
        if len(found := {part.views for part in parts}) > 1:
            raise SettingError(
                f"the token caches hold {' and '.join(map(str, sorted(found)))} views of an image; those of all data "
                "sets must hold equally many",
                "tokens",
            )
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def workers(self, count: int) -> int:
        """Return the number of loading processes to start, if `count` are configured."""
        return max(part.workers(count) for part in self.parts)

    def open(self, number: int) -> tuple[int, Any]:
        """Open image `number`; returns the number of its set, and the image in the form for the set's `batch`.

        Raises:
            ImageError: the image cannot be used.
        """
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, self.parts[part].open(number - int(self.starts[part]))

    def batch(
        self, opened: Sequence[tuple[int, Any]], views: Sequence[int] | None = None, grid: Grid | None = None
    ) -> dict[str, torch.Tensor | Grid]:
        """Batch B images; see `batch` of `ImageFiles` and `CachedImages`."""
        batch: dict[str, torch.Tensor | Grid] = {}
        for number, part in enumerate(self.parts):
            places = [place for place, (owner, _) in enumerate(opened) if owner == number]
            if not places:
                continue
            some = part.batch([opened[p][1] for p in places], [views[p] for p in places] if views else None, grid)
            for name, value in some.items():
                if isinstance(value, torch.Tensor):
                    whole = batch.setdefault(name, value.new_empty(len(opened), *value.shape[1:]))
                    assert isinstance(whole, torch.Tensor)
                    whole[places] = value
                else:
                    batch[name] = value
        return batch


Images = ImageFiles | CachedImages | JoinedImages


def open_images(
    table: "datasets.Dataset",
    processor: CaptionerProcessor,
    cache: TokenCache | None = None,
    required: bool = True,
) -> ImageFiles | CachedImages:
    """Open the images of a table: from a cache if there is one, else from their files.

    Args:
        table: the caption table.
        processor: the model's processor.
        cache: the token cache, if there is one.
        required: whether a cache that lacks images of the table is an error. Otherwise all images are read from their
            files, with a warning.

    Raises:
        ValueError: the cache lacks images, or they are not the files that were encoded.
    """
    if cache is not None and (required or not cache.missing(table)):
        return cache.images(table)
    if cache is not None:
        logger.warning(
            "'%s' lacks images of the split '%s': all are encoded again from their files",
            cache.folder,
            table[0]["split"],
        )
    return ImageFiles(table, processor)


def open_sets(
    tables: Mapping[int, "datasets.Dataset"],
    processor: CaptionerProcessor,
    caches: Sequence[TokenCache],
    required: bool = True,
) -> list[ImageFiles | CachedImages]:
    """Open the images of several data sets, each as `open_images` does.

    Args:
        tables: the caption table of each set, by the set's number.
        processor: the model's processor.
        caches: token caches: none, one for all sets, or one for each set.
        required: see `open_images`.

    Raises:
        SettingError: the sets share a cache, and images of them have the same id and name.
        ValueError: a cache lacks images, or they are not the files that were encoded.
    """
    if len(caches) == 1 and len(tables) > 1:
        distinct_rows(join_sets(list(tables.values())))
    return [open_images(table, processor, value_of(caches, n), required) for n, table in tables.items()]


class ImageRows(Dataset):
    """A data set of the images of a table: each item is a row, and its opened image or the text of its error."""

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, row: int) -> tuple[int, Any]:
        try:
            return row, self.images.open(row)
        except ImageError as error:
            return row, str(error)


class CaptionStream(SeededStream):
    """Images of a caption table, each with some of its captions, of which none repeats.

    Args:
        table: the caption table.
        processor: the model's processor.
        captions_per_image: most captions of an image. Of an image with more, some are drawn.
        seed: decides order, captions, views and grids.
        images: source of the images; `None` for the files of the table.
        grids: compressed grids, of which each optimiser step draws one; without any, the model's own.
        per_step: images of an optimiser step, over all processes.
        weights: for each data set in the table, in order, its number of images, and how often each of them comes in an
            epoch; without any, each image of the table comes once.
    """

    def __init__(
        self,
        table: "datasets.Dataset",
        processor: CaptionerProcessor,
        captions_per_image: int,
        seed: int,
        images: Images | None = None,
        grids: Sequence[Grid] = (),
        per_step: int = 1,
        weights: Sequence[tuple[int, float]] = (),
    ):
        self.weights = weights or [(len(table), 1.0)]
        super().__init__(epoch_size(self.weights), seed, grids, per_step)
        self.images = images or ImageFiles(table, processor)
        self.texts = processor.texts([caption for group in table["captions"] for caption in group])
        self.texts.warn_cut(processor.max_length)
        self.counts = [len(group) for group in table["captions"]]
        self.firsts = np.cumsum([0, *self.counts]).tolist()
        self.captions_per_image = captions_per_image

    @lru_cache(maxsize=2)  # noqa: B019 - a stream lives as long as the run
    def order(self, epoch: int) -> np.ndarray:
        """Return the rows of the images in an epoch, in order (size,)."""
        random, start, rows = np.random.default_rng((self.seed, epoch)), 0, []
        for size, weight in self.weights:
            times, rest = divmod(round(size * weight), size)
            rows += [start + np.arange(size)] * times
            if rest:
                rows.append(start + random.permutation(size)[:rest])
            start += size
        return random.permutation(np.concatenate(rows))

    def load(self, number: int, i: int) -> dict:
        """Open image `number`, and draw one of its views and its captions, as numbers of texts."""
        image, random = self.images.open(number), self.generator(i)
        order = random.permutation(self.counts[number]).tolist()
        captions = [self.firsts[number] + place for place in order[: self.captions_per_image]]
        view = int(random.integers(self.images.views))
        return {"row": number, "image": image, "captions": captions, "view": view}

    def loader(
        self, start: int, stop: int, batch_size: int, workers: int, collate_fn: Callable | None = None
    ) -> DataLoader:
        """Load the items from position `start` to `stop` in batches; cached images need no loading processes."""
        return super().loader(start, stop, batch_size, self.images.workers(workers), collate_fn)

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor | Grid]:
        """Batch B items.

        Returns:
            `pixel_values` (B, 3, H, W) and the step's `grid`, if any, or `image_tokens` (B, M, D) at it; the `rows` of
            the images in the table (B,); the text tensors of `Texts.batch` (N, T); and `owners` (N,), the number of the
            image in the batch that each text is about.
        """
        opened, views = ([item[name] for item in items] for name in ("image", "view"))
        images = self.images.batch(opened, views, self.grid(items))
        images["rows"] = torch.tensor([item["row"] for item in items])
        images["owners"] = owners_of([item["captions"] for item in items])
        return images | self.texts.batch([caption for item in items for caption in item["captions"]])


def owners_of(groups: Sequence[Sequence]) -> torch.Tensor:
    """Return the number of the group that each member of the groups belongs to."""
    return torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))


def epoch_size(weights: Sequence[tuple[int, float]]) -> int:
    """Return the number of images in an epoch, from each data set's number of images and its weight."""
    return sum(round(size * weight) for size, weight in weights)
