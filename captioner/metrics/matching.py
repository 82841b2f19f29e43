"""Find the image of the annotations that a result is about, where the two write ids in different ways."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from captioner.data.captions import ImageId, clean_text
from captioner.data.image_finder import portable_name
from captioner.metrics.files import ReferenceSet


def match_ids(rows: list[dict[str, Any]], references: ReferenceSet) -> tuple[list[dict[str, Any]], str | None]:
    """Translate the ids of results into ids of the annotations, where the two write them in different ways.

    Nothing is translated if at least one id of the results is an id of the annotations. Otherwise the ids are compared
    as numbers, as text, and as names of image files: then an image is found by the longest ending of its path that
    both sides share, with or without the file's suffix.

    Returns:
        The rows, with ids of the annotations where they were found; and a note of how they were matched, or None. A
        name that fits several images stays as it is.
    """
    known = references.captions
    if any(row["image_id"] in known for row in rows):
        return rows, None
    ways: dict[str, Callable[[ImageId], ImageId]] = {
        "as numbers; they are written as text": _number,
        "as text; they are written as numbers": str,
        "by the names of image files": ImageNames(references.files).find,
    }
    for how, translate in ways.items():
        matched = [row | {"image_id": translate(row["image_id"])} for row in rows]
        if any(row["image_id"] in known for row in matched):
            return matched, f"ids of the results were matched {how}"
    return rows, None


class ImageNames:
    """Finds images by the names of their files.

    Args:
        files: the name of each image's file, with its folders as far as the annotations give them.
    """

    def __init__(self, files: Mapping[ImageId, str]):
        self.whole: dict[str, list[ImageId]] = {}
        self.endings: dict[str, list[ImageId]] = {}
        self.stems: dict[str, list[ImageId]] = {}
        for image_id, file in files.items():
            name = portable_name(clean_text(file))
            self.whole.setdefault(name, []).append(image_id)
            for ending in path_endings(name):
                self.endings.setdefault(ending, []).append(image_id)
            for ending in path_endings(without_suffix(name)):
                self.stems.setdefault(ending, []).append(image_id)

    def candidates(self, name: str) -> list[ImageId]:
        """Return the images whose path shares the longest ending with a name."""
        name = portable_name(clean_text(name))
        if found := self.whole.get(name):
            return found
        for index, form in ((self.endings, name), (self.stems, name), (self.stems, without_suffix(name))):
            for ending in path_endings(form):
                if found := index.get(ending):
                    return found
        return []

    def find(self, name: ImageId) -> ImageId:
        """Return the id of the image with this name, or the name itself if no image or several images fit."""
        found = self.candidates(str(name))
        return found[0] if len(found) == 1 else name


def path_endings(name: str) -> list[str]:
    """Return a path, the path without its first folder, and so on, up to the file name alone."""
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def without_suffix(name: str) -> str:
    """Return a path without the suffix of its file."""
    head, _, ending = name.rpartition(".")
    return head if head and "/" not in ending and not head.endswith("/") else name


def check_names(
    rows: list[dict[str, Any]], matched: list[dict[str, Any]], references: ReferenceSet, path: Path, partial: bool
) -> None:
    """Refuse results whose names do not identify one image each.

    Args:
        rows: the results as they were read.
        matched: the same rows with ids of the annotations, as `match_ids` returns them.
        path: their file, for the error.
        partial: whether a name that several images of the annotations have may be left out.

    Raises:
        ValueError: two names stand for one image of the annotations, or one name may stand for several.
    """
    meant: dict[ImageId, ImageId] = {}
    unknown = []
    for row, found in zip(rows, matched, strict=True):
        written, image_id = row["image_id"], found["image_id"]
        if image_id not in references.captions:
            unknown.append(written)
        elif (other := meant.setdefault(image_id, written)) != written:
            raise ValueError(
                f"'{path}': '{other}' and '{written}' both stand for image {image_id!r} of the annotations"
            )
    if partial or not unknown:
        return
    names = ImageNames(references.files)
    for written in unknown:
        if len(several := names.candidates(str(written))) > 1:
            files = " or ".join(f"'{references.files[image_id]}'" for image_id in several[:2])
            raise ValueError(
                f"'{path}': the image '{written}' may be {files} of the annotations; "
                "give more of its path in the results"
            )


def names_in_results(
    rows: list[dict[str, Any]], matched: list[dict[str, Any]], references: ReferenceSet
) -> dict[ImageId, ImageId]:
    """Return the file name of each image as the results write it; for other images, the annotations' file name.

    Args:
        rows: the results as they were read.
        matched: the same rows with ids of the annotations, as `match_ids` returns them.

    Returns:
        The name of each image of the annotations that has one; empty if the results give ids and not names of files.
    """
    written = {new["image_id"]: old["image_id"] for old, new in zip(rows, matched, strict=True)}
    by_name = {i: name for i, name in written.items() if i in references.captions and _number(i) != _number(name)}
    if not by_name:
        return {}
    for names in (references.files | by_name, by_name):
        if len({names.get(image_id, image_id) for image_id in references.captions}) == len(references.captions):
            return names
    return {}


def _number(image_id: ImageId) -> ImageId:
    """Return an id that is a number written as text (also `7.0`, as data frames write it) as int; others unchanged."""
    digits = str(image_id).removesuffix(".0")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else image_id
