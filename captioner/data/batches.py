"""Make training batches from the caption table; several captions of an image share its encoding.

Letters: B images, K captions of each, T text tokens, M image tokens, D their width.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from captioner.data.stream import SeededStream
from captioner.data.token_cache import CachedImages, TokenCache
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


Images = ImageFiles | CachedImages


def open_images(
    table: "datasets.Dataset",
    processor: CaptionerProcessor,
    cache: TokenCache | None = None,
    required: bool = True,
) -> Images:
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


class ImageRows(Dataset):
    """A data set of the images of a table: each item is a row, and its opened image or the text of its error."""

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | int | str]:
        try:
            return row, self.images.open(row)
        except ImageError as error:
            return row, str(error)


class CaptionStream(SeededStream):
    """Images of a caption table, each with K of its captions; none repeats if the image has at least K.

    Args:
        table: the caption table.
        processor: the model's processor.
        captions_per_image: K.
        seed: decides order, captions, views and grids.
        images: source of the images; `None` for the files of the table.
        grids: compressed grids, of which each optimiser step draws one; without any, the model's own.
        per_step: images of an optimiser step, over all processes.
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
    ):
        super().__init__(len(table), seed, grids, per_step)
        self.images = images or ImageFiles(table, processor)
        self.texts = processor.texts([caption for group in table["captions"] for caption in group])
        self.texts.warn_cut(processor.max_length)
        self.counts = [len(group) for group in table["captions"]]
        self.firsts = np.cumsum([0, *self.counts]).tolist()
        self.captions_per_image = captions_per_image

    def load(self, number: int, i: int) -> dict:
        """Open image `number`, and draw one of its views and its captions, as numbers of texts."""
        image, random = self.images.open(number), self.generator(i)
        order = random.permutation(self.counts[number]).tolist()
        captions = [self.firsts[number] + order[k % len(order)] for k in range(self.captions_per_image)]
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
            the images in the table (B,); and the text tensors of `Texts.batch` (B*K, T).
        """
        opened, views = ([item[name] for item in items] for name in ("image", "view"))
        images = self.images.batch(opened, views, self.grid(items))
        images["rows"] = torch.tensor([item["row"] for item in items])
        return images | self.texts.batch([caption for item in items for caption in item["captions"]])
