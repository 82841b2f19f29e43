"""Where captioned images are: the settings of jobs on captioned data. Imports nothing heavy.

Each job takes the class with the settings that it uses, so that its command has no options without effect.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioner.errors import SettingError, check_positive


@dataclass(frozen=True)
class SourceConfig:
    """Where captioned images are."""

    root: str | None = None
    """Annotation file (COCO, Karpathy, CSV, JSONL), a folder with one or with caption files beside its images, a saved
    `datasets` set, or a hub id."""
    images: Path | None = None
    """Folder of the images, where it is not beside the annotations."""
    restval: bool = False
    """Join Karpathy's `restval` images to the training split."""
    on_bad: Literal["skip", "refuse"] = "skip"
    """Leave out what cannot be used and sum it up in one line, or refuse the data."""
    image_column: str = "image"
    """Image column of CSV, JSONL and `datasets` sources; other usual names are found by themselves."""
    caption_column: str = "captions"
    """Caption column of those."""
    id_column: str = "image_id"
    """Image id column of those; the names of the images are their ids where there is none."""
    workers: int = 2
    """Image loading processes per process; of streaming, threads of one such process."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise SettingError(f"workers must not be negative, but is {self.workers}", "workers")


@dataclass(frozen=True)
class TokenSourceConfig(SourceConfig):
    """Where captioned images are, and their cached tokens, for jobs that read these in place of the images."""

    tokens: Path | None = None
    """Folder that `captioner cache` wrote: the image tokens are read there, no image is opened or encoded."""


@dataclass(frozen=True)
class DataConfig(TokenSourceConfig):
    """What a decoder is trained on."""

    streaming: bool = False
    """Train from a hub id, a saved `datasets` set or a folder of parquet files row by row, never held whole. A row is
    then one image, and validation reads the first `evaluate_images` rows of its split."""
    stream_buffer: int = 10_000
    """Rows of the shuffle buffer of streaming, held in memory with their encoded images by each process."""
    stream_rows: int | None = None
    """Rows of an epoch of streaming. It is needed where the set does not say how many it has; fewer may be given."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to choose the best checkpoint by."""
    captions_per_image: int = 5
    """Captions of an image in one step; they share its encoding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.tokens is not None:
            raise SettingError("streaming reads images, so a token cache cannot be used with it", "streaming", "tokens")
        check_positive(self, "captions_per_image", "stream_buffer", "stream_rows")
