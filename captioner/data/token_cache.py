"""The token cache: the tokens of a frozen encoder for each image, computed once, stored on disk, memory-mapped.

Letters: n images of a shard, V views of each, B images of a batch, M image tokens, D their width.

A cache is a folder. `cache.json` says what made it: encoder, a digest of its weights, preprocessing, grids, views.
Beside it are shards of at most 512 images, `tokens-*.safetensors`: for each grid one tensor (n, V, M, D), and in the
header which images they are. Why safetensors: a shard is one contiguous array that maps into memory without a copy
(Arrow would cut rows into batches and give back lists of them), its header tells a truncated file from a whole one (a
raw array cannot), and the project writes no other format. Why shards: each is written under another name and renamed,
so that a kill at any moment costs the images of one shard and leaves nothing half done, processes need no lock to share
the work, and further splits are further shards.
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

from captioner.encoders import TokenEncoder
from captioner.errors import MissingError, SettingError
from captioner.grids import Grid, write_grid
from captioner.images import ImageError
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.runs.digests import digest_json, digest_tensors

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "cache.json"
SHARDS = "tokens-*.safetensors"
SAMPLE = 64
"""Images of a table whose size in bytes is compared with what was encoded."""
SOURCE = ("encoder", "arguments", "weights", "image")
"""Entries of the manifest that a model must share to use the cache."""


def encoder_fingerprint(encoder: TokenEncoder, encoder_config: dict, image: dict) -> dict:
    """Describe what decides the tokens of an image: the encoder, its weights, the preprocessing.

    Weights are compared as float16, so that a model saved in half precision keeps the cache it was trained on.

    Args:
        encoder_config: timm name and arguments, as in `CaptionerConfig`.
        image: timm's data settings, as in `CaptionerProcessor`.
    """
    weights, arguments = digest_tensors(encoder.state_dict()), encoder_config.get("kwargs", {})
    content = {"encoder": encoder_config["name"], "arguments": arguments, "weights": weights, "image": image}
    return json.loads(json.dumps(content))  # tuples become lists, as they come back from disk


def grid_name(encoder: TokenEncoder, grid: Grid | None) -> str:
    """Name the tokens of a grid, or for `None` of the encoder's default: `5x5`, or `all` for a token of every cell."""
    grid = grid or encoder.grid
    return "all" if grid is None else write_grid(grid)


def image_names(table: "Dataset") -> list[str]:
    """Name the images of a caption table by image id and file name, without touching the images."""
    columns = table.select_columns(["image_id", "image"]).with_format("arrow")[:]
    paths = struct_field(columns["image"], "path").to_pylist()
    return [f"{i} {Path(path or '').name}" for i, path in zip(columns["image_id"].to_pylist(), paths, strict=True)]


def image_size(image: dict) -> int:
    """Return the size of an encoded image in bytes, or -1 where there is no such file."""
    if image["bytes"] is not None:
        return len(image["bytes"])
    try:
        return os.path.getsize(image["path"])
    except OSError:
        return -1


class TokenCache:
    """A token cache on disk; opening it reads the headers of its files, and maps the tokens of the grids named.

    Args:
        folder: what `captioner cache` wrote.
        source: the `encoder_fingerprint` that the cache must come from; `None` takes any.
        grids: names of the grids to read; images are read at the first of them where no other is given.

    Raises:
        FileNotFoundError: no cache is there.
        ValueError: it comes from another encoder, lacks a grid, is damaged, or is no cache at all.
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
                tokens = {grid: file.get_tensor(grid) for grid in self.shards} if images else {}
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"'{path}' is truncated or damaged ({error}); {remedy}") from None
        if made_by != expected:
            raise ValueError(f"'{path}' belongs to another token cache; {remedy}")
        for name, size in images:
            self.rows[name] = len(self.sizes)
            self.sizes.append(size)
        self.broken |= {name: (size, error) for name, size, error in broken}
        if images:
            self.starts.append(len(self.sizes))
        for grid, shard in tokens.items():
            self.shards[grid].append(shard)

    def check(self, source: dict) -> None:
        """Refuse a cache that another encoder or another preprocessing made.

        Raises:
            SettingError: saying what differs.
        """
        if difference := self.difference(source):
            raise SettingError(f"{difference}; this model needs a cache of its own", "tokens")

    def difference(self, source: dict) -> str | None:
        """Say how the encoder and the preprocessing of the cache differ from a model's; `None` if they do not."""
        made_by = {key: self.manifest[key] for key in SOURCE}
        if made_by == source:
            return None
        if made_by["encoder"] != source["encoder"]:
            what = f"another encoder, {made_by['encoder']}, where the model has {source['encoder']}"
        elif made_by["arguments"] != source["arguments"]:
            one, other = (" ".join(f"{k}={v}" for k, v in s["arguments"].items()) for s in (made_by, source))
            what = f"{source['encoder']} with {one or 'no options'}, where the model has {other or 'no options'}"
        elif made_by["weights"] != source["weights"]:
            what = f"other weights of {source['encoder']} than the model's"
        else:
            keys = [k for k in made_by["image"] | source["image"] if made_by["image"].get(k) != source["image"].get(k)]
            what = "other preprocessing: " + ", ".join(
                f"{k} {made_by['image'].get(k)}, where the model has {source['image'].get(k)}" for k in keys
            )
        return f"the token cache '{self.folder}' comes from {what}"

    def missing(self, table: "Dataset") -> int:
        """Count the images of a table that are neither encoded nor known to be unreadable."""
        return sum(name not in self.rows and name not in self.broken for name in image_names(table))

    def images(self, table: "Dataset") -> "CachedImages":
        """Find the images of a table.

        Raises:
            ValueError: some are not in the cache, or are not the files that were encoded.
        """
        names = image_names(table)
        if count := sum(name not in self.rows and name not in self.broken for name in names):
            raise ValueError(
                f"the token cache '{self.folder}' lacks {count} of {len(names)} images of the split "
                f"'{table[0]['split']}'; `captioner cache` adds a split to the same folder"
            )
        for number in np.linspace(0, len(names) - 1, min(SAMPLE, len(names))).astype(int).tolist():
            image, row = table[number]["image"], self.rows.get(names[number])
            if row is not None and self.sizes[row] != (size := image_size(image)):
                raise ValueError(
                    f"'{image['path'] or names[number]}' has {size} bytes, but {self.sizes[row]} when it was encoded "
                    f"into '{self.folder}': the images have changed; make another token cache"
                )
        return CachedImages(self, names)


class CachedImages:
    """The images of a caption table as the model takes them, from a token cache: `image_tokens` (B, M, D)."""

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
        """Return how many loading processes to start in place of `count`: none, as they cost more than reading."""
        return 0

    def open(self, number: int) -> int:
        """Return image `number` as `batch` takes it.

        Raises:
            ImageError: it could not be read when the cache was made.
        """
        if number in self.errors:
            raise ImageError(self.errors[number])
        return number

    def batch(
        self, opened: Sequence[int], views: Sequence[int] | None = None, grid: Grid | None = None
    ) -> dict[str, torch.Tensor]:
        """Gather the tokens of B images at a grid, each in the view given, else in the plain one."""
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
    """Open the cache of a model's image tokens; None without a folder.

    Args:
        grid: the grid at which images are read; `None` for the model's own.
        grids: all grids at which images may be read in its place.

    Raises:
        FileNotFoundError: no cache is there.
        ValueError: it is not of this model, lacks a grid, or is damaged.
    """
    if folder is None:
        return None
    source = encoder_fingerprint(model.encoder, model.config.encoder_config, processor.image)
    names = [grid_name(model.encoder, each) for each in (grid or model.config.grid, *grids)]
    return TokenCache(folder, source, tuple(dict.fromkeys(names)))


def read_manifest(folder: Path) -> dict:
    """Read what made a cache.

    Raises:
        FileNotFoundError: no cache is there.
        ValueError: the file is not a cache's.
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
    """Return the digest that every shard of a cache carries."""
    return digest_json(manifest)
