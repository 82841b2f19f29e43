"""What teachers said about each view, kept on disk, so that every view is shown to a teacher once.

Letters: n pictures, V versions (views) of each, B batch.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Targets = dict[str, torch.Tensor]


class TargetStore:
    """Teacher outputs of V fixed views of n pictures, half precision, memory-mapped and filled as training goes.

    Several processes of one machine may share a folder: they then write different entries, or the same values.

    Args:
        folder: where the files are; made if missing.
        stamp: all that the outputs depend on (pictures, views, teachers); other outputs in the folder are replaced.
    """

    def __init__(self, folder: Path, stamp: str, pictures: int, versions: int):
        self.folder, self.count = folder, pictures * versions
        self.versions = versions
        self.stamp = hashlib.sha256(f"{stamp} {pictures} {versions}".encode()).hexdigest()
        self.files: dict[str, np.memmap] = {}
        meta = folder / "targets.json"
        if meta.is_file() and (known := json.loads(meta.read_text()))["stamp"] == self.stamp:
            for name, shape in known["shapes"].items():
                self.files[name] = self.map(name, tuple(shape), np.float16, "r+")
            self.filled = self.map("filled", (), np.uint8, "r+")

    def map(self, name: str, shape: tuple[int, ...], dtype: type, mode: str) -> np.memmap:
        """Map one file with an entry of `shape` per view; a new one is sparse and takes room as it is filled."""
        return np.memmap(self.folder / f"{name}.bin", dtype, mode, shape=(self.count, *shape))

    def create(self, outputs: Targets) -> None:
        """Lay out the files for outputs of these shapes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "targets.json").unlink(missing_ok=True)
        shapes = {name: tuple(value.shape[1:]) for name, value in outputs.items()}
        self.files = {name: self.map(name, shape, np.float16, "w+") for name, shape in shapes.items()}
        self.filled = self.map("filled", (), np.uint8, "w+")
        (self.folder / "targets.json").write_text(json.dumps({"stamp": self.stamp, "shapes": shapes}))

    def get(self, rows: np.ndarray, versions: np.ndarray, compute: Callable[[torch.Tensor], Targets]) -> Targets:
        """Return the outputs (B, ...) for views; `compute` is asked for those not there yet.

        Args:
            rows: picture of each view, (B,).
            versions: version of each view, (B,).
            compute: takes the places in the batch (b,) that are wanted and returns their outputs (b, ...).
        """
        keys = rows * self.versions + versions
        missing = np.flatnonzero(self.filled[keys] == 0) if self.files else np.arange(len(keys))
        if len(missing):
            fresh = compute(torch.from_numpy(missing))
            if not self.files:
                self.create(fresh)
            for name, value in fresh.items():
                self.files[name][keys[missing]] = value.to("cpu", torch.float16).numpy()
            self.filled[keys[missing]] = 1
        return {name: torch.from_numpy(file[keys]) for name, file in self.files.items()}
