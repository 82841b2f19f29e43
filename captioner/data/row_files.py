"""Read tables of captions: CSV in its dialects, and JSON Lines.

A malformed table is refused with the number of the line. Otherwise a caption that is cut at an unquoted comma would be
used in training and scoring without a warning.
"""

import csv
import io
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from captioner.data.columns import CAPTION_NAMES, IMAGE_NAMES, plain_name
from captioner.text_files import DECODER, RepeatedKeyError, parse_json_text, read_text

LINE_ENDINGS = frozenset((".jsonl", ".ndjson"))
"""File endings of JSON Lines."""

TABLE_ENDINGS = frozenset((".csv", ".tsv", ".txt"))
"""File endings of tables whose fields are separated by commas, semicolons, tabs or vertical bars."""

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}

KNOWN = frozenset((*IMAGE_NAMES, *CAPTION_NAMES, "image_id", "split"))


@dataclass
class Rows:
    """The rows of a table, by the names of its columns, and their lines in the file."""

    rows: list[dict[str, Any]]
    lines: list[int] | None = None
    """Number of the line at which each row starts; None for a JSON list."""
    header: list[str] | None = None
    """Names of the columns, if the file has a header line."""

    def place(self, number: int) -> str:
        """Return the place of row `number` (from 0) in the file, for messages."""
        return f"entry {number + 1}" if self.lines is None else f"line {self.lines[number]}"

    def names(self) -> list[str]:
        """Return the names of all columns; a row of JSON may lack some of them."""
        return self.header or list(dict.fromkeys(chain.from_iterable(self.rows)))


def load_document(path: Path) -> Any:
    """Read a file of captions or results: a table as `Rows`, any other JSON as the value that it contains.

    The file's ending decides on the format. For another ending, and for a file that ends in `.json` but is not JSON,
    the first line decides.

    Raises:
        ValueError: the file has none of these formats; the message names the line.
        OSError: the file cannot be read.
    """
    text, ending = read_text(path), path.suffix.lower()
    if ending in LINE_ENDINGS:
        return parse_lines(text, path)
    if ending in TABLE_ENDINGS:
        return parse_table(text, path)
    if text.lstrip()[:1] not in ("{", "[") and (ending != ".json" or is_header(text)):
        return parse_table(text, path)
    try:
        return parse_json_text(text, path)
    except ValueError:
        if not is_object(first_line(text)):
            raise
        return parse_lines(text, path)


def first_line(text: str) -> str:
    """Return the first line of a text that is not blank."""
    return next((line for line in io.StringIO(text, newline=None) if line.strip()), "").strip()


def is_object(line: str) -> bool:
    """Return whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def is_header(text: str) -> bool:
    """Return whether the first line of a text is the header of a table of captions or results."""
    line = first_line(text)
    return any(known_names(line.split(separator)) > 1 for separator in SEPARATORS)


def known_names(names: list[str]) -> int:
    """Count the names that are usual for columns of captions or results."""
    return sum(plain_name(name.strip().strip('"')) in KNOWN for name in names)


def parse_lines(text: str, path: Path) -> Rows:
    """Parse JSON Lines: one object per line; blank lines are left out.

    Raises:
        ValueError: a line is not JSON, or not an object.
    """
    rows, lines = [], []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            row = DECODER.decode(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}', line {number}, is not JSON: {error.msg} (column {error.colno})") from None
        except RepeatedKeyError as error:
            raise ValueError(f"'{path}', line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'{path}', line {number}, is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"'{path}', line {number}, holds no object of column names and values: {line[:40]!r}")
        rows.append(row)
        lines.append(number)
    return Rows(rows, lines)


def parse_table(text: str, path: Path) -> Rows:
    """Parse a table with a header, whose fields are separated by commas or in another way; empty rows are left out.

    Raises:
        ValueError: a row has more or fewer fields than the header, a quote is not closed, the header has a name twice,
            or the separator is unclear.
    """
    if text.lstrip()[:1] in ("{", "["):
        raise ValueError(f"'{path}' is JSON and no table; give it a name that ends in .json or .jsonl")
    separator, text, skipped = find_separator(text, path)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    header: list[str] = []
    start = 1
    # A space may stand between the separator and a quote; but after a bar, Flickr30k has unquoted captions.
    file, spaced = io.StringIO(text, newline=""), separator != "|"
    reader = csv.reader(file, delimiter=separator, skipinitialspace=spaced, strict=True)
    try:
        for fields in reader:
            first, start = start, reader.line_num + 1
            if not fields or (not fields[0].strip() and not "".join(fields).strip()):
                continue
            if not header:
                header = [field.strip() for field in fields]
                if twice := next((name for name in header if name and header.count(name) > 1), None):
                    raise ValueError(f"'{path}': the header names the column '{twice}' more than once")
                continue
            if len(fields) != len(header):
                what = SEPARATORS.get(separator, separator) if len(fields) > len(header) else "line break"
                raise ValueError(
                    f"'{path}': line {first + skipped} has {count(len(fields), 'field')}, the header {len(header)}; "
                    f"a value that holds a {what} must stand in quotes"
                )
            if start > first + 1 and swallows(fields, separator):
                raise ValueError(
                    f"'{path}': line {first + skipped} has a quote that is closed only in line "
                    f"{start - 1 + skipped}, so that other rows are taken for its text"
                )
            rows.append(dict(zip(header, fields, strict=True)))
            lines.append(first + skipped)
    except csv.Error as error:
        raise ValueError(f"'{path}': line {start + skipped} {describe_csv_error(error)}") from None
    if not header:
        raise ValueError(f"'{path}' is empty")
    return Rows(rows, lines, header)


def find_separator(text: str, path: Path) -> tuple[str, str, int]:
    """Find the separator of a table's fields, by its header.

    Returns:
        The separator; the text without a line `sep=` of Excel; and the number of lines removed.

    Raises:
        ValueError: the separator is unclear.
    """
    line = text[: text.find("\n")] if "\n" in text else text
    if line.lower().startswith("sep=") and len(line.rstrip("\r")) == 5:  # as Excel writes and reads it
        return line[4], text[len(line) + 1 :], 1
    header = first_line(text)
    ways = {separator: header.split(separator) for separator in SEPARATORS if separator in header}
    if len(ways) > 1:
        hits = {separator: known_names(names) for separator, names in ways.items()}
        best = [separator for separator in ways if hits[separator] == max(hits.values())]
        if len(best) > 1:
            names = " and of ".join(SEPARATORS[separator] + "s" for separator in best)
            raise ValueError(f"'{path}': the header may be one of {names}: {header[:80]!r}")
        return best[0], text, 0
    return next(iter(ways), ","), text, 0


def swallows(fields: list[str], separator: str) -> bool:
    """Return whether a field of several lines seems to contain further rows, because a quote was not closed."""
    kind, name = PurePath(fields[0]).suffix, fields[0]
    for field in fields:
        for line in field.splitlines()[1:]:
            first = line.split(separator)[0].strip()
            if line.count(separator) >= len(fields) - 1 and (
                (kind and PurePath(first).suffix == kind) or (name.isdecimal() and first.isdecimal())
            ):
                return True
    return False


def describe_csv_error(error: csv.Error) -> str:
    """Return an error of Python's CSV reader in plain words."""
    if "unexpected end" in str(error):
        return "opens a quote that is never closed"
    if "expected after" in str(error):
        return "continues after a closing quote; a quote within quotes must be written twice"
    return f"cannot be read: {error}"


def count(number: int, thing: str) -> str:
    """Return a number with its noun: `1 field`, `2 fields`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
