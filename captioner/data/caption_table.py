"""The table that every caption reader fills.

What was wrong with the data is counted in a `ReadReport`, never silent.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

OnBad = Literal["skip", "refuse"]

NO_SPLIT = "all"
"""Split of images that name none."""

IMAGE_FOLDERS = ("{folder}", "images/{folder}", "images", "{split}2017", "{split}2014", "val2014", "Images", ".")
"""Where the images of an annotation file are looked for, relative to the data root and to the file itself."""


@dataclass
class ReadReport:
    """What a reader found: counts of everything that did not make it into the table, with the first few examples."""

    images: int = 0
    captions: int = 0
    missing_images: list[str] = field(default_factory=list)
    duplicate_ids: list[str] = field(default_factory=list)
    empty_captions: list[str] = field(default_factory=list)
    images_without_captions: list[str] = field(default_factory=list)
    images_in_several_splits: list[str] = field(default_factory=list)

    def problems(self) -> dict[str, list[str]]:
        """Map each kind of problem that occurred to the images it occurred in."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), list) and v}

    def __str__(self) -> str:
        found = [
            f"{len(where)} {kind.replace('_', ' ')} ({', '.join(where[:3])}{', ...' if len(where) > 3 else ''})"
            for kind, where in self.problems().items()
        ]
        return f"{self.images} images, {self.captions} captions" + (f"; skipped {'; '.join(found)}" if found else "")


@dataclass
class Record:
    """One image as a reader yields it, unchecked: `image` is a path below the images, or a row of a `datasets` set."""

    image_id: int | str
    image: Any
    captions: list[str]
    split: str
    several_splits: bool = False


class ImageFinder:
    """Find image files by name under a data root, listing each folder once; names cannot leave the root."""

    def __init__(self, root: Path, folder: Path | None):
        self.bases = [folder] if folder is not None else [root, root.parent]
        self.listings: dict[Path, frozenset[str]] = {}

    def __call__(self, name: str, split: str) -> Path | None:
        """Return the path of image `name`, or None.

        Raises:
            ValueError: the name is absolute or climbs out of its folder.
        """
        relative = PurePosixPath(str(name))
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"image name '{name}' leaves the image folder; names must be relative, without '..'")
        for base in self.bases:
            for place in IMAGE_FOLDERS:
                folder = base / place.format(folder=relative.parent, split=split)
                if relative.name in self.list(folder):
                    return folder / relative.name
        return None

    def list(self, folder: Path) -> frozenset[str]:
        """Return the names in a folder (none if it does not exist)."""
        if folder not in self.listings:
            self.listings[folder] = frozenset(p.name for p in folder.iterdir()) if folder.is_dir() else frozenset()
        return self.listings[folder]


def build_table(
    records: Iterable[Record], images: "Dataset | None", root: Path, folder: Path | None, on_bad: OnBad, name: str
) -> "Dataset":
    """Check the records, count what is wrong, and build the table; `images` holds the images that have no path."""
    import datasets

    report, find, seen = ReadReport(), ImageFinder(root, folder), set()
    table: dict[str, list] = {"image_id": [], "image": [], "captions": [], "split": []}
    for record in records:
        label = str(record.image_id)
        if record.image_id in seen:
            report.duplicate_ids.append(label)
            continue
        seen.add(record.image_id)
        captions = [" ".join(c.split()) for c in record.captions if isinstance(c, str) and c.strip()]
        report.empty_captions += [label] * (len(record.captions) - len(captions))
        image = record.image
        if isinstance(image, str):
            path = find(image, record.split)
            image = {"path": str(path), "bytes": None} if path else None
        elif images is None and not isinstance(image, dict):
            image = None  # a number, say, where a name should be
        if record.several_splits:
            report.images_in_several_splits.append(label)
        elif image is None:
            report.missing_images.append(label if record.image is None else str(record.image))
        elif not captions:
            report.images_without_captions.append(label)
        else:
            for column, value in zip(table, (record.image_id, image, captions, record.split), strict=True):
                table[column].append(value)
    report.images, report.captions = len(table["image"]), sum(map(len, table["captions"]))
    if report.problems():
        if on_bad == "refuse":
            raise ValueError(f"{name}: {report}; fix the data or pass --data.on-bad skip")
        logger.warning("%s: %s", name, report)
    if not report.images:
        if len(report.missing_images) == len(seen) and seen:
            raise FileNotFoundError(
                f"{name}: none of the {len(seen)} images was found; name their folder, --data.images"
            )
        raise ValueError(f"{name}: no captioned images")
    if not all(isinstance(i, int) for i in table["image_id"]):
        table["image_id"] = [str(i) for i in table["image_id"]]
    if images is None:
        return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))
    rows = table.pop("image")
    images = images.cast_column("image", datasets.Image(decode=False))
    if rows != list(range(len(images))):
        images = images.select(rows).flatten_indices()  # a copy on disk, not in memory
    joined = datasets.concatenate_datasets([images, datasets.Dataset.from_dict(table)], axis=1)
    return joined.select_columns(["image_id", "image", "captions", "split"])
