"""From the caption table to training batches: several captions of a picture share its one encoding.

Letters: B pictures, K captions of each, T text tokens, M image tokens, D their width.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from captioner.data.stream import SeededStream
from captioner.data.token_cache import CachedPictures, TokenCache
from captioner.grids import Grid
from captioner.images import ImageError
from captioner.processing import CaptionerProcessor

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class PictureFiles:
    """The pictures of a caption table as the model takes them, from their files: `pixel_values` (B, 3, H, W).

    `CachedPictures` is the same from a token cache, with `image_tokens` (B, M, D).
    """

    views = 1

    def __init__(self, table: "datasets.Dataset", processor: CaptionerProcessor):
        self.table, self.processor = table, processor

    def __len__(self) -> int:
        return len(self.table)

    def workers(self, wanted: int) -> int:
        """Return how many loading processes are worth having: those wanted."""
        return wanted

    def open(self, number: int) -> torch.Tensor:
        """Open picture `number` as pixels (3, H, W).

        Raises:
            ImageError: it cannot be used.
        """
        return self.processor.pixels(self.table[number]["image"])

    def batch(
        self, opened: Sequence[torch.Tensor], views: Sequence[int] | None = None, grid: Grid | None = None
    ) -> dict[str, torch.Tensor | Grid]:
        """Stack B opened pictures; the `grid`, if one is given, goes along for the encoder."""
        return {"pixel_values": torch.stack(list(opened))} | ({"grid": grid} if grid else {})


Pictures = PictureFiles | CachedPictures


def open_pictures(
    table: "datasets.Dataset",
    processor: CaptionerProcessor,
    cache: TokenCache | None = None,
    required: bool = True,
) -> Pictures:
    """Open the pictures of a table from a cache if there is one, else from their files.

    Args:
        required: whether a cache that lacks some of them is an error, or their files are taken, with a warning.

    Raises:
        ValueError: the cache lacks pictures, or they are not the files that were encoded.
    """
    if cache is not None and (required or not cache.missing(table)):
        return cache.pictures(table)
    if cache is not None:
        logger.warning("'%s' lacks pictures of the split '%s': they are encoded anew", cache.folder, table[0]["split"])
    return PictureFiles(table, processor)


class PictureRows(Dataset):
    """The pictures of a table one by one, each with its row: opened, or the error of one that cannot be."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | int | str]:
        try:
            return row, self.pictures.open(row)
        except ImageError as error:
            return row, str(error)


class CaptionStream(SeededStream):
    """Pictures of a caption table, each with K of its captions, drawn without repetition as far as there are K.

    Args:
        table: the caption table.
        processor: the model's processor.
        captions_per_image: K.
        seed: decides order, captions, views and grids.
        pictures: where the pictures come from; the files of the table if absent.
        grids: compressed grids, of which each optimiser step draws one; without any, the model's own.
        per_step: pictures of an optimiser step, over all processes.
    """

    def __init__(
        self,
        table: "datasets.Dataset",
        processor: CaptionerProcessor,
        captions_per_image: int,
        seed: int,
        pictures: Pictures | None = None,
        grids: Sequence[Grid] = (),
        per_step: int = 1,
    ):
        super().__init__(len(table), seed, grids, per_step)
        self.pictures = pictures or PictureFiles(table, processor)
        self.texts = processor.texts([caption for group in table["captions"] for caption in group])
        self.counts = [len(group) for group in table["captions"]]
        self.firsts = np.cumsum([0, *self.counts]).tolist()
        self.captions_per_image = captions_per_image

    def load(self, number: int, i: int) -> dict:
        """Open picture `number`, draw its captions (as rows of all texts) and one of its views."""
        picture, random = self.pictures.open(number), self.generator(i)
        order = random.permutation(self.counts[number]).tolist()
        captions = [self.firsts[number] + order[k % len(order)] for k in range(self.captions_per_image)]
        view = int(random.integers(self.pictures.views))
        return {"row": number, "picture": picture, "captions": captions, "view": view}

    def loader(self, start: int, stop: int, batch_size: int, workers: int, collate_fn=None) -> DataLoader:
        """Load the items from position `start` to `stop` in batches, in as many processes as the pictures need."""
        return super().loader(start, stop, batch_size, self.pictures.workers(workers), collate_fn)

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor | Grid]:
        """Batch B items.

        Returns:
            `pixel_values` (B, 3, H, W) and the step's `grid`, if any, or `image_tokens` (B, M, D) at it; the `rows` of
            the pictures in the table (B,); and the text tensors of `Texts.batch` (B*K, T).
        """
        opened, views = ([item[name] for item in items] for name in ("picture", "view"))
        pictures = self.pictures.batch(opened, views, self.grid(items))
        pictures["rows"] = torch.tensor([item["row"] for item in items])
        return pictures | self.texts.batch([caption for item in items for caption in item["captions"]])
