"""Formats of caption files that are written line by line: how a row becomes a line, and how a file is read back."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.errors import SettingError
from captioner.images.names import escape_name, unescape_name, write_json

COLUMNS = ("path", "caption", "logprob", "error")

MORE_COLUMNS = ("caption", "logprob", "confidence")
"""Columns of a table for each of several captions, with its number: `caption_2`."""

LOW_CONFIDENCE = "below the least confidence"
"""Reason for an image whose best caption is withheld."""

Row = Mapping[str, Any]
"""A caption as `Caption.as_dict` returns it: the keys of `COLUMNS`, `captions` if there are several, and `tags` if they
are shown."""


@dataclass(frozen=True)
class Format:
    """A format of output files, with one line per image.

    Attributes:
        write: returns the line of a row, without its end, given the number of captions; None for a row that the format
            cannot express.
        read: yields the name of each image in the text of a file, and whether it has a caption.
        has_logprob: whether it shows log-probabilities.
        header: returns the first line of a file, given the number of captions of each image and whether tags are shown;
            None for no such line.
    """

    write: Callable[[Row, int], str | None]
    read: Callable[[str], Iterable[tuple[str, bool]]]
    has_logprob: bool = True
    header: Callable[[int, bool], str] | None = None


def write_csv(values: Iterable[Any]) -> str:
    """Write one row of a CSV file."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def write_csv_header(captions: int, tags: bool = False) -> str:
    """Write the names of the columns; those of tags and of several captions follow the usual ones."""
    more = [f"{column}_{number}" for number in range(2, captions + 1) for column in MORE_COLUMNS]
    return write_csv([*COLUMNS, *(["tags"] if tags else []), *(["confidence", *more] if captions > 1 else [])])


def write_csv_row(row: Row, captions: int) -> str:
    """Write a row of CSV; its name by the rule of `captioner.images.names`."""
    values = [escape_name(row["path"]), *(row[column] for column in COLUMNS[1:])]
    if "tags" in row:
        values.append(write_tags(row))
    if captions > 1:
        found = row.get("captions") or []
        values.append(found[0]["confidence"] if found else None)
        for number in range(1, captions):
            one = found[number] if number < len(found) else {}
            values += [one.get(column) for column in MORE_COLUMNS]
    return write_csv(values)


def write_tags(row: Row) -> str:
    """Write the tags of an image and their probabilities as text: `dog 0.93, frisbee 0.41`."""
    return ", ".join(f"{one['tag']} {one['probability']:.2f}" for one in row["tags"])


def read_csv_rows(text: str) -> Iterator[tuple[str, bool]]:
    """Read the names in a CSV file."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if reader.fieldnames is not None and tuple(reader.fieldnames[: len(COLUMNS)]) != COLUMNS:
        raise ValueError
    for row in reader:
        if None in row.values() or None in row:  # fewer or more fields than columns
            raise ValueError
        yield unescape_name(row["path"]), not row["error"]


def write_json_row(row: Row, captions: int) -> str:
    """Write a row of JSON Lines."""
    return write_json(row)


def read_json_rows(text: str) -> Iterator[tuple[str, bool]]:
    """Read the names in a JSON Lines file."""
    rows = (json.loads(line) for line in text.split("\n")[:-1])
    return ((row["path"], row["error"] is None) for row in rows)


def write_line(row: Row, captions: int) -> str | None:
    """Write `name<TAB>caption`, more captions and tags behind more tabs; an image without a caption has no line."""
    if row["error"] is not None:
        return None
    texts = [one["caption"] for one in row["captions"]] if captions > 1 else [row["caption"]]
    return "\t".join([escape_name(row["path"]), *texts, *([write_tags(row)] if "tags" in row else [])])


def read_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Read the names in lines of `name<TAB>caption`."""
    for line in text.split("\n")[:-1]:
        name, tab, _ = line.partition("\t")
        if not tab:
            raise ValueError
        yield unescape_name(name), True


LINES = Format(write_line, read_lines, has_logprob=False)

FORMATS = {
    ".jsonl": Format(write_json_row, read_json_rows),
    ".csv": Format(write_csv_row, read_csv_rows, header=write_csv_header),
    ".txt": LINES,
    ".parquet": Format(write_json_row, read_json_rows),
}
"""Formats by the ending of a file's name; standard output has that of `.txt`. A Parquet file is made at the end, of
JSON Lines."""


def find_format(path: Path | None) -> Format:
    """Return the format of an output file, or of standard output.

    Raises:
        SettingError: its ending is none of `FORMATS`.
    """
    if path is None:
        return LINES
    if path.is_dir():
        raise SettingError(f"'{escape_name(str(path))}' is a folder, and captions are written to a file", "output")
    if (ending := name_ending(path)) not in FORMATS:
        raise SettingError(f"'{escape_name(str(path))}' must end in {', '.join(FORMATS)}", "output")
    return FORMATS[ending]


def name_ending(path: Path) -> str:
    """Return the ending of a file's name in lower case, such as `.csv`; unlike `suffix`, also of a file `.csv`."""
    return "." + path.name.rpartition(".")[2].lower()
