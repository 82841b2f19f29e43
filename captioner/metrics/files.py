"""Read the files that are scored: results of a captioner, and reference captions. No image is needed.

Results are a JSON list of `{"image_id": ..., "caption": ...}` as in COCO (further keys are ignored), or the output of
the command `captioner caption`. References are the captions JSON of COCO or of Karpathy's splits.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from captioner.data.caption_formats import COLUMNS
from captioner.data.captions import Captions, ImageId, is_missing, plain_id, read_captions_of
from captioner.data.columns import IMAGE_NAMES, find_caption_column, find_column
from captioner.data.json_files import is_karpathy, read_coco, read_karpathy
from captioner.data.records import ReadReport, usable_records
from captioner.data.row_files import Rows, load_document
from captioner.data.splits import select_split
from captioner.errors import SettingError
from captioner.images.names import unescape_name
from captioner.metrics.scores import name_ids

ID_COLUMNS = ("image_id", "path", "file_name", "filename", "image")
"""Columns that may name the image of a result; the first one present is used, then the other usual names of images."""


@dataclass
class ReferenceSet:
    """Reference captions of one split."""

    captions: dict[ImageId, list[str]] = field(default_factory=dict)
    """The references of each image."""
    files: dict[ImageId, str] = field(default_factory=dict)
    """File name of each image, as the annotations give it; images without a file name are left out."""
    split: str = "all"
    """The split; taken from the file's name where the format does not store it."""
    warnings: list[str] = field(default_factory=list)
    """One line for each kind of entry that was left out."""

    def renamed(self, names: dict[ImageId, ImageId]) -> "ReferenceSet":
        """Return the same set under other image ids, in the same order.

        Args:
            names: the new id of each image that gets one.
        """
        captions = {names.get(image_id, image_id): group for image_id, group in self.captions.items()}
        files = {names.get(image_id, image_id): file for image_id, file in self.files.items()}
        return ReferenceSet(captions, files, self.split, self.warnings)


def read_references(
    path: Path, split: str | None = None, restval: bool = False, default_split: str = "test"
) -> ReferenceSet:
    """Read the reference captions of an annotation file.

    Args:
        path: captions JSON of COCO or of Karpathy's splits; names of image files may be missing.
        split: split of a Karpathy file. A COCO file holds one split, so none may be given for it.
        restval: whether Karpathy's `restval` images belong to `train`.
        default_split: split of a Karpathy file if `split` is None.

    Raises:
        ValueError: the file has another format, the split is unknown, an image occurs twice, a caption is not text, or
            no caption is left.
        OSError: the file cannot be read.
    """
    content = load_document(path)
    if isinstance(content, Rows):
        raise ValueError(
            f"'{path}' is a table, but annotations, which come last, are JSON of COCO or of Karpathy's splits"
        )
    if isinstance(content, list):
        raise ValueError(f"'{path}' is a list, as results are, but the last file must hold the annotations")
    found, report = ReferenceSet(), ReadReport()
    if is_karpathy(content):
        records = list(select_split(read_karpathy(content, path, restval), split or default_split, f"'{path}'"))
    elif split is not None:
        fact = f"'{path}' has no splits, so '{split}' cannot be selected; only files of Karpathy's splits have them"
        raise SettingError(fact, "split")
    else:
        records = list(read_coco(content, path, None, images_needed=False))
        if stray := [record.image_id for record in records if not record.listed]:
            records = [record for record in records if record.listed]
            found.warnings.append(f"captions of images that '{path.name}' does not list: left out {name_ids(stray)}")

    for record, _, texts in usable_records(records, report):
        found.captions[record.image_id] = texts
        if isinstance(record.image, str):
            found.files[record.image_id] = record.image
    if report.duplicate_ids:
        fact = f"{name_ids(report.duplicate_ids)} listed more than once, or with the id of another image"
        raise ValueError(f"'{path}': {fact}")
    if report.unreadable_captions:
        odd = name_ids(dict.fromkeys(report.unreadable_captions))
        raise ValueError(f"'{path}': {odd} with a caption that is no text, or a list that cannot be read")
    if report.empty_captions:
        found.warnings.append(f"empty references left out: {len(report.empty_captions)}")
    if report.images_without_captions:
        found.warnings.append(f"images without references left out: {name_ids(report.images_without_captions)}")
    if not found.captions:
        raise ValueError(f"'{path}' holds no captions")
    found.split = records[0].split
    return found


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the captions of a captioner. Whether they can be scored is checked by `score`.

    The file holds COCO results (a JSON list), one such object per line (JSON Lines), or rows of a table (CSV). Where
    there is no `image_id`, the name of the image's file is the id (`ID_COLUMNS`), as in the output of `captioner
    caption`. Rows with an error in place of a caption are left out.

    Returns:
        Rows with the keys `image_id` (int or str) and `caption`; a caption is empty where a table has `nan`.

    Raises:
        ValueError: a row lacks an image or a caption, or an image id is neither a number nor text.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() == ".txt":
        raise ValueError(f"'{path}' is a .txt file; results must be a .json, .jsonl or .csv file")
    content = load_document(path)
    table = content if isinstance(content, Rows) else None
    rows: Any = content if table is None else table.rows
    if (
        path.suffix.lower() == ".csv" and rows and tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    ):  # what `captioner caption` writes
        rows = [row | {"path": unescape_name(row["path"])} for row in rows]
    form = 'a list of {"image_id": ..., "caption": ...}'
    if not isinstance(rows, list):
        raise ValueError(f"'{path}' holds no results: it must be {form}, not {_kind(rows)}")
    if not rows:
        raise ValueError(f"'{path}' is empty: no captions to score")

    def refuse_if(bad: list[int], what: str) -> None:
        if bad:
            raise ValueError(f"'{path}': {_entries(bad, table)} {what}")

    try:
        keys = [find_keys(tuple(row)) if isinstance(row, dict) else (None, None) for row in rows]
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None
    if table is not None and None in keys[0]:
        raise ValueError(
            f"'{path}' needs a column that names the image, such as image_id or path, and a column caption; "
            f"it has only {', '.join(rows[0])}"[:400]
        )
    refuse_if([n for n, found in enumerate(keys) if None in found], f"no image_id or no caption; results are {form}")
    ids = [None if is_missing(row[key]) else plain_id(row[key]) for row, (key, _) in zip(rows, keys, strict=True)]
    bad = [n for n, image_id in enumerate(ids) if image_id is None]
    what = (
        f"an image_id that is neither a whole number nor text, such as {rows[bad[0]][keys[bad[0]][0]]!r}" if bad else ""
    )
    refuse_if(bad, what[:110])
    captions = [row[key] for row, (_, key) in zip(rows, keys, strict=True)]
    errors = [None if is_missing(row.get("error")) else row["error"] for row in rows]
    failed = [is_missing(c) and isinstance(error, str) for c, error in zip(captions, errors, strict=True)]
    if all(failed):
        raise ValueError(f"'{path}' holds no captions, only errors, such as: {str(errors[0])[:200]}")
    texts = [read_captions_of(c) if isinstance(c, str) else Captions([c]) for c in captions]
    bad = [n for n, found in enumerate(texts) if found.unreadable]
    refuse_if(bad, f"a caption that looks like a list and cannot be read: {captions[bad[0]][:60]}" if bad else "")
    bad = [n for n, found in enumerate(texts) if len(found.texts) > 1]
    refuse_if(bad, f"several captions, of which one can be scored: {captions[bad[0]][:60]}" if bad else "")
    return [
        {"image_id": image_id, "caption": found.texts[0] if found.texts else ""}
        for image_id, found, left_out in zip(ids, texts, failed, strict=True)
        if not left_out
    ]


@lru_cache(maxsize=1024)
def find_keys(names: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Find the keys of a result that hold the id or name of its image, and its caption."""
    image = next((name for name in ID_COLUMNS if name in names), None)
    caption = "caption" if "caption" in names else find_caption_column(names)
    if image is None:
        image = find_column(names, ID_COLUMNS[0], (*ID_COLUMNS, *IMAGE_NAMES))
    return image, caption


def _entries(places: list[int], table: Rows | None, first: int = 3) -> str:
    """Return the number of entries and where the first of them are in the file, for a message."""
    if table is None:
        shown = "number " + ", ".join(str(place + 1) for place in places[:first])
    else:
        shown = "line " + ", ".join(table.place(place).removeprefix("line ") for place in places[:first])
    more = ", ..." if len(places) > first else ""
    return f"{len(places):,} {'entry' if len(places) == 1 else 'entries'} ({shown}{more}) with"


def _kind(value: Any) -> str:
    names = {dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
