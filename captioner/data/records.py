"""Records, which are images with their captions as readers yield them, and the check of which can be used.

A `ReadReport` counts the unusable ones; none is left out in silence.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from captioner.data.captions import ImageId, read_captions_of
from captioner.data.image_finder import portable_name
from captioner.images.names import escape_name

OnBad = Literal["skip", "refuse"]

NO_SPLIT = "all"
"""Split of images without a split."""


@dataclass(slots=True)
class Record:
    """One image as a reader yields it, unchecked."""

    image_id: ImageId
    image: Any
    """Name of its file, or its row in a `datasets` set that contains images; None if it is missing."""
    captions: Any
    """A list of its captions as they are in the data, of any types."""
    split: str
    several_splits: bool = False
    """Whether rows of this image have different splits."""
    beside: Path | None = None
    """Folder of its annotations, if that is not the root of the data."""
    listed: bool = True
    """Whether the image is in the list of images; COCO files may contain captions of others."""


@dataclass
class ReadReport:
    """Counts of what was read, and the images of everything that cannot be used."""

    images: int = 0
    captions: int = 0
    missing_images: list[ImageId] = field(default_factory=list)
    images_named_not_in_utf_8: list[ImageId] = field(default_factory=list)
    """Images whose path has bytes that are no UTF-8; no table can hold such a path."""
    duplicate_ids: list[ImageId] = field(default_factory=list)
    """Images that occur twice, and all images that share their id with a different image."""
    empty_captions: list[ImageId] = field(default_factory=list)
    unreadable_captions: list[ImageId] = field(default_factory=list)
    images_without_captions: list[ImageId] = field(default_factory=list)
    images_in_several_splits: list[ImageId] = field(default_factory=list)

    def problems(self) -> dict[str, list[ImageId]]:
        """Return the images of each kind of problem that occurred."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), list) and v}

    def unusable(self) -> str:
        """Return what cannot be used, as text: each kind with its first few images; empty if all can be used."""
        found = []
        for kind, where in self.problems().items():
            names = ", ".join(escape_name(str(name)) for name in where[:3])
            found.append(f"{len(where)} {kind.replace('_', ' ')} ({names}{', ...' if where[3:] else ''})")
        return f"; unusable: {'; '.join(found)}" if found else ""

    def __str__(self) -> str:
        return f"{self.images} images, {self.captions} captions{self.unusable()}"


def usable_records(
    records: Iterable[Record], report: ReadReport, locate: Callable[[Record], Any] | None = None
) -> Iterator[tuple[Record, Any, list[str]]]:
    """Yield each record that can be used, with its image and its captions; count the others.

    Ids are compared as text: 7 and "7" are one id. If several images have the same id, it is unknown which captions
    belong to which image, so all of these images are left out.

    Args:
        records: the records.
        report: counts the records that are left out, and those that are not.
        locate: finds the image of a record, or None if there is none; without it, images are not needed. It raises
            UnicodeEncodeError for a path that is not UTF-8.

    Yields:
        Each usable record, with its image as `locate` returned it and its captions.
    """
    records = list(records)
    first: dict[str, Record] = {}
    clashing: set[str] = set()
    for record in records:
        if record.image is None and locate is not None:
            continue  # it is counted as missing, and cannot be confused with another image
        other = first.setdefault(str(record.image_id), record)
        if other is not record and not same_image(other.image, record.image):
            clashing.add(str(record.image_id))
    for record in records:
        image_id, key = record.image_id, str(record.image_id)
        if record.image is not None or locate is None:
            if key in clashing:
                report.duplicate_ids.append(f"{image_id}: {record.image}")
                continue
            if first[key] is not record:
                report.duplicate_ids.append(image_id)
                continue
        texts, empty, unreadable = read_captions_of(record.captions)
        report.empty_captions += [image_id] * empty
        report.unreadable_captions += [image_id] * unreadable
        try:
            image = None if locate is None else locate(record)
        except UnicodeEncodeError:
            report.images_named_not_in_utf_8.append(str(record.image))
            continue
        if record.several_splits:
            report.images_in_several_splits.append(image_id)
        elif image is None and locate is not None:
            report.missing_images.append(image_id if record.image is None else record.image)
        elif not texts:
            report.images_without_captions.append(image_id)
        else:
            report.images += 1
            report.captions += len(texts)
            yield record, image, texts


def same_image(one: Any, other: Any) -> bool:
    """Return whether two records name the same image."""
    if isinstance(one, str) and isinstance(other, str):
        return one == other or portable_name(one) == portable_name(other)
    return one == other
