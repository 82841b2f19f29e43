"""Writing captions as they come, to a file or to standard output, and continuing a file that exists."""

import csv
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from captioner.data.caption_formats import Format, Row, find_format
from captioner.data.caption_parquet import (
    is_parquet,
    lines_file,
    read_metadata,
    read_parquet,
    unpack_parquet,
    write_parquet,
)
from captioner.data.provenance import check_settings, compare_settings, settings_file, write_settings
from captioner.errors import SettingError
from captioner.images.names import escape_name, fit_encoding


def written_file(path: Path) -> Path:
    """Return the file that captions of an output are written to line by line: its own, or that beside a Parquet file.

    Where the output is a link, this is beside what it leads to.
    """
    real = Path(os.path.realpath(path))
    return lines_file(real) if is_parquet(path) else real


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
    if (path.exists() or written_file(path).exists()) and not (resume or overwrite):
        fact = (
            f"{name} exists" if path.exists() else f"{name} is begun: '{escape_name(str(written_file(path)))}' exists"
        )
        raise SettingError(fact, "resume", "overwrite")
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
    if is_parquet(path) and not written_file(path).exists():
        if not path.exists():
            return set(), set()
        rows = [(row["path"], row["error"] is None) for row in read_parquet(path)]
        done = {name for name, has_caption in rows if has_caption}
        return done, {name for name, _ in rows} - done
    path = written_file(path) if is_parquet(path) else path
    if not path.exists():
        return set(), set()
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


def check_maker(path: Path, made_by: Mapping[str, Any]) -> bool:
    """Refuse to continue an output that another model, grid or search has made.

    Returns:
        Whether the output says what has made it; outputs of the first release do not.

    Raises:
        SettingError: naming the first difference.
    """
    if is_parquet(path) and not written_file(path).exists():
        compare_settings(path, read_metadata(path), made_by)
        return True
    return check_settings(path, written_file(path), made_by)


class Writer:
    """Writes rows of captions, each as soon as it is there.

    Args:
        file: an open text file.
        form: its format.
        name: what a message calls the file; empty for standard output.
        captions: captions of each image.
    """

    def __init__(self, file: TextIO, form: Format, name: str = "", captions: int = 1):
        self.file, self.form, self.name, self.captions = file, form, name, captions

    def write(self, row: Row) -> None:
        """Write a row.

        Raises:
            BrokenPipeError: whoever read standard output has gone.
            SettingError: it cannot be written, the disk being full, say; what was written stays.
        """
        line = self.form.write(row, self.captions)
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


def read_first_line(path: Path) -> str:
    """Return the first line of a file, without its end."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.readline().rstrip("\r\n")


@contextmanager
def open_output(path: Path | None, made_by: Mapping[str, Any], append: bool = False) -> Iterator[Writer]:
    """Open an output file, or standard output where there is no path; text is UTF-8, whatever the locale.

    Args:
        path: the output.
        made_by: what makes the captions, as `Captioner.describe` returns it. It is written beside a file.
        append: whether to write behind what is in the file, or to replace that.

    Raises:
        SettingError: it cannot be opened or written.
    """
    form, captions = find_format(path), made_by.get("captions", 1)
    if path is None:
        yield Writer(sys.stdout, form, captions=captions)
        return
    name, written = f"'{escape_name(str(path))}'", written_file(path)
    try:
        written.parent.mkdir(parents=True, exist_ok=True)
        if append and is_parquet(path) and not written.exists():
            write_settings(written, made_by)
            unpack_parquet(path, written)
        file = written.open("a" if append else "w", encoding="utf-8", newline="")
    except OSError as error:
        raise SettingError(f"cannot write {name}: {error.strerror}", "output") from None
    try:
        if not append:
            write_settings(written, made_by)
        elif form.header is not None and read_first_line(written) not in ("", form.header(captions)):
            raise SettingError(f"{name} has columns for another number of captions", "captions", "output")
        writer = Writer(file, form, name, captions)
        if form.header is not None and file.tell() == 0:
            writer.write_line(form.header(captions))
        yield writer
    finally:
        with suppress(OSError):  # of a full disk, which the writer has told
            file.close()
    if is_parquet(path):
        try:
            write_parquet(written, Path(os.path.realpath(path)), made_by)
        except OSError as error:
            reason = f"{error.strerror or error}; the captions are in '{escape_name(str(written))}'"
            raise SettingError(f"cannot write {name}: {reason}", "resume") from None
        for part in (written, settings_file(written)):
            part.unlink(missing_ok=True)
