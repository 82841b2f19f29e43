"""The token cache: a frozen encoder's tokens of each image, computed once and stored in memory-mapped files.

Letters: n images of a shard, V views of each, B images of a batch, M image tokens, D their width.

A cache is a folder. `cache.json` holds what made it: encoder, digest of its weights, preprocessing, grids, views.
Beside it are shards of at most 512 images, `tokens-*.safetensors`: for each grid one tensor (n, V, M, D), and in the
header the names of its images, the sizes and digests of their files, and digests of the places of these.

Why safetensors: a shard is one contiguous array that maps into memory without a copy (Arrow would cut rows into batches
and return lists of them), its header shows whether the file is truncated (a raw array has none), and the project writes
no other format. Why shards: each is written under another name and renamed. So a killed process loses the images of one
shard and leaves no incomplete file, processes need no lock to share the work, and further splits are further shards.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pyarrow.compute import struct_field
from safetensors import SafetensorError, safe_open

from captioner.data.fingerprint import compare_sources, encoder_fingerprint
from captioner.encoders import TokenEncoder
from captioner.errors import MissingError, SettingError
from captioner.grids import Grid, write_grid
from captioner.images import ImageError
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.runs.digests import digest_bytes, digest_file, digest_json, digest_text

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "cache.json"
SHARDS = "tokens-*.safetensors"
SAMPLE = 64
"""Images of a table that are compared with what was encoded, wherever they are."""
SOURCE = ("encoder", "arguments", "weights", "image")
"""Entries of the manifest that must be the same for a model that uses the cache."""


def grid_name(encoder: TokenEncoder, grid: Grid | None) -> str:
    """Return the name of a grid, or for `None` of the encoder's default: `5x5`, or `all` for a token of every cell."""
    grid = grid or encoder.grid
    return "all" if grid is None else write_grid(grid)


def image_names(table: "Dataset") -> list[str]:
    """Return the names of a table's images in the cache: image id and file name. No image is read.

    Encoded images may have no file name; the split then stands in its place. Without ids, too, the rows of each split
    are numbered from 0.
    """
    columns = table.select_columns(["image_id", "image", "split"]).with_format("arrow")[:]
    paths = struct_field(columns["image"], "path").to_pylist()
    ids, splits = columns["image_id"].to_pylist(), columns["split"].to_pylist()
    return [f"{i} {Path(path).name if path else split}" for i, path, split in zip(ids, paths, splits, strict=True)]


def image_places(table: "Dataset") -> list[str]:
    """Return a digest of the place of each image: its path, or for an encoded image its name and split."""
    columns = table.select_columns(["image", "split"]).with_format("arrow")[:]
    paths, splits = struct_field(columns["image"], "path").to_pylist(), columns["split"].to_pylist()
    places = [
        os.path.abspath(path) if path and os.path.dirname(path) else f"{split} {path}"
        for path, split in zip(paths, splits, strict=True)
    ]
    return [digest_text(place)[:8] for place in places]


def image_digest(image: dict) -> str | None:
    """Return the digest of an encoded image, or None if there is no such file."""
    if image["bytes"] is not None:
        return digest_bytes(image["bytes"])
    try:
        return digest_file(Path(image["path"]))
    except OSError:
        return None


def image_size(image: dict) -> int:
    """Return the size of an encoded image in bytes, or -1 if there is no such file."""
    if image["bytes"] is not None:
        return len(image["bytes"])
    try:
        return os.path.getsize(image["path"])
    except OSError:
        return -1


class TokenCache:
    """A token cache on disk. Opening it reads the headers of its files, and maps the tokens of some grids into memory.

    Args:
        folder: folder that `captioner cache` wrote.
        source: the `encoder_fingerprint` that the cache must have; `None` accepts any.
        grids: names of the grids to read; images are read at the first of them where no other is given.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the cache is of another encoder, lacks a grid, or is damaged, or the folder is not a cache.
    """

    def __init__(self, folder: Path, source: dict | None = None, grids: Sequence[str] = ()):
        self.folder, self.manifest = folder, read_manifest(folder)
        if source is not None:
            self.check(source)
        if lacking := [grid for grid in grids if grid not in self.manifest["grids"]]:
            raise SettingError(
                f"the token cache '{folder}' holds the grids {', '.join(self.manifest['grids'])}, not "
                f"{', '.join(lacking)}; a cache of these needs a folder of its own",
                *("grids", "grid", "tokens"),
            )
        self.rows: dict[str, int] = {}
        self.sizes: list[int] = []
        self.files: list[tuple[str, str] | None] = []  # place and digest, which caches of earlier versions lack
        self.broken: dict[str, tuple[int, str]] = {}
        self.shards: dict[str, list[torch.Tensor]] = {grid: [] for grid in grids}
        self.starts = [0]
        expected = manifest_digest(self.manifest)
        for path in sorted(folder.glob(SHARDS)):
            self._open_shard(path, expected)

    def _open_shard(self, path: Path, expected: str) -> None:
        remedy = "delete that file and run the same `captioner cache` again, which encodes only its images"
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                made_by = header["made_by"]
                images, broken = json.loads(header["images"]), json.loads(header["broken"])
                files = json.loads(header["files"]) if "files" in header else [None] * len(images)
                tokens = {grid: file.get_tensor(grid) for grid in self.shards} if images else {}
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"'{path}' is truncated or damaged ({error}); {remedy}") from None
        if made_by != expected:
            raise ValueError(f"'{path}' belongs to another token cache; {remedy}")
        for name, size in images:
            self.rows[name] = len(self.sizes)
            self.sizes.append(size)
        self.files += files
        self.broken |= {name: (size, error) for name, size, error in broken}
        if images:
            self.starts.append(len(self.sizes))
        for grid, shard in tokens.items():
            self.shards[grid].append(shard)

    def check(self, source: dict) -> None:
        """Refuse a cache that another encoder or another preprocessing made.

        Raises:
            SettingError: they differ; the message says in what.
        """
        if difference := self.difference(source):
            raise SettingError(f"{difference}; this model needs a cache of its own", "tokens")

    def difference(self, source: dict) -> str | None:
        """Return how encoder and preprocessing of the cache differ from those of a model; `None` if they do not."""
        difference = compare_sources({key: self.manifest[key] for key in SOURCE}, source)
        return difference and f"the token cache '{self.folder}' comes from {difference}"

    def missing(self, table: "Dataset") -> int:
        """Count the images of a table that are neither encoded nor known to be unreadable."""
        return sum(name not in self.rows and name not in self.broken for name in image_names(table))

    def images(self, table: "Dataset") -> "CachedImages":
        """Find the images of a table.

        Raises:
            ValueError: an image is not in the cache, or its file has changed.
        """
        names = image_names(table)
        if count := sum(name not in self.rows and name not in self.broken for name in names):
            raise ValueError(
                f"the token cache '{self.folder}' lacks {count} of {len(names)} images of the split "
                f"'{table[0]['split']}'; `captioner cache` adds a split to the same folder"
            )
        if change := self.find_change(table, names, SAMPLE):
            raise ValueError(f"{change}: the images have changed; make another token cache")
        return CachedImages(self, names)

    def find_change(self, table: "Dataset", names: Sequence[str], most: int | None = None) -> str | None:
        """Return how an image of a table differs from the image that was encoded under its name; `None` if none does.

        A few images are compared wherever they are. Others are compared if they are at another place, because an image
        there may be another one of the same name.

        Args:
            table: the caption table.
            names: names of its images, as `image_names` returns them.
            most: most images at another place to compare; `None` for all of them.
        """
        rows = [self.rows.get(name, -1) for name in names]
        files = [None if row < 0 else self.files[row] for row in rows]
        places = image_places(table) if any(files) else [""] * len(rows)
        moved = [n for n, (file, place) in enumerate(zip(files, places, strict=True)) if file and file[0] != place]
        known = [number for number, row in enumerate(rows) if row >= 0]
        for number in dict.fromkeys(spread(known, SAMPLE) + spread(moved, most)):
            image, row, file = table[number]["image"], rows[number], files[number]
            name = f"'{image['path'] or names[number]}'"
            if self.sizes[row] != (size := image_size(image)):
                return f"{name} has {size} bytes, but {self.sizes[row]} when it was encoded into '{self.folder}'"
            if file and file[1] != image_digest(image):
                return f"{name} is not the image that was encoded under its id and name into '{self.folder}'"
        return None


def spread(numbers: list[int], most: int | None) -> list[int]:
    """Return at most so many of the numbers, evenly spread; all of them if `most` is None."""
    if most is None or len(numbers) <= most:
        return numbers
    return [numbers[place] for place in np.linspace(0, len(numbers) - 1, most).astype(int)]


class CachedImages:
    """The images of a caption table, read from a token cache as `image_tokens` (B, M, D)."""

    def __init__(self, cache: TokenCache, names: Sequence[str]):
        self.shards, self.views = cache.shards, cache.manifest["views"]
        self.first = next(iter(cache.shards))
        rows = np.array([cache.rows.get(name, -1) for name in names])
        starts = np.array(cache.starts)
        shard = np.searchsorted(starts, rows, side="right") - 1
        self.shard, self.row = shard.tolist(), (rows - starts[shard]).tolist()
        self.errors = {number: cache.broken[names[number]][1] for number in np.flatnonzero(rows < 0).tolist()}

    def __len__(self) -> int:
        return len(self.row)

    def workers(self, count: int) -> int:
        """Return the number of loading processes to start, if `count` are configured: 0, because reading is faster."""
        return 0

    def open(self, number: int) -> int:
        """Return image `number` in the form for `batch`, which is the number.

        Raises:
            ImageError: the image could not be read when the cache was made.
        """
        if number in self.errors:
            raise ImageError(self.errors[number])
        return number

    def batch(
        self, opened: Sequence[int], views: Sequence[int] | None = None, grid: Grid | None = None
    ) -> dict[str, torch.Tensor | Grid]:
        """Return the tokens of B images as `image_tokens` (B, M, D).

        Args:
            opened: the images, as `open` returns them.
            views: view of each image; without it, the unchanged image.
            grid: compressed grid; `None` for the first grid of the cache.
        """
        shards = self.shards[write_grid(grid) if grid else self.first]
        some = shards[self.shard[opened[0]]]
        tokens = torch.empty(len(opened), *some.shape[2:], dtype=some.dtype)  # (B, M, D)
        for i, number in enumerate(opened):
            tokens[i] = shards[self.shard[number]][self.row[number], views[i] if views else 0]
        return {"image_tokens": tokens}


def open_cache(
    folder: Path | None,
    model: CaptionerModel,
    processor: CaptionerProcessor,
    grid: Grid | None = None,
    grids: Sequence[Grid] = (),
) -> TokenCache | None:
    """Open the cache of a model's image tokens; returns None if `folder` is None.

    Args:
        folder: folder of the cache.
        model: the model.
        processor: its processor.
        grid: grid of the tokens; `None` for the model's own.
        grids: further grids of the tokens, from which training draws.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the cache is of another model, lacks a grid, or is damaged.
    """
    if folder is None:
        return None
    source = encoder_fingerprint(model.encoder, model.config.encoder_config, processor.image)
    names = [grid_name(model.encoder, each) for each in (grid or model.config.grid, *grids)]
    return TokenCache(folder, source, tuple(dict.fromkeys(names)))


def read_manifest(folder: Path) -> dict:
    """Read the manifest of a cache.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the file is not the manifest of a cache.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingError(f"no token cache at '{folder}'; `captioner cache` makes one", "tokens")
    try:
        manifest = json.loads(path.read_text())
        if manifest.keys() >= {*SOURCE, "grids", "views"}:
            return manifest
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"'{path}' is not a token cache's; delete the folder and run `captioner cache` again")


def manifest_digest(manifest: dict) -> str:
    """Return the digest that every shard of a cache contains."""
    return digest_json(manifest)
