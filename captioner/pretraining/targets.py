"""The outputs of teachers for each view, stored on disk, so that a teacher computes each of them once.

Letters: n images, V versions (views) of each, B batch.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from captioner.runs.digests import digest_text
from captioner.runs.files import open_whole

Targets = dict[str, torch.Tensor]
"""Outputs of a teacher by name: `logits` (B, K), `pooled` (B, C), `grid` (B, C, h, w), `maps` (B, K, h, w)."""


class TargetStore:
    """A teacher's outputs for V fixed views of n images, in half precision, in memory-mapped files.

    Training fills the files. Several processes of one machine may share a folder: they write different entries, or
    equal values. One process must create the files before the others open them.

    Args:
        folder: folder of the files; it is created if it does not exist.
        stamp: everything that the outputs depend on (images, views, teacher), as a text. Files with another stamp are
            replaced.
        images: n.
        versions: V.
        shapes: shape of each output, without the batch.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, folder: Path, stamp: str, images: int, versions: int, shapes: Mapping[str, tuple[int, ...]]):
        self.folder, self.count, self.versions = folder, images * versions, versions
        kinds: dict[str, tuple[np.dtype, tuple[int, ...]]]
        kinds = {name: (np.dtype(np.float16), tuple(shape)) for name, shape in sorted(shapes.items())}
        kinds["filled"] = (np.dtype(np.uint8), ())
        sizes = {name: self.count * math.prod(shape) * dtype.itemsize for name, (dtype, shape) in kinds.items()}
        stamp = digest_text(f"{stamp} {images} {versions} {kinds}")
        if not self.holds(stamp, sizes):
            self.lay_out(stamp, sizes)
        maps = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r+", shape=(self.count, *shape))
            for name, (dtype, shape) in kinds.items()
        }
        self.filled = maps.pop("filled")
        self.files: dict[str, np.memmap] = maps

    def holds(self, stamp: str, sizes: dict[str, int]) -> bool:
        """Return whether the folder holds complete files with this stamp."""
        try:
            known = json.loads((self.folder / "targets.json").read_text())["stamp"]
            return known == stamp and all((self.folder / f"{n}.bin").stat().st_size == s for n, s in sizes.items())
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return False

    def lay_out(self, stamp: str, sizes: dict[str, int]) -> None:
        """Create the files. They are sparse, so that they take disk space only as they are filled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "targets.json").unlink(missing_ok=True)
        for old in self.folder.glob("*.bin"):
            old.unlink()  # another run that maps the old file can still read it
        for name, size in sizes.items():
            with (self.folder / f"{name}.bin").open("wb") as file:
                file.truncate(size)
        with open_whole(self.folder / "targets.json") as file:
            json.dump({"stamp": stamp}, file)

    def get(self, rows: np.ndarray, versions: np.ndarray, compute: Callable[[torch.Tensor], Targets]) -> Targets:
        """Return the outputs (B, ...) for views; missing ones are computed and stored.

        Args:
            rows: image of each view, (B,).
            versions: version of each view, (B,).
            compute: takes the places (b,) in the batch whose outputs are missing, and returns their outputs (b, ...).
        """
        keys = rows * self.versions + versions
        missing = np.flatnonzero(self.filled[keys] == 0)
        if len(missing):
            fresh = compute(torch.from_numpy(missing))
            for name, value in fresh.items():
                self.files[name][keys[missing]] = value.to("cpu", torch.float16).numpy()
            self.filled[keys[missing]] = 1
        return {name: torch.from_numpy(file[keys]) for name, file in self.files.items()}
