"""The data of a run: a caption table, or the rows of a stream (`data.streaming`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from captioner.data.batches import CaptionStream, open_images
from captioner.data.config import DataConfig
from captioner.data.readers import read_split
from captioner.data.row_stream import RowStream
from captioner.data.rows import StreamedRows, read_first
from captioner.data.token_cache import TokenCache
from captioner.grids import Grid
from captioner.processing import CaptionerProcessor
from captioner.runs.digests import digest_json
from captioner.training.config import TrainConfig

if TYPE_CHECKING:
    import datasets


class TableData:
    """The training split as a table: all captions are in memory, and images are opened in any order."""

    def __init__(self, data: DataConfig):
        self.table = read_split(data, data.train_split)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def references(self) -> list[list[str]]:
        """The captions of each image."""
        return self.table["captions"]

    def captions(self) -> list[str]:
        """Return the captions on which a tokenizer is trained: all of them."""
        return [caption for group in self.references for caption in group]

    def settings(self) -> dict:
        """Return the settings that a resumed run cannot change: digests of the images' ids and of their captions."""
        return {"data.streaming": None, "data digest": digest_json([self.table["image_id"][:], self.references[:]])}

    def stream(
        self,
        processor: CaptionerProcessor,
        captions_per_image: int,
        seed: int,
        cache: TokenCache | None,
        grids: Sequence[Grid] = (),
        per_step: int = 1,
    ) -> CaptionStream:
        """Open the endless stream of training items, from a token cache if there is one.

        Raises:
            ValueError: the cache lacks images, or they are not the files that were encoded.
        """
        images = open_images(self.table, processor, cache)
        return CaptionStream(self.table, processor, captions_per_image, seed, images, grids, per_step)


class RowData:
    """The training split as a stream of rows."""

    def __init__(self, data: DataConfig, root: str):
        self.data = data
        self.rows = StreamedRows(root, data.train_split, columns_of(data), data.stream_rows, data.images)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def references(self) -> list[list[str]]:
        """Raise NotImplementedError: a stream does not hold all captions."""
        raise NotImplementedError("a stream does not hold the captions of all images")

    def captions(self) -> list[str]:
        """Return the captions on which a tokenizer is trained: those of the first rows."""
        return self.rows.first_captions()

    def settings(self) -> dict:
        """Return the settings that a resumed run cannot change: those that decide the order of the rows."""
        return {
            "data.streaming": True,
            "data.stream_buffer": self.data.stream_buffer,
            "data.stream_rows": len(self),
        }

    def stream(
        self,
        processor: CaptionerProcessor,
        captions_per_image: int,
        seed: int,
        cache: TokenCache | None,
        grids: Sequence[Grid] = (),
        per_step: int = 1,
    ) -> RowStream:
        """Open the endless stream of training items."""
        assert cache is None, "DataConfig refuses both"
        return RowStream(
            self.rows,
            processor,
            captions_per_image,
            seed,
            buffer=self.data.stream_buffer,
            on_bad=self.data.on_bad,
            grids=grids,
            per_step=per_step,
        )


TrainingData = TableData | RowData


def open_data(config: TrainConfig) -> tuple[TrainingData, "datasets.Dataset"]:
    """Open the training split, and read the table of at most `evaluate_images` images to validate on.

    Raises:
        ValueError: no data, or data that cannot be used as configured.
        FileNotFoundError: the source or every image is missing.
    """
    data, limit = config.data, config.evaluate_images
    if data.streaming and data.root is not None:
        train: TrainingData = RowData(data, data.root)
        held_out = read_first(data.root, data.val_split, columns_of(data), limit, data.on_bad, data.images)
    else:
        train, held_out = TableData(data), read_split(data, data.val_split)
    return train, held_out if limit is None else held_out.select(range(min(limit, len(held_out))))


def columns_of(data: DataConfig) -> tuple[str, str, str]:
    """Return the names of the columns of image, captions and image id."""
    return data.image_column, data.caption_column, data.id_column
