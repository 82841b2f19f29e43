"""The training stream of a `datasets` set that is too large for memory; `rows.py` has the order of its rows.

Letters: B images, N captions of these images, T text tokens.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader

from captioner.data.batches import owners_of
from captioner.data.caption_table import one_line
from captioner.data.captions import Captions, read_captions_of
from captioner.data.records import OnBad
from captioner.data.rows import StreamedRows
from captioner.data.stream import SeededStream
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.images import ImageError
from captioner.processing import CaptionerProcessor

logger = logging.getLogger(__name__)


class RowReader:
    """Reads rows in order, and returns them by their position in the endless stream; several threads may call it.

    Args:
        start_at: returns the rows from a position on.
    """

    def __init__(self, start_at: Callable[[int], Iterator[dict]]):
        self.start_at, self.lock = start_at, threading.Lock()
        self.rows: Iterator[dict] = iter(())
        self.first, self.next = 0, -1
        self.held: dict[int, dict] = {}

    def seek(self, start: int) -> None:
        """Drop the rows before a position. For an earlier position, its epoch is read again from the start."""
        if start < self.first or self.next < 0:
            self.rows, self.next, self.held = self.start_at(start), start, {}
        for place in [place for place in self.held if place < start]:
            del self.held[place]
        while self.next < start:
            next(self.rows)
            self.next += 1
        self.first = start

    def row(self, place: int) -> dict:
        """Return the row at a position; rows before it that were not read yet are read first."""
        with self.lock:
            while self.next <= place:
                self.held[self.next] = next(self.rows)
                self.next += 1
            return self.held[place]


class RowStream(SeededStream):
    """Rows of a `datasets` set, each with some of its captions, of which none repeats.

    Every process reads all rows in one loading process of its own. The threads of that loading process open the images
    of its share. It holds the shuffle buffer, in which images are encoded. For a row that cannot be used, a warning
    comes once in an epoch, and the next row is used instead.

    Args:
        rows: the split.
        processor: the model's processor.
        captions_per_image: most captions of a row. Of a row with more, some are drawn.
        seed: decides order and captions.
        buffer: rows in the shuffle buffer.
        on_bad: whether an unusable row is skipped or refused.
        grids: compressed grids, of which each optimiser step draws one; without any, the model's own.
        per_step: rows of an optimiser step, over all processes.
    """

    def __init__(
        self,
        rows: StreamedRows,
        processor: CaptionerProcessor,
        captions_per_image: int,
        seed: int,
        buffer: int = 10_000,
        on_bad: OnBad = "skip",
        grids: Sequence[Grid] = (),
        per_step: int = 1,
    ):
        super().__init__(len(rows), seed, grids, per_step)
        self.rows, self.processor, self.captions_per_image = rows, processor, captions_per_image
        self.buffer, self.on_bad = buffer, on_bad
        self.threads, self.cut_reported = 1, False
        self.lacking: set[int] = set()  # positions of rows with captions that cannot be used
        self.reader: RowReader | None = None  # the loading process opens it

    def choose(self, i: int, attempt: int) -> int:
        """Return the position of the row to try at position i."""
        return i + attempt

    def load(self, number: int, i: int) -> dict:
        """Open the image of the row at position `number` and draw its captions.

        Raises:
            ImageError: the row cannot be used and is skipped.
            ValueError: the row cannot be used, and `on_bad` is `refuse`.
        """
        assert self.reader is not None, "only __getitems__ reads rows"
        row, random = self.reader.row(number), self.generator(i)
        found = read_captions_of(row[self.rows.columns[1]])
        try:
            if not found.texts or (self.on_bad == "refuse" and found.empty + found.unreadable):
                raise ImageError(describe_captions(found))
            image = self.processor.pixels(self.rows.image(row))
        except ImageError as error:
            if self.on_bad == "refuse":
                raise SettingError(f"{self.name_row(row, number)}: {error}", "on_bad") from None
            raise ImageError(f"{self.name_row(row, number)}: {error}") from None
        if found.empty + found.unreadable and number not in self.lacking:
            self.lacking.add(number)
            logger.warning(
                "%s: %s, left out (%d rows so far)",
                *(self.name_row(row, number), describe_captions(found), len(self.lacking)),
            )
        captions = [one_line(text) for text in found.texts]
        order = random.permutation(len(captions)).tolist()
        drawn = [captions[place] for place in order[: self.captions_per_image]]
        return {"image": image, "captions": drawn}

    def name_row(self, row: dict, number: int) -> str:
        """Return the name of a row in messages: its image id if it has one, else its position."""
        label = row[self.rows.columns[2]]
        return f"row {number} of the stream" if label is None else f"image {label}"

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, positions: list[int]) -> list[dict]:
        """Return the items of a batch: its rows are read in order, then threads open its images."""
        self.reader = self.reader or RowReader(lambda start: self.rows.from_position(start, self.seed, self.buffer))
        self.reader.seek(min(positions))
        self.reader.row(max(positions))
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(super().__getitem__, positions))

    def loader(
        self, start: int, stop: int, batch_size: int, workers: int, collate_fn: Callable | None = None
    ) -> DataLoader:
        """Load the items from position `start` to `stop` in batches, in one loading process with `workers` threads.

        Each further loading process would read all rows and hold a buffer of its own.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # without it, tokenizers warn of the loading process
        self.threads = max(1, workers)
        return super().loader(start, stop, batch_size, min(workers, 1), collate_fn)

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor | Grid]:
        """Batch B items.

        Returns:
            `pixel_values` (B, 3, H, W); the step's `grid`, if any; the text tensors of `Texts.batch` (N, T); and
            `owners` (N,), the number of the image in the batch that each text is about.
        """
        images: dict[str, torch.Tensor | Grid] = {"pixel_values": torch.stack([item["image"] for item in items])}
        if grid := self.grid(items):
            images["grid"] = grid
        texts = self.processor.texts([caption for item in items for caption in item["captions"]])
        if texts.cut and not self.cut_reported:
            self.cut_reported = True
            texts.warn_cut(self.processor.max_length, "of one batch (no other is reported)")
        images["owners"] = owners_of([item["captions"] for item in items])
        return images | texts.batch(range(len(texts)))


def describe_captions(found: Captions) -> str:
    """Return what is wrong with the captions of a row."""
    if not (found.texts or found.empty or found.unreadable):
        return "it has no caption"
    kinds = {"empty captions": found.empty, "unreadable captions": found.unreadable}
    wrong = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return wrong if found.texts else f"it has no caption, only {wrong}"
