"""Where captioned images are: the settings of jobs on captioned data. Imports nothing heavy.

Each job takes the class with the settings that it uses, so that its command has no options without effect.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from captioner.errors import ConflictError, SettingError, check_positive


def store_tuples(settings: Any, *names: str) -> None:
    """Turn a single value of each of these settings into a tuple of one, and `None` into an empty tuple."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, tuple):
            single = isinstance(value, str | os.PathLike)
            object.__setattr__(settings, name, (value,) if single else tuple(value or ()))


def check_number(settings: Any, name: str, sets: str) -> None:
    """Refuse a setting that has neither one value for all data sets nor one for each.

    Args:
        settings: the settings.
        name: the setting, a tuple.
        sets: the setting with the data sets, `root` or `val_root`.

    Raises:
        SettingError: their numbers differ.
    """
    count, roots = len(getattr(settings, name)), len(getattr(settings, sets))
    if count > 1 and roots and count != roots:
        raise SettingError(
            f"{name} has {count} values for the {roots} data sets of {sets}; one for all or one for each is possible",
            *(name, sets),
        )


@dataclass(frozen=True)
class SourceConfig:
    """The captioned images."""

    root: tuple[str, ...] = ()
    """One or several data sets. Each is an annotation file (COCO, Karpathy, CSV, TSV, JSON Lines); a folder that holds
    one, or has caption files beside its images; a saved `datasets` set; or the hub id of a data set."""
    images: tuple[Path, ...] = ()
    """Folder of the images, if they are not beside the annotations: one for all data sets, or one for each."""
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
        store_tuples(self, "root", "images")
        if self.workers < 0:
            raise SettingError(f"workers must not be negative, but is {self.workers}", "workers")
        check_roots(self.root, "root")
        check_number(self, "images", "root")


def check_roots(roots: tuple[str, ...], name: str) -> None:
    """Refuse a data set that is named twice.

    Raises:
        SettingError: the message names it.
    """
    places = [os.path.normpath(root) for root in roots]
    if twice := next((root for n, root in enumerate(roots) if places[n] in places[:n]), None):
        raise SettingError(f"the data set '{twice}' is named twice", name)


@dataclass(frozen=True)
class TokenSourceConfig(SourceConfig):
    """The captioned images, and a cache of their tokens."""

    tokens: tuple[Path, ...] = ()
    """Folder that `captioner cache` wrote: one for all data sets, or one for each. Image tokens are read from it, and
    no image is opened or encoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        store_tuples(self, "tokens")
        check_number(self, "tokens", "root")


@dataclass(frozen=True)
class DataConfig(TokenSourceConfig):
    """The captioned images to train on, and a cache of their tokens."""

    weights: tuple[float, ...] = ()
    """How often an image of each data set comes in an epoch, in the order of the sets: with `1 2`, each image of the
    second set comes twice, and with `1 0.5`, half of them come, drawn anew in each epoch. Without any, all images come
    once."""
    val_root: tuple[str, ...] = ()
    """Data sets to choose the best checkpoint by, if they are not the sets of `root`."""
    text: tuple[Path, ...] = ()
    """Files of sentences without images, packed by gzip or not: JSON Lines with a `caption` or `text` in each line, a
    table, or plain text with a sentence in each line."""
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
    """Most captions of an image in one step; they share one encoding of it. Of an image with more captions, some are
    drawn; one with fewer has all of its captions in the step, each once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        store_tuples(self, "val_root", "weights", "text")
        check_roots(self.val_root, "val_root")
        if self.weights and len(self.weights) != len(self.root):
            raise SettingError(
                f"there are {len(self.weights)} weights for {len(self.root)} data sets", "weights", "root"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise SettingError(f"weights must be positive, not {' '.join(map(str, self.weights))}", "weights")
        for name in ("images", "tokens"):
            check_number(self, name, "val_root")
        if self.streaming and self.tokens:
            raise ConflictError(
                "streaming reads images, so a token cache cannot be used with it", "streaming", "tokens"
            )
        if self.streaming and max(len(self.root), len(self.val_root)) > 1:
            raise ConflictError("streaming reads one data set, and several are named", "streaming", "root")
        check_positive(self, "captions_per_image", "stream_buffer", "stream_rows")
