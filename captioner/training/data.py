"""The data of a run: caption tables, or the rows of a stream (`data.streaming`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from captioner.data.batches import CaptionStream, Images, JoinedImages, epoch_size, open_sets
from captioner.data.config import DataConfig
from captioner.data.row_stream import RowStream
from captioner.data.rows import StreamedRows, read_first
from captioner.data.sentences import read_sentences
from captioner.data.sets import join_sets, read_sets, set_names, value_of
from captioner.data.splits import NoSplitError
from captioner.data.token_cache import TokenCache
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.processing import CaptionerProcessor
from captioner.runs.digests import digest_json
from captioner.training.config import TrainConfig

if TYPE_CHECKING:
    import datasets


class TableData:
    """The training split of each data set as a table: all captions are in memory, and images are opened in any order.

    An epoch has each image of a set as often as the weight of the set says.
    """

    def __init__(self, data: DataConfig, sentences: Sequence[str] = ()):
        self.sentences = sentences
        self.tables = [table for table in read_sets(data, data.train_split) if table is not None]
        self.table, self.weighted = join_sets(self.tables), bool(data.weights)
        weights = data.weights or [1.0] * len(self.tables)
        self.weights = [(len(table), weight) for table, weight in zip(self.tables, weights, strict=True)]
        if not epoch_size(self.weights):
            raise SettingError("the weights are so small that an epoch has no image", "weights")

    def __len__(self) -> int:
        return epoch_size(self.weights)

    @property
    def references(self) -> list[list[str]]:
        """The captions of each image."""
        return self.table["captions"]

    def captions(self) -> list[str]:
        """Return the texts on which a tokenizer is trained: all captions, and the sentences that are added to them."""
        return [caption for group in self.references for caption in group] + list(self.sentences)

    def drawn(self, captions_per_image: int) -> float:
        """Return the number of captions of an image in a step, on average."""
        counts = [len(group) for group in self.references]
        total, start = 0.0, 0
        for size, weight in self.weights:
            total += weight * sum(min(count, captions_per_image) for count in counts[start : start + size])
            start += size
        return total / sum(size * weight for size, weight in self.weights)

    def settings(self) -> dict:
        """Return the settings that a resumed run cannot change: digests of the images' ids and of their captions."""
        digest = digest_json([self.table["image_id"][:], self.references[:]])
        weights = self.weights if self.weighted else None
        return {"data.streaming": None, "data digest": digest, "data.weights": weights}

    def stream(
        self,
        processor: CaptionerProcessor,
        captions_per_image: int,
        seed: int,
        caches: Sequence[TokenCache],
        grids: Sequence[Grid] = (),
        per_step: int = 1,
    ) -> CaptionStream:
        """Open the endless stream of training items, from token caches if there are any: one for all sets, or for each.

        Raises:
            ValueError: a cache lacks images, or they are not the files that were encoded.
        """
        parts = open_sets(dict(enumerate(self.tables)), processor, caches)
        images: Images = parts[0] if len(parts) == 1 else JoinedImages(parts)
        return CaptionStream(self.table, processor, captions_per_image, seed, images, grids, per_step, self.weights)


class RowData:
    """The training split as a stream of rows."""

    def __init__(self, data: DataConfig, root: str, sentences: Sequence[str] = ()):
        self.data, self.sentences = data, sentences
        self.rows = StreamedRows(root, data.train_split, columns_of(data), data.stream_rows, value_of(data.images, 0))

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[str]:
        """Return the texts on which a tokenizer is trained: the captions of the first rows, and the added sentences."""
        return self.rows.first_captions() + list(self.sentences)

    def drawn(self, captions_per_image: int) -> float:
        """Return the number of captions of a row in a step, as if none had fewer captions."""
        return float(captions_per_image)

    def settings(self) -> dict:
        """Return the settings that a resumed run cannot change: those that decide the order of the rows."""
        return {
            "data.streaming": True,
            "data.stream_buffer": self.data.stream_buffer,
            "data.stream_rows": len(self),
            "data.weights": None,
        }

    def stream(
        self,
        processor: CaptionerProcessor,
        captions_per_image: int,
        seed: int,
        caches: Sequence[TokenCache],
        grids: Sequence[Grid] = (),
        per_step: int = 1,
    ) -> RowStream:
        """Open the endless stream of training items."""
        assert not caches, "DataConfig refuses both"
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


class TextData:
    """Sentences to learn language from: those of text files, and the training captions of the data sets."""

    def __init__(self, data: DataConfig):
        self.sentences = read_sentences(data.text, data.caption_column, data.on_bad)
        if data.root:
            tables = read_sets(data, data.train_split, some=bool(data.text))
            self.sentences += [text for table in tables if table for group in table["captions"] for text in group]

    def __len__(self) -> int:
        return len(self.sentences)

    def captions(self) -> list[str]:
        """Return the captions on which a tokenizer is trained: all sentences."""
        return self.sentences

    def settings(self) -> dict:
        """Return the settings that a resumed run cannot change: a digest of the sentences."""
        return {"text digest": digest_json(self.sentences)}


TrainingData = TableData | RowData | TextData


class HeldOut(NamedTuple):
    """The validation split of one data set."""

    name: str
    """Name of the data set, for the log."""
    number: int
    """Number of the data set in the settings."""
    table: "datasets.Dataset"


def open_data(config: TrainConfig) -> tuple[TrainingData, list[HeldOut]]:
    """Open the training split, and read the tables of at most `evaluate_images` images of each set to validate on.

    Raises:
        ValueError: no data, or data that cannot be used as configured.
        FileNotFoundError: a source or every image of it is missing.
    """
    data, limit = config.data, config.evaluate_images
    roots = data.val_root or data.root
    train: TrainingData
    if config.stage == "text":
        if not roots:
            raise SettingError("no captions to validate on: name a data set", "root", "val_root")
        train = TextData(data)
    else:
        if (share := config.inputs.text_share) and not data.text:
            fact = f"sentences of text files are to be {share:g} of the texts, and no file is named"
            raise SettingError(fact, "data.text", "text_share")
        sentences = read_sentences(data.text, data.caption_column, data.on_bad) if share else []
        streaming = data.streaming and data.root
        train = RowData(data, data.root[0], sentences) if streaming else TableData(data, sentences)
    try:
        if data.streaming:
            folder = value_of(data.images, 0)
            tables = [read_first(roots[0], data.val_split, columns_of(data), limit, data.on_bad, folder)]
        else:
            tables = read_sets(data, data.val_split, roots, some=not data.val_root)
    except NoSplitError as error:
        raise SettingError(str(error), "val_split", "val_root") from None
    held_out = []
    for number, (name, table) in enumerate(zip(set_names(roots), tables, strict=True)):
        if table is not None:
            some = table if limit is None else table.select(range(min(limit, len(table))))
            held_out.append(HeldOut(name, number, some))
    return train, held_out


def columns_of(data: DataConfig) -> tuple[str, str, str]:
    """Return the names of the columns of image, captions and image id."""
    return data.image_column, data.caption_column, data.id_column
