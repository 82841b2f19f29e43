"""What is scored against what: results as captioners write them, and reference captions; no image is needed.

Results are COCO's: a JSON list of `{"image_id": ..., "caption": ...}`, further keys ignored, or what
`captioner caption --output` writes. References are COCO's captions JSON or Karpathy's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.data.caption_output import COLUMNS
from captioner.data.readers import is_karpathy, load_json, load_rows, read_coco, read_karpathy
from captioner.data.splits import keep_split
from captioner.images.names import unescape_name
from captioner.metrics.scores import name_ids

ImageId = int | str

ID_KEYS = ("image_id", "path", "file_name", "filename", "image")
"""What names the image of a result, the first of them that is there."""


@dataclass
class ReferenceSet:
    """Reference captions of one split."""

    captions: dict[ImageId, list[str]] = field(default_factory=dict)
    """The references of each image."""
    files: dict[ImageId, str] = field(default_factory=dict)
    """Name of each image's file, as the annotations have it."""
    split: str = "all"
    """The split, guessed from the file's name where the format does not hold it."""
    warnings: list[str] = field(default_factory=list)
    """What was left out."""


def read_references(path: Path, split: str | None = None, restval: bool = False) -> ReferenceSet:
    """Read the reference captions of an annotation file.

    Args:
        path: COCO captions JSON or Karpathy's.
        split: Karpathy's split, `test` unless named; a COCO file is one split, so none may be named.
        restval: join Karpathy's `restval` images to `train`.

    Raises:
        ValueError: not such a file, an unknown split, an image twice, a caption that is no text, nothing left.
        OSError: the file cannot be read.
    """
    if path.suffix in (".csv", ".jsonl"):
        raise ValueError(f"'{path}' comes last, where the annotations do, and these are COCO's or Karpathy's JSON")
    content = load_json(path)
    if isinstance(content, list):
        raise ValueError(f"'{path}' is a list, as results are; annotations come last: RESULTS [RESULTS_B] ANNOTATIONS")
    found, warnings = ReferenceSet(), []
    if is_karpathy(content):
        records = list(keep_split(read_karpathy(content, path, restval), split or "test", path))
    elif split is not None:
        raise ValueError(f"'{path}' is not Karpathy's and has no splits; leave --split out")
    else:
        records = list(read_coco(content, path, None))
        listed = {image["id"] for image in content["images"]}
        if stray := [record.image_id for record in records if record.image_id not in listed]:
            records = [record for record in records if record.image_id in listed]
            warnings.append(f"captions of images that '{path.name}' does not list: left out {name_ids(stray)}")

    twice, odd, empty, silent = [], [], 0, []
    for record in records:
        if _plain_id(record.image_id) is None:
            raise ValueError(f"'{path}': an image id is neither a whole number nor text: {record.image_id!r}"[:300])
        if record.image_id in found.captions:
            twice.append(record.image_id)
        if not all(isinstance(caption, str) for caption in record.captions):
            odd.append(record.image_id)
            continue
        captions = [clean(caption) for caption in record.captions if caption.strip()]
        empty += len(record.captions) - len(captions)
        if captions:
            found.captions[record.image_id], found.files[record.image_id] = captions, str(record.image)
        else:
            silent.append(record.image_id)
    if twice:
        raise ValueError(f"'{path}': {name_ids(twice)} listed more than once; keep one of each")
    if odd:
        raise ValueError(f"'{path}': {name_ids(odd)} with a caption that is no text")
    if empty:
        warnings.append(f"empty references left out: {empty}")
    if silent:
        warnings.append(f"images without references left out: {name_ids(silent)}")
    if not found.captions:
        raise ValueError(f"'{path}' holds no captions")
    found.split, found.warnings = records[0].split, warnings
    return found


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read what a captioner wrote; captions are checked where they are scored.

    COCO results (a JSON list), one such object a line (`.jsonl`), or rows of a table (`.csv`). Where there is no
    `image_id`, the name of the image's file stands for it (`ID_KEYS`), as in what `captioner caption` writes; rows of
    images that it could not caption are left out.

    Returns:
        Rows with the keys `image_id` (int or str) and `caption`.

    Raises:
        ValueError: not rows with both, or an image id that is neither a number nor text.
        OSError: the file cannot be read.
    """
    if path.suffix == ".txt":
        raise ValueError(f"'{path}': results end in .json, .jsonl or .csv; name such an --output of captioner caption")
    content = load_rows(path) if path.suffix in (".jsonl", ".csv") else load_json(path)
    if path.suffix == ".csv" and content and tuple(content[0]) == COLUMNS:  # what `captioner caption` writes
        content = [row | {"path": unescape_name(row["path"])} for row in content]
    form = 'a list of {"image_id": ..., "caption": ...}'
    if not isinstance(content, list):
        raise ValueError(f"'{path}' holds no results: it must be {form}, not {_kind(content)}")
    if not content:
        raise ValueError(f"'{path}' is empty: no captions to score")
    names = [next((key for key in ID_KEYS if isinstance(row, dict) and key in row), None) for row in content]
    bad = [n for n, name in enumerate(names) if name is None or "caption" not in content[n]]
    if bad:
        raise ValueError(f"'{path}': {_entries(bad)} no image_id or no caption; results are {form}")
    ids = [_plain_id(row[name]) for name, row in zip(names, content, strict=True)]
    bad = [n for n, image_id in enumerate(ids) if image_id is None]
    if bad:
        what = f"such as {content[bad[0]][names[bad[0]]]!r}"[:60]
        raise ValueError(f"'{path}': {_entries(bad)} an image_id that is neither a whole number nor text, {what}")
    failed = [not row["caption"] and isinstance(row.get("error"), str) and bool(row["error"]) for row in content]
    if all(failed):
        raise ValueError(f"'{path}' holds no captions, only errors, such as: {content[0]['error'][:200]}")
    return [
        {"image_id": image_id, "caption": clean(row["caption"])}
        for image_id, row, left_out in zip(ids, content, failed, strict=True)
        if not left_out
    ]


def match_ids(rows: list[dict[str, Any]], references: ReferenceSet) -> tuple[list[dict[str, Any]], str | None]:
    """Find the images that results mean, where they write ids in another way than the annotations.

    Only if not one id is known as it stands: then numbers written as text (or the reverse) are tried, and names of
    image files with or without folder and ending.

    Returns:
        The rows, with ids of the annotations where they were found, and what was done, or None.
    """
    known = references.captions
    if any(row["image_id"] in known for row in rows):
        return rows, None
    ways = {
        "by number, which they write as text": lambda i: int(i) if isinstance(i, str) and _is_number(i) else i,
        "as text, which they write as numbers": str,
        "by the names of image files": _finder(references.files),
    }
    for how, translate in ways.items():
        matched = [row | {"image_id": translate(row["image_id"])} for row in rows]
        if any(row["image_id"] in known for row in matched):
            return matched, f"ids of the results were matched {how}"
    return rows, None


def _finder(files: Mapping[ImageId, str]) -> Callable[[ImageId], ImageId]:
    """Return what finds an image by the name of its file: in full, then without folder, then without ending.

    A name that several images have finds none; what is not found is returned as it is.
    """
    forms = (str, lambda name: PurePosixPath(name).name, lambda name: PurePosixPath(name).stem)
    owners: list[dict[str, list[ImageId]]] = [{} for _ in forms]
    for image_id, file in files.items():
        for form, images in zip(forms, owners, strict=True):
            images.setdefault(form(clean(file)), []).append(image_id)

    def find(image_id: ImageId) -> ImageId:
        for form, images in zip(forms, owners, strict=True):
            if found := images.get(form(str(image_id))):
                return found[0] if len(found) == 1 else image_id
        return image_id

    return find


def clean(caption: Any) -> Any:
    """Replace halves of surrogate pairs, which JSON can hold and no file or pipe can; other values are left."""
    return caption.encode("utf-8", "replace").decode("utf-8") if isinstance(caption, str) else caption


def _plain_id(value: Any) -> ImageId | None:
    """Take whole numbers and text for ids; 7.0, as data frames write it, is 7."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return clean(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def _entries(places: list[int], first: int = 3) -> str:
    shown = ", ".join(str(place + 1) for place in places[:first])
    plural = len(places) > 1
    return f"{len(places):,} entr{'ies' if plural else 'y'} (number {shown}{', ...' * (len(places) > first)}) with"


def _kind(value: Any) -> str:
    names = {dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
