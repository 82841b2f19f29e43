"""Turn rows into records: a row has an image with one or more captions, and rows of the same image are joined."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from captioner.data.captions import is_missing, plain_id
from captioner.data.columns import Columns, find_column, find_columns
from captioner.data.image_finder import portable_name
from captioner.data.records import NO_SPLIT, Record
from captioner.data.row_files import Rows


def row_records(rows: Rows, columns: Columns, name: str) -> Iterator[Record]:
    """Yield the records of the rows of a file, in which images are names.

    Args:
        rows: the rows.
        columns: names of the columns of image, captions and image id; the last may be missing.
        name: name of the file in errors.

    Raises:
        SettingError: a column is missing.
        ValueError: an image id is neither a whole number nor text.
    """
    if not rows.names():
        return iter(())
    found = find_columns(rows.names(), columns, name)
    split = find_column(rows.names(), "split")
    splits = None if split is None else (row.get(split) for row in rows.rows)
    return join_rows(rows.rows, found, splits, name, rows.place)


def name_of(image: Any) -> Any:
    """Return the name of an image, which may be in an object of `datasets`; None if there is no name."""
    if isinstance(image, Mapping):
        image = image.get("path")
    return None if is_missing(image) else image


def join_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: tuple[str, str, str | None],
    splits: Iterable[Any] | None,
    name: str,
    place: Callable[[int], str],
) -> Iterator[Record]:
    """Join the rows with the same image and, if there are ids, the same id; yields a record for each image.

    Args:
        rows: the rows.
        columns: the columns of image, captions and image id. An image is a name, or its row in a set of images.
        splits: the split of each row; a missing value is no split.
        name: name of the table in errors.
        place: returns the place of a row in the table, by the row's number.

    Raises:
        ValueError: an image id is neither a whole number nor text.
    """
    image_column, caption_column, id_column = columns
    joined: dict[Any, Record] = {}
    splits = iter(splits) if splits is not None else None
    for number, row in enumerate(rows):
        image, captions = name_of(row.get(image_column)), row.get(caption_column)
        given = None if id_column is None else row.get(id_column)
        image_id = None if is_missing(given) else plain_id(given)
        if image_id is None and not is_missing(given):
            fact = f"{name}, {place(number)}: the image id {given!r} is neither a whole number nor text"
            raise ValueError(fact[:300])
        split = NO_SPLIT if splits is None or is_missing(value := next(splits)) else str(value).strip()
        same_id = None if image_id is None else str(image_id)
        key: Any = same_id, portable_name(image) if isinstance(image, str) else str(image)
        if image is None:
            key = number  # no other row is joined to it
        if image_id is None:
            image_id = image if isinstance(image, str) else number
            if image is None or (id_column is not None and image_id == number):
                image_id = place(number)  # among ids of other rows, a number could be mistaken for one
        record = joined.get(key)
        if record is None:
            joined[key] = record = Record(image_id, image, [], split)
        elif record.split == NO_SPLIT:
            record.split = split
        elif split not in (record.split, NO_SPLIT):
            record.several_splits = True
        record.captions.extend(captions if isinstance(captions, list) else [captions])
    yield from joined.values()
