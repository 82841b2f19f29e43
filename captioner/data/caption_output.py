"""Writing captions as they come, to a file or to standard output, and going on with a file that was begun.

A format is one entry of `FORMATS`: how a row is written, and how the rows of a file are read back.
"""

import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from captioner.errors import SettingError
from captioner.images.names import escape_name, fit_encoding, unescape_name, write_json

COLUMNS = ("path", "caption", "logprob", "error")

Row = Mapping[str, Any]
"""A caption as `Caption.as_dict` gives it, with the keys of `COLUMNS`."""


@dataclass(frozen=True)
class Format:
    """A format of output files, one line an image.

    Attributes:
        write: returns the line of a row, without its end; None for a row that the format cannot hold.
        read: yields the name of each image in the text of a file, and whether it has a caption.
        has_logprob: whether it shows log-probabilities.
        header: the first line of a file, if any.
    """

    write: Callable[[Row], str | None]
    read: Callable[[str], Iterable[tuple[str, bool]]]
    has_logprob: bool = True
    header: str | None = None


def write_csv(values: Iterable[Any]) -> str:
    """Write one row of a CSV file."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def write_csv_row(row: Row) -> str:
    """Write a row of CSV; its name by the rule of `captioner.images.names`."""
    return write_csv([escape_name(row["path"]), *(row[column] for column in COLUMNS[1:])])


def read_csv_rows(text: str) -> Iterator[tuple[str, bool]]:
    """Read the names in a CSV file."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if reader.fieldnames not in (None, list(COLUMNS)):
        raise ValueError
    return ((unescape_name(row["path"]), row["error"] == "") for row in reader)


def read_json_rows(text: str) -> Iterator[tuple[str, bool]]:
    """Read the names in a JSON Lines file."""
    rows = (json.loads(line) for line in text.split("\n")[:-1])
    return ((row["path"], row["error"] is None) for row in rows)


def write_line(row: Row) -> str | None:
    """Write `name<TAB>caption`; an image without a caption has no line."""
    return None if row["error"] is not None else f"{escape_name(row['path'])}\t{row['caption']}"


def read_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Read the names in lines of `name<TAB>caption`."""
    return ((unescape_name(line.split("\t")[-2]), True) for line in text.split("\n")[:-1])


FORMATS = {
    ".jsonl": Format(write_json, read_json_rows),
    ".csv": Format(write_csv_row, read_csv_rows, header=write_csv(COLUMNS)),
    ".txt": Format(write_line, read_lines, has_logprob=False),
}
"""Formats by the ending of a file's name; standard output has that of `.txt`."""


def find_format(path: Path | None) -> Format:
    """Return the format of an output file, or of standard output.

    Raises:
        SettingError: its ending is none of `FORMATS`.
    """
    if path is None:
        return FORMATS[".txt"]
    if path.is_dir():
        raise SettingError(f"'{escape_name(str(path))}' is a folder, and captions are written to a file", "output")
    ending = "." + path.name.rpartition(".")[2].lower()
    if ending not in FORMATS:
        raise SettingError(f"'{escape_name(str(path))}' must end in {', '.join(FORMATS)}", "output")
    return FORMATS[ending]


def check_output(path: Path | None, resume: bool = False, overwrite: bool = False) -> None:
    """Find out before any work whether an output can be written.

    Raises:
        SettingError: it cannot, or it exists and is neither to be gone on with nor to be replaced.
    """
    find_format(path)
    if path is None:
        if sys.stdout is None:
            raise SettingError("standard output is closed", "output")
        return
    name = f"'{escape_name(str(path))}'"
    if path.exists() and not (resume or overwrite):
        raise SettingError(f"{name} exists", "resume", "overwrite")
    real = Path(os.path.realpath(path))  # where a link leads, even to a file that is not there
    folder = next(parent for parent in real.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise SettingError(f"cannot write {name}: '{escape_name(str(folder))}' is a file and no folder", "output")
    try:
        if real.exists():
            real.open("a").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SettingError(f"cannot write {name}: {error.strerror}", "output") from None


def read_output(path: Path) -> tuple[set[str], set[str]]:
    """Read the names of the images in an output file: those that have captions, and those that failed.

    A last line without an end, which a killed run may leave, is taken off the file.

    Raises:
        SettingError: something else is in the file, or it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingError(f"cannot read '{escape_name(str(path))}': {error.strerror}", "output") from None
    form, whole = find_format(path), content.rfind(b"\n") + 1
    try:
        if content and not whole and not content.startswith(b'{"path": '):
            raise ValueError
        rows = list(form.read(content[:whole].decode(errors="surrogateescape")))
    except (ValueError, KeyError, TypeError, IndexError, csv.Error):
        raise SettingError(f"'{escape_name(str(path))}' is not what captioner caption writes", "output") from None
    if whole < len(content):
        os.truncate(path, whole)
    done = {name for name, has_caption in rows if has_caption}
    return done, {name for name, _ in rows} - done


class Writer:
    """Writes rows of captions, each as soon as it is there.

    Args:
        file: an open text file.
        form: its format.
        name: what a message calls the file; empty for standard output.
    """

    def __init__(self, file: TextIO, form: Format, name: str = ""):
        self.file, self.form, self.name = file, form, name

    def write(self, row: Row) -> None:
        """Write a row.

        Raises:
            BrokenPipeError: whoever read standard output has gone.
            SettingError: it cannot be written, the disk being full, say; what was written stays.
        """
        line = self.form.write(row)
        if line is not None:
            self.write_line(line)

    def write_line(self, line: str) -> None:
        """Write a line and flush it; what the encoding lacks is escaped."""
        try:
            self.file.write(fit_encoding(line, self.file.encoding or "utf-8") + "\n")
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.name:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # Python would try again when it ends
                raise SettingError(f"cannot write to standard output: {error.strerror}", "output") from None
            raise SettingError(f"cannot write {self.name}: {error.strerror}; what is in it stays", "resume") from None


@contextmanager
def open_output(path: Path | None, append: bool = False) -> Iterator[Writer]:
    """Open an output file, or standard output where there is no path; text is UTF-8, whatever the locale.

    Args:
        append: whether to write behind what is in the file, or to replace that.

    Raises:
        SettingError: it cannot be opened or written.
    """
    form = find_format(path)
    if path is None:
        yield Writer(sys.stdout, form)
        return
    name = f"'{escape_name(str(path))}'"
    try:
        real = Path(os.path.realpath(path))
        real.parent.mkdir(parents=True, exist_ok=True)
        file = real.open("a" if append else "w", encoding="utf-8", newline="")
    except OSError as error:
        raise SettingError(f"cannot write {name}: {error.strerror}", "output") from None
    try:
        writer = Writer(file, form, name)
        if form.header is not None and file.tell() == 0:
            writer.write_line(form.header)
        yield writer
    finally:
        with suppress(OSError):  # of a full disk, which the writer has told
            file.close()
