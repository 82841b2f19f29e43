"""The images that a tag head learns from: what people said of them, and their tokens.

Letters: n images, B images of a batch, M image tokens, D their width, K tags.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from pyarrow.compute import struct_field

from captioner.data.image_files import search_folder
from captioner.data.label_files import ImageLabels
from captioner.data.readers import read_captions
from captioner.data.token_cache import CachedImages, TokenCache, image_names
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.tags import TagVocabulary

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def captioned_images(sources: Sequence[str], split: str, skipped: Iterable[str] = ()) -> list["Dataset"]:
    """Read sets of captioned images.

    Args:
        sources: the sets, in any form that `read_captions` reads.
        split: split of each.
        skipped: names of image files that are left out.

    Raises:
        ValueError: a set cannot be read, or no image of it is left.
    """
    tables, skipped = [], frozenset(skipped)
    for source in sources:
        table = read_captions(source, split)
        kept = [row for row, name in enumerate(file_names(table)) if name not in skipped]
        if not kept:
            raise ValueError(f"every image of '{source}' is held out")
        tables.append(table if len(kept) == len(table) else table.select(kept))
    return tables


def labelled_images(
    folders: Sequence[str], labels: ImageLabels, captioned: Sequence["Dataset"], skipped: Iterable[str] = ()
) -> "Dataset | None":
    """List the images of folders that have labels and are not among captioned images; None if there are none.

    Args:
        folders: the folders.
        labels: labels of images, by the names of their files.
        captioned: tables of captioned images.
        skipped: names of image files that are left out.

    Raises:
        FileNotFoundError: a folder has no image.
    """
    import datasets

    taken = {os.path.realpath(path) for table in captioned for path in file_paths(table) if path}
    skipped, found = frozenset(skipped), dict[str, Path]()
    for folder in map(Path, folders):
        files = search_folder(folder).files
        if not files:
            raise FileNotFoundError(f"no images in the folder '{folder}'")
        wanted = (path for path in files if path.name in labels.images and path.name not in skipped)
        found |= {os.path.realpath(path): path for path in wanted}
    files = [path for real, path in found.items() if real not in taken]
    if not files:
        return None
    rows = {
        "image_id": [path.name for path in files],
        "image": [{"path": str(path), "bytes": None} for path in files],
        "captions": [[] for _ in files],
        "split": ["images"] * len(files),
    }
    text = datasets.Value("string")
    features = datasets.Features(
        image_id=text, image=datasets.Image(decode=False), captions=datasets.List(text), split=text
    )
    return datasets.Dataset.from_dict(rows, features)


def join_images(tables: Sequence["Dataset"]) -> "Dataset":
    """Join tables into one, whose ids are text.

    Raises:
        SettingError: two images have one id and one file name, so that they cannot be told apart.
    """
    import datasets

    text = datasets.Value("string")
    table = datasets.concatenate_datasets([table.cast_column("image_id", text) for table in tables])
    seen: set[str] = set()
    for name in image_names(table):
        if name in seen:
            raise SettingError(
                f"the image '{name.partition(' ')[2]}' with the id {name.partition(' ')[0]} is in the sets twice",
                *("captions", "images"),
            )
        seen.add(name)
    return table


def file_paths(table: "Dataset") -> list[str | None]:
    """Return the path of each image of a table; None for an image without one."""
    return struct_field(table.select_columns("image").with_format("arrow")[:]["image"], "path").to_pylist()


def file_names(table: "Dataset") -> list[str]:
    """Return the name of the file of each image of a table, without folders; empty where it has none."""
    return [Path(path).name if path else "" for path in file_paths(table)]


def label_targets(table: "Dataset", labels: ImageLabels, vocabulary: TagVocabulary) -> np.ndarray:
    """Return which tags the labels give the images of a table: 1 or 0, NaN where it is unknown, float32 (n, K).

    Raises:
        SettingError: no class is a tag.
        ValueError: two labelled images have files of one name.
    """
    columns = {name.casefold(): number for number, name in enumerate(vocabulary.names)}
    tags = np.array([columns.get(name.casefold(), -1) for name in labels.classes])
    if (tags < 0).all():
        raise SettingError(
            f"none of the {len(tags)} classes of the labels, such as '{labels.classes[0]}', is a tag of the vocabulary",
            *("vocabulary", "labels"),
        )
    targets = np.full((len(table), len(vocabulary)), np.nan, np.float32)
    seen: set[str] = set()
    for row, name in enumerate(file_names(table)):
        if name in labels.images:
            if name in seen:
                raise ValueError(f"two images are named '{name}', so that a label file cannot tell them apart")
            seen.add(name)
            targets[row, tags[tags >= 0]] = 0
            found = tags[labels.images[name]]
            targets[row, found[found >= 0]] = 1
    return targets


def mention_targets(captions: Sequence[Sequence[str]], vocabulary: TagVocabulary) -> np.ndarray:
    """Return the share of each image's captions that mention each tag, float32 (n, K); NaN without captions."""
    targets = np.full((len(captions), len(vocabulary)), np.nan, np.float32)
    for row, group in enumerate(captions):
        if group:
            targets[row] = 0
        for caption in group:
            targets[row, vocabulary.find(caption)] += 1 / len(group)
    return targets


class TokenReader:
    """The tokens of the images of a table, read from several caches.

    Args:
        caches: the caches; an image is read from the first that has it.
        table: the images; every one is in a cache.

    Attributes:
        views: number of views of each image.
        usable: whether the image of each row could be read when it was encoded, bool (n,).

    Raises:
        ValueError: the file of an image has changed since it was encoded.
    """

    def __init__(self, caches: Sequence[TokenCache], table: "Dataset"):
        owner = owners(caches, table)
        self.parts: list[tuple[np.ndarray, CachedImages]] = []
        self.place = np.zeros((len(table), 2), np.int64)  # number of the part, and of the image in it
        self.usable = np.ones(len(table), bool)
        for number, cache in enumerate(caches):
            rows = np.flatnonzero(owner == number)
            if len(rows):
                images = cache.images(table.select(rows))
                self.place[rows] = np.stack([np.full(len(rows), len(self.parts)), np.arange(len(rows))], 1)
                self.usable[rows[list(images.errors)]] = False
                self.parts.append((rows, images))
        self.views = min(images.views for _, images in self.parts)

    def batch(self, rows: np.ndarray, views: np.ndarray, grid: Grid | None = None) -> torch.Tensor:
        """Return the tokens (B, M, D) of rows (B,), in half precision.

        Args:
            rows: the images.
            views: view of each.
            grid: compressed grid; `None` for the first grid of the caches.
        """
        parts: list[torch.Tensor] = []
        places: list[np.ndarray] = []
        for number, (_, images) in enumerate(self.parts):
            mine = np.flatnonzero(self.place[rows, 0] == number)
            if len(mine):
                opened = self.place[rows[mine], 1].tolist()
                parts.append(cast(torch.Tensor, images.batch(opened, views[mine].tolist(), grid)["image_tokens"]))
                places.append(mine)
        tokens = torch.cat(parts)
        return tokens[np.argsort(np.concatenate(places))]


def owners(caches: Sequence[TokenCache], table: "Dataset") -> np.ndarray:
    """Return the first cache that has each image of a table, as its number (n,); -1 where none has it."""
    found = np.full(len(table), -1)
    for row, name in enumerate(image_names(table)):
        found[row] = next((n for n, cache in enumerate(caches) if name in cache.rows or name in cache.broken), -1)
    return found
