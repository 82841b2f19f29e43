"""Where captioned images are: the settings of jobs on captioned data. Imports nothing heavy.

Each job takes the class with the settings that it uses, so that its command has no options without effect.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioner.errors import ConflictError, SettingError, check_positive


@dataclass(frozen=True)
class SourceConfig:
    """The captioned images."""

    root: str | None = None
    """Annotation file (COCO, Karpathy, CSV, TSV, JSON Lines); folder that holds one, or has caption files beside its
    images; saved `datasets` set; or hub id of a data set."""
    images: Path | None = None
    """Folder of the images, if they are not beside the annotations."""
    restval: bool = False
    """Join Karpathy's `restval` images to the training split."""
    on_bad: Literal["skip", "refuse"] = "skip"
    """`skip` leaves out what cannot be used and counts it in one line; `refuse` stops."""
    image_column: str = "image"
    """Column of images in CSV, JSON Lines and `datasets` sets. Without this option, other usual names are found too."""
    caption_column: str = "captions"
    """Column of captions there, each a text or a list of texts."""
    id_column: str = "image_id"
    """Column of image ids there. Where there is none, the names of the images are their ids."""
    workers: int = 2
    """Processes that load images, for each process of the run; with streaming, threads of one such process."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise SettingError(f"workers must not be negative, but is {self.workers}", "workers")


@dataclass(frozen=True)
class TokenSourceConfig(SourceConfig):
    """The captioned images, and a cache of their tokens."""

    tokens: Path | None = None
    """Folder that `captioner cache` wrote. Image tokens are read from it, and no image is opened or encoded."""


@dataclass(frozen=True)
class DataConfig(TokenSourceConfig):
    """The captioned images to train on, and a cache of their tokens."""

    streaming: bool = False
    """Read a hub id, a saved `datasets` set or a folder of parquet files row by row; it is never held whole. Each row
    is one image, and validation takes the first `evaluate_images` rows of its split."""
    stream_buffer: int = 10_000
    """Rows in the shuffle buffer of streaming. Each process holds them in memory, with their encoded images."""
    stream_rows: int | None = None
    """Rows in an epoch of streaming. Needed if the set does not state their number; it may be a smaller one."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to choose the best checkpoint by."""
    captions_per_image: int = 5
    """Captions of each image in one step; they share one encoding of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.tokens is not None:
            raise ConflictError(
                "streaming reads images, so a token cache cannot be used with it", "streaming", "tokens"
            )
        check_positive(self, "captions_per_image", "stream_buffer", "stream_rows")
