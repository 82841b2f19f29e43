"""Images for pretraining, decoded once into small uint8 squares, which stay in memory or on the GPU.

Decoding a JPEG costs more than a training step of a small student. So each image of each source is opened once, resized
to a square, and written into one memory-mapped file.

Letters: n images, B images of a batch, R side of a square in pixels.
"""

import glob
import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioner.data.image_files import search_folder
from captioner.images import SUFFIXES, ImageError, ImageSource, open_image
from captioner.runs.digests import digest_bytes, digest_json, digest_text, new_digest
from captioner.runs.files import open_whole
from captioner.runs.progress import progress_bar

logger = logging.getLogger(__name__)

CHUNK = 1024
"""Images that are decoded at a time."""


@dataclass
class Source:
    """Images from one place, and the class of each where it is known.

    Attributes:
        name: the path or glob pattern of the images, as in the settings.
        items: pairs of an image and its class name, or `None` where the class is unknown.
        stamp: a text that changes when the content of the source changes.
    """

    name: str
    items: Iterable[tuple[ImageSource, str | None]]
    stamp: str

    def without(self, names: frozenset[str], files: frozenset[str] = frozenset()) -> "Source":
        """Return the source without some images.

        Args:
            names: names of image files that are left out.
            files: paths of image files that are left out, as `file_path` returns them.
        """
        if not names and not files:
            return self
        items = (item for item in self.items if file_name(item[0]) not in names and file_path(item[0]) not in files)
        return Source(self.name, items, digest_json([self.stamp, sorted(names), sorted(files)]))


def file_path(image: ImageSource) -> str:
    """Return the whole path of an image's file, links followed; empty where it has none on this disk."""
    path = image.get("path") if isinstance(image, Mapping) else image
    return os.path.realpath(path) if isinstance(path, str | os.PathLike) and os.path.exists(path) else ""


def file_name(image: ImageSource) -> str:
    """Return the name of an image's file without folders; empty where it has none."""
    path = image.get("path") if isinstance(image, Mapping) else image
    return Path(path).name if isinstance(path, str | os.PathLike) else ""


def open_source(name: str) -> Source:
    """Open a folder (each subfolder is a class), parquet files or WebDataset shards.

    Args:
        name: a path or a glob pattern.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file cannot be read, has no column `image`, or has another format.
    """
    if Path(name).is_dir():
        return open_folder(Path(name))
    files = sorted(glob.glob(name))
    if not files:
        raise FileNotFoundError(f"no images at '{name}': neither a folder nor a file")
    stamp = stamp_files(files)
    kinds = {Path(file).suffix for file in files}
    if kinds == {".parquet"}:
        return Source(name, read_parquet(name, files), stamp)
    if kinds == {".tar"}:
        return Source(name, read_shards(files), stamp)
    raise ValueError(f"'{name}' is neither a folder, nor .parquet files, nor .tar shards")


def open_folder(root: Path) -> Source:
    """List the images of a folder. If all lie in subfolders, the subfolder of the root names the class.

    Raises:
        FileNotFoundError: there are no images.
    """
    found = search_folder(root)
    for reason in found.unreadable:
        logger.warning("left out: %s", reason)
    if left_out := found.left_out():
        logger.warning("left out in the folder '%s': %s", root, left_out)
    if not found.files:
        raise FileNotFoundError(f"no images in the folder '{root}'")
    parts = [path.relative_to(root).parts for path in found.files]
    classes = [p[0] if len(p) > 1 else None for p in parts]
    labels = classes if None not in classes and len(set(classes)) > 1 else [None] * len(found.files)
    return Source(str(root), list(zip(found.files, labels, strict=True)), stamp_files(found.files))


def stamp_files(files: Iterable[str | Path]) -> str:
    """Digest the names, sizes and modification times of files."""
    lines = []
    for file in files:
        try:
            known = os.stat(file)
        except OSError:
            lines.append(f"{file} gone\n")
        else:
            lines.append(f"{file} {known.st_size} {known.st_mtime_ns}\n")
    return digest_text("".join(lines))


def stamp_images(images: Iterable[Mapping]) -> str:
    """Digest the images of a `datasets` column without decoding them: their bytes, or their files as `stamp_files`."""
    found = [(image["bytes"], image["path"]) for image in images]
    return digest_json([stamp_files([path]) if data is None else digest_bytes(data) for data, path in found])


def read_parquet(name: str, files: list[str]) -> Iterable[tuple[Mapping, str | None]]:
    """Read the columns `image` and, if it is a class label, `label` of parquet files.

    Returns:
        Pairs of an image and its class name, as in `Source`.

    Raises:
        ValueError: a file is not parquet, or has no column `image`.
    """
    import datasets

    try:
        table = datasets.load_dataset("parquet", data_files=files, split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"'{name}' is not readable parquet: {error}") from None
    if "image" not in table.column_names:
        raise ValueError(f"'{name}' has no column 'image', only {', '.join(table.column_names)}")
    table = table.cast_column("image", datasets.Image(decode=False))
    kind = table.features.get("label")
    if not isinstance(kind, datasets.ClassLabel):
        return ((record["image"], None) for record in table)
    named = [kind.names[i] if i is not None and i >= 0 else None for i in table["label"][:]]
    return ((record["image"], label) for record, label in zip(table, named, strict=True))


def read_shards(files: list[str]) -> Iterator[tuple[bytes, str | None]]:
    """Yield the image of each sample of WebDataset shards, and the class in its `.cls` or `.cls.txt`.

    Raises:
        ValueError: webdataset is not installed, or a shard cannot be read.
    """
    try:
        import webdataset
    except ImportError:
        raise ValueError("reading .tar shards needs webdataset: pip install 'captioner[webdataset]'") from None
    for file in files:
        try:
            for sample in webdataset.WebDataset([os.path.abspath(file)], shardshuffle=False, empty_check=False):
                image = next((value for key, value in sample.items() if f".{key.lower()}" in SUFFIXES), None)
                if image is not None:
                    label = sample.get("cls", sample.get("cls.txt"))
                    yield image, label.decode(errors="replace").strip() if label is not None else None
        except (OSError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"shard '{file}' is not readable: {error}") from None


class ImageStore:
    """The decoded squares of several sources, and their classes.

    Attributes:
        stamp: digest of the squares and their classes; it does not depend on where the images came from.
        squares: uint8 (n, 3, R, R), memory-mapped or on the device.
        labels: int64 (n,), -1 where an image has no class.
        classes: class names; equal names in several sources are one class.
        ranges: rows of each source.
        names: name of each image's file, empty where it has none.
        usable: whether the image of each row could be opened, bool (n,).
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / "images.json").read_text())
        self.stamp, self.side, self.classes = meta["content"], meta["side"], meta["classes"]
        self.names: list[str] = meta["names"]
        self.ranges = [range(start, stop) for start, stop in meta["ranges"]]
        self.labels = torch.tensor(meta["labels"])
        broken = np.zeros(len(self.labels), bool)
        broken[meta["broken"]] = True
        self.usable = ~broken
        shape = (len(self.labels), 3, self.side, self.side)
        # Nothing is written to it, but torch warns of arrays that cannot be written.
        mapped = np.memmap(folder / "images.u8", np.uint8, "r+", shape=shape)
        self.squares = torch.from_numpy(mapped)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, share: float = 0.4) -> "ImageStore":
        """Move the squares onto a GPU if they fill at most a `share` of its free memory; returns self."""
        if device.type == "cuda" and self.squares.numel() <= share * torch.cuda.mem_get_info(device)[0]:
            self.squares = self.squares.to(device)
        return self

    def batch(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the squares (B, 3, R, R) of some rows (B,), on the device."""
        return self.squares[rows.to(self.squares.device)].to(device, non_blocking=True)


def store_images(sources: list[Source], side: int, folder: Path, workers: int = 4) -> ImageStore:
    """Decode all images into a folder, or open the store in it if it was made from the same sources.

    An image that cannot be opened is never used; a warning names it, and another states the number of these images.

    Args:
        sources: the images.
        side: R, the side of a square in pixels; an image takes 3 R^2 bytes of disk.
        folder: folder of the store.
        workers: number of threads that decode.

    Raises:
        ValueError: no image can be opened.
        OSError: the disk is full.
    """
    stamp = digest_json([(s.name, s.stamp, side, "with names") for s in sources])
    meta, data = folder / "images.json", folder / "images.u8"
    known = json.loads(meta.read_text()) if meta.is_file() and data.is_file() else {}
    if known.get("stamp") == stamp and data.stat().st_size == 3 * side**2 * len(known["labels"]):
        return ImageStore(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta.unlink(missing_ok=True)
    data.unlink(missing_ok=True)  # a run that maps the old file still reads it
    content = new_digest()
    ranges: list[tuple[int, int]] = []
    labels: list[int] = []
    names: list[str] = []
    broken: list[int] = []
    classes: dict[str, int] = {}

    def decode(item: tuple[ImageSource, str | None]) -> tuple[np.ndarray, str | None]:
        try:
            image = open_image(item[0]).resize((side, side), Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1), item[1]
        except ImageError as error:
            logger.warning("left out: %s", error)
            return np.zeros((0,), np.uint8), item[1]

    bar = progress_bar(desc="decoding images", unit="img")
    with data.open("wb") as file, ThreadPoolExecutor(workers) as pool:
        for source in sources:
            start, items = len(labels), iter(source.items)
            while chunk := list(islice(items, CHUNK)):
                names += [file_name(image) for image, _ in chunk]
                for square, label in pool.map(decode, chunk):
                    if square.size == 0:
                        broken.append(len(labels))
                        square = np.zeros((3, side, side), np.uint8)
                    labels.append(-1 if label is None else classes.setdefault(label, len(classes)))
                    pixels = np.ascontiguousarray(square).data
                    content.update(pixels)
                    file.write(pixels)
                    bar.update()
            ranges.append((start, len(labels)))
    bar.close()
    if len(broken) == len(labels):
        raise ValueError(f"no image in {', '.join(source.name for source in sources)} can be opened")
    if broken:
        logger.warning("%d of %d images could not be opened and are left out", len(broken), len(labels))
    found = {"side": side, "classes": list(classes), "ranges": ranges, "labels": labels, "broken": broken}
    content.update(json.dumps(found).encode())
    with open_whole(meta) as described:
        json.dump({"stamp": stamp, "content": content.hexdigest(), "names": names, **found}, described)
    return ImageStore(folder)
