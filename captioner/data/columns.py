"""The columns of a table of captions: which names stand for image, captions, image id and split."""

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
"""Usual names of the column of captions. Without one of the first two, only one of the others may be present."""


def plain_name(name: str) -> str:
    """Return a column's name in the form for comparisons: `File Name` is `file_name`."""
    return "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())


def find_column(names: Iterable[str], expected: str, usual: tuple[str, ...] = ()) -> str | None:
    """Find a column by its name in any case; if that name is the default, also by its other usual names.

    Args:
        names: names of the table's columns.
        expected: the name in the settings.
        usual: the usual names; the first is the default.

    Raises:
        ValueError: several columns fit.
    """
    names = list(names)
    if expected in names:
        return expected
    plain: dict[str, list[str]] = {}
    for name in names:
        if isinstance(name, str):
            plain.setdefault(plain_name(name), []).append(name)
    for name in usual if usual[:1] == (expected,) else (expected,):
        if found := plain.get(plain_name(name)):
            if len(found) > 1:
                raise ValueError(f"'{found[0]}' and '{found[1]}' both fit the column '{expected}'")
            return found[0]
    return None


def find_caption_column(names: Iterable[str], expected: str = CAPTION_NAMES[0]) -> str | None:
    """Find the column of captions, as `find_column` does.

    Raises:
        ValueError: several columns fit.
    """
    names = list(names)
    found = find_column(names, expected, CAPTION_NAMES)
    others = [name for name in names if isinstance(name, str) and plain_name(name) in CAPTION_NAMES[2:]]
    if found in others and plain_name(found) != plain_name(expected) and len(others) > 1:
        raise ValueError(f"'{others[0]}' and '{others[1]}' both fit the column of captions")
    return found


def find_columns(names: Iterable[str], expected: Columns, table: str) -> tuple[str, str, str | None]:
    """Find the columns of image, captions and, if there is one, image id.

    Args:
        names: the names of the table's columns.
        expected: the names of the columns in the settings.
        table: name of the table in errors.

    Raises:
        SettingError: there is no column of images or of captions, the requested column of ids is missing, or several
            columns fit.
    """
    names = list(names)
    settings = ("image_column", "caption_column")
    try:
        image = find_column(names, expected.image, IMAGE_NAMES)
        captions = find_caption_column(names, expected.captions)
        image_id = find_column(names, expected.image_id)
    except ValueError as error:
        raise SettingError(f"{table}: {error}", *settings) from None
    if image is None or captions is None:
        name = expected.image if image is None else expected.captions
        raise SettingError(f"{table} has no column '{name}', only {', '.join(map(str, names))[:200]}", *settings)
    if image_id is None and expected.image_id != Columns().image_id:
        fact = f"{table} has no column '{expected.image_id}', only {', '.join(map(str, names))[:200]}"
        raise SettingError(fact, "id_column")
    return image, captions, image_id
