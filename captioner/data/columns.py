"""The columns of a table of captions: which of its names mean image, captions, image id and split."""

from collections.abc import Iterable
from typing import NamedTuple

from captioner.errors import SettingError


class Columns(NamedTuple):
    """Names of the columns of a table."""

    image: str = "image"
    captions: str = "captions"
    image_id: str = "image_id"


IMAGE_NAMES = ("image", "file_name", "filename", "image_name", "image_path", "path", "filepath", "file_path")
"""Usual names of the column of images."""

CAPTION_NAMES = ("captions", "caption", "text", "sentence", "sentences", "raw", "comment")
"""Usual names of the column of captions. Where none of the first two is there, only one of the others may be."""


def plain_name(name: str) -> str:
    """Return a column's name in the form in which names are compared: `File Name` is `file_name`."""
    return "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())


def find_column(names: Iterable[str], asked: str, usual: tuple[str, ...] = ()) -> str | None:
    """Find a column by its name, whatever its case, else by another usual name if the name asked for is the default.

    Raises:
        ValueError: several columns may be meant.
    """
    names = list(names)
    if asked in names:
        return asked
    plain: dict[str, list[str]] = {}
    for name in names:
        if isinstance(name, str):
            plain.setdefault(plain_name(name), []).append(name)
    for name in usual if usual[:1] == (asked,) else (asked,):
        if found := plain.get(plain_name(name)):
            if len(found) > 1:
                raise ValueError(f"'{found[0]}' and '{found[1]}' may both be the column '{asked}'")
            return found[0]
    return None


def find_caption_column(names: Iterable[str], asked: str = CAPTION_NAMES[0]) -> str | None:
    """Find the column of captions, as `find_column` does.

    Raises:
        ValueError: several columns may be meant.
    """
    names = list(names)
    found = find_column(names, asked, CAPTION_NAMES)
    others = [name for name in names if isinstance(name, str) and plain_name(name) in CAPTION_NAMES[2:]]
    if found in others and plain_name(found) != plain_name(asked) and len(others) > 1:
        raise ValueError(f"'{others[0]}' and '{others[1]}' may both be the column of captions")
    return found


def find_columns(names: Iterable[str], asked: Columns, table: str) -> tuple[str, str, str | None]:
    """Find the columns of image, captions and, if there is one, image id.

    Args:
        names: the names of the table's columns.
        asked: the names of the columns in the settings.
        table: what errors call the table.

    Raises:
        SettingError: there is no column of images or of captions, or not the column of ids that is asked for, or
            several columns may be meant.
    """
    names = list(names)
    settings = ("image_column", "caption_column")
    try:
        image = find_column(names, asked.image, IMAGE_NAMES)
        captions = find_caption_column(names, asked.captions)
        image_id = find_column(names, asked.image_id)
    except ValueError as error:
        raise SettingError(f"{table}: {error}", *settings) from None
    if image is None or captions is None:
        name = asked.image if image is None else asked.captions
        raise SettingError(f"{table} has no column '{name}', only {', '.join(map(str, names))[:200]}", *settings)
    if image_id is None and asked.image_id != Columns().image_id:
        fact = f"{table} has no column '{asked.image_id}', only {', '.join(map(str, names))[:200]}"
        raise SettingError(fact, "id_column")
    return image, captions, image_id
