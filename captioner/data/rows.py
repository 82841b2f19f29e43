"""Read the rows of a `datasets` set that is too large for memory, one by one, in a shuffled order.

A row is one image with its captions, a text or a list of texts; rows of the same image are not joined. Only the seed
decides the order of an epoch: the files (shards) of the set are read in a random order, and their rows pass through a
shuffle buffer. So every process has the same row at the same position, and opens only the images of its own positions.
A resumed run reads the rows before its position again, which takes time but opens no image.
"""

import logging
from collections.abc import Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captioner.data.caption_table import build_table, one_line
from captioner.data.captions import read_captions_of
from captioner.data.columns import Columns, find_columns
from captioner.data.dataset_files import check_hub, dataset_records, is_hub_id, is_saved_set, pick_split
from captioner.data.image_finder import ImageFinder
from captioner.data.readers import read_captions
from captioner.data.records import OnBad
from captioner.errors import SettingError, first_line
from captioner.images import MAX_BYTES, ImageError, ImageSource

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

TOKENIZER_ROWS = 20_000
"""Number of rows whose captions train the tokenizer of a decoder from scratch."""

LOCAL_SHARDS = 64
"""Number of parts in which a set saved on disk is read; a set of parquet files is read file by file."""

HUB = "hf://datasets/"
"""Prefix of the paths of images that a set on the hub stores as files."""


class StreamedRows:
    """One split of a `datasets` set, read row by row.

    Args:
        source: a hub id, a folder saved by `datasets`, or a folder of parquet files.
        split: the source's own name of the split.
        columns: names of the columns of image, captions and image id; the last may be missing.
        size: rows in an epoch; `None` for all rows of the split.
        images: folder of the images, for a set with names of image files.

    Raises:
        SettingError: there is no such split or column, or the number of rows is unknown.
        ValueError: there is no such set, or the source is of another kind.
        FileNotFoundError: the source is missing.
    """

    def __init__(
        self,
        source: str,
        split: str,
        columns: tuple[str, str, str] = Columns(),
        size: int | None = None,
        images: Path | None = None,
    ):
        self.rows, known = open_split(source, split)
        self.name, self.split = f"'{source}', split '{split}'", split
        image, captions, image_id = find_columns(first_row(self.rows, self.name), Columns(*columns), self.name)
        self.columns = image, captions, image_id or columns[2]
        if (size or known) is None:
            raise SettingError(f"the number of rows of {self.name}, is unknown", "stream_rows")
        self.size: int = size or known or 0
        self.find = ImageFinder(Path(source) if Path(source).is_dir() else Path(), images)

    def __len__(self) -> int:
        return self.size

    def first_captions(self) -> list[str]:
        """Return the captions of the first `TOKENIZER_ROWS` rows."""
        column = self.columns[1]
        rows = self.rows.select_columns(column).take(min(TOKENIZER_ROWS, self.size))
        return [one_line(caption) for row in rows for caption in read_captions_of(row.get(column)).texts]

    def epoch(self, number: int, seed: int, buffer: int) -> Iterator[dict]:
        """Yield the rows of an epoch in its own order; images stay encoded.

        Args:
            number: number of the epoch.
            seed: seed of the order.
            buffer: rows in the shuffle buffer.

        Raises:
            ValueError: the split has fewer rows than an epoch.
        """
        random = np.random.default_rng((seed, number))
        shards = self.rows.num_shards
        order = random.permutation(shards).tolist()
        rows = chain.from_iterable(self.rows.shard(shards, shard) for shard in order)
        slim = ({column: row.get(column) for column in self.columns} for row in rows)
        had = 0
        for row in islice(shuffled(slim, buffer, random), self.size):
            had += 1
            yield row
        if had < self.size:
            raise SettingError(f"{self.name}, has {had} rows, not {self.size}", "stream_rows")

    def from_position(self, start: int, seed: int, buffer: int) -> Iterator[dict]:
        """Yield rows from a position on, epoch after epoch without end; the rows before it in its epoch are skipped."""
        first, skip = divmod(start, self.size)
        epochs = (self.epoch(number, seed, buffer) for number in count(first))
        return chain(islice(next(epochs), skip, None), chain.from_iterable(epochs))

    def image(self, row: dict) -> ImageSource:
        """Return the image of a row, still encoded.

        Raises:
            ImageError: the row has no image.
        """
        image = row[self.columns[0]]
        if isinstance(image, str):
            image = self.find(image, self.split)
            if image is None:
                raise ImageError(f"no file '{row[self.columns[0]]}'")
            return image
        if isinstance(image, Mapping):
            path = image.get("path")
            if image.get("bytes") is None and isinstance(path, str):
                return fetch(path) if path.split("::")[-1].startswith(HUB) else path
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise ImageError(f"column '{self.columns[0]}' holds no image")
        return image


def open_split(source: str, split: str) -> tuple["datasets.IterableDataset", int | None]:
    """Open one split as a stream of encoded images.

    Returns:
        The stream, and its number of rows; None if the rows would have to be read to count them.

    Raises:
        ValueError: there is no such set or split, or the source is of another kind.
        FileNotFoundError: the source is missing.
    """
    import datasets
    import pyarrow.parquet

    path = Path(source)
    saved, parquet = is_saved_set(path), path.is_dir() and any(path.rglob("*.parquet"))
    if path.exists() and not saved and not parquet:
        raise SettingError(
            f"'{source}' is no `datasets` set and no folder of parquet files, so that it cannot be streamed",
            "streaming",
        )
    if not path.exists():
        if not is_hub_id(source):
            raise FileNotFoundError(f"no data set at '{source}'")
        check_hub(source)
    try:
        if saved:
            loaded = datasets.load_from_disk(source)
            parts = loaded if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
        else:
            place = {"path": "parquet", "data_dir": source} if parquet else {"path": source}
            builder = datasets.load_dataset_builder(**place)
            parts = builder.as_streaming_dataset()
    except (FileNotFoundError, ValueError, OSError, ConnectionError) as error:
        raise SettingError(f"cannot load '{source}' as a data set: {first_line(error)}", "root") from None
    split = pick_split(parts, split, source)
    rows, known = parts[split], None
    if saved:
        known = len(rows)
        rows = rows.to_iterable_dataset(num_shards=min(LOCAL_SHARDS, max(1, known)))
    elif parquet:
        known = sum(pyarrow.parquet.read_metadata(file).num_rows for file in builder.config.data_files[split])
    elif split in (builder.info.splits or {}):
        known = builder.info.splits[split].num_examples
    return rows.decode(False) if rows.features else rows, known or None


def first_row(rows: "datasets.IterableDataset", name: str) -> dict:
    """Return the first row of a stream.

    Raises:
        ValueError: there are no rows.
    """
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{name}, has no rows")
    return first


def read_first(
    source: str, split: str, columns: tuple[str, str, str], limit: int | None, on_bad: OnBad, images: Path | None = None
) -> "datasets.Dataset":
    """Read the caption table of the first rows of a split, for validation, without downloading the others.

    A set saved on disk is read by `read_captions`. The rows of other sets are held in memory.

    Args:
        source: as for `StreamedRows`.
        split: the split.
        columns: names of the columns of image, captions and image id.
        limit: number of rows; `None` for all.
        on_bad: whether unusable rows are left out or refused.
        images: folder of the images, for a set with names of image files.

    Raises:
        ValueError: there is no such set, split or column, or no image with captions.
    """
    import datasets

    if is_saved_set(Path(source)):
        image, captions, image_id = columns
        return read_captions(
            source,
            split,
            images=images,
            on_bad=on_bad,
            image_column=image,
            caption_column=captions,
            id_column=image_id,
        )
    name, (rows, _) = f"'{source}', split '{split}'", open_split(source, split)
    present = [column for column in find_columns(first_row(rows, name), Columns(*columns), name) if column is not None]
    rows = rows.select_columns(present)
    held = [fetched(row, present[0]) for row in (rows if limit is None else rows.take(limit))]
    table = datasets.Dataset.from_list(held, features=rows.features)
    records, encoded = dataset_records(table, Columns(*columns), name, [split] * len(table))
    return build_table(records, encoded, ImageFinder(Path(source), images), on_bad, name)


def fetched(row: dict, image_column: str) -> dict:
    """Return a row with the bytes of its image, if that is a file on the hub; unchanged if it cannot be read."""
    image = row.get(image_column)
    if isinstance(image, Mapping) and image.get("bytes") is None and HUB in (image.get("path") or ""):
        try:
            return row | {image_column: {"path": None, "bytes": fetch(image["path"])}}
        except ImageError as error:
            logger.warning("%s", error)
    return row


def fetch(path: str) -> bytes:
    """Read an image that a set on the hub stores as a file.

    Raises:
        ImageError: the file cannot be read.
    """
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)  # a larger file is refused when the image is opened
    except OSError as error:
        raise ImageError(f"'{path}' cannot be read: {error}") from None


def shuffled(rows: Iterator[dict], size: int, random: np.random.Generator) -> Iterator[dict]:
    """Yield every row once, through a buffer of `size` rows: each new row replaces a random one, which is yielded."""
    held: list[dict] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        place = int(random.integers(size))
        held[place], row = row, held[place]
        yield row
    for place in random.permutation(len(held)):
        yield held[place]
