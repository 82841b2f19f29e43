"""Where captioned images are: the settings that every job on captioned data shares. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where captioned images are."""

    root: str | None = None
    """Annotation file, folder (COCO, Karpathy, CSV or JSONL beside images, a saved `datasets` set), or hub id."""
    streaming: bool = False
    """Train from a hub id, a saved `datasets` set or a folder of parquet files row by row, never held whole. A row is
    then one image, and validation reads the first `evaluate_images` rows of its split."""
    stream_buffer: int = 10_000
    """Rows of the shuffle buffer of streaming, held in memory with their encoded images by each process."""
    stream_rows: int | None = None
    """Rows of an epoch of streaming, where the set does not say how many it has, or fewer are wanted."""
    images: Path | None = None
    """Folder of the images, where it is not beside the annotations."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to choose the best checkpoint by."""
    restval: bool = False
    """Join Karpathy's `restval` images to the training split."""
    on_bad: Literal["skip", "refuse"] = "skip"
    """Drop unusable entries with one summary, or refuse the data."""
    image_column: str = "image"
    """Image column of CSV, JSONL and `datasets` sources."""
    caption_column: str = "captions"
    """Caption column of those."""
    id_column: str = "image_id"
    """Image id column of those."""
    tokens: Path | None = None
    """Folder that `captioner cache` wrote: the image tokens are read there, no image is opened or encoded."""
    captions_per_image: int = 5
    """Captions of an image in one step; they share its encoding."""
    workers: int = 2
    """Image loading processes per training process; of streaming, threads of one such process."""

    def __post_init__(self):
        if self.streaming and self.tokens is not None:
            raise ValueError("a token cache holds a set whole; leave out --data.streaming, or --data.tokens")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, but is {self.workers}")
        for name in ("captions_per_image", "stream_buffer", "stream_rows"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
