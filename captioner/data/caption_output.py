"""Write each caption at once to a file or to standard output, and continue a file that exists."""

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
    """Return the file into which captions are written line by line: the output itself, or a file beside a Parquet file.

    If the output is a link, this is the file that it points to, or a file beside that.
    """
    real = Path(os.path.realpath(path))
    return lines_file(real) if is_parquet(path) else real


def check_output(path: Path | None, resume: bool = False, overwrite: bool = False) -> None:
    """Check before any work that an output can be written.

    Raises:
        SettingError: it cannot, or it exists and neither `resume` nor `overwrite` is set.
    """
    find_format(path)
    if path is None:
        if sys.stdout is None:
            raise SettingError("standard output is closed", "output")
        return
    name = f"'{escape_name(str(path))}'"
    if (path.exists() or written_file(path).exists()) and not (resume or overwrite):
        part = f"{name} was started: '{escape_name(str(written_file(path)))}'"
        raise SettingError(f"{name if path.exists() else part} exists", "resume", "overwrite")
    real = Path(os.path.realpath(path))  # the target of a link, which may not exist
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

    If a killed run left an incomplete last line, it is cut off the file.

    Raises:
        SettingError: the file has other content, or it cannot be read.
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
    """Refuse to continue an output that was made with another model, grid or search.

    Returns:
        Whether the output records what made it; outputs of the first release do not.

    Raises:
        SettingError: naming the first difference.
    """
    if is_parquet(path) and not written_file(path).exists():
        compare_settings(path, read_metadata(path), made_by)
        return True
    return check_settings(path, written_file(path), made_by)


class Writer:
    """Writer of rows of captions, each at once.

    Args:
        file: an open text file.
        form: its format.
        name: name of the file in messages; empty for standard output.
        captions: captions of each image.
    """

    def __init__(self, file: TextIO, form: Format, name: str = "", captions: int = 1):
        self.file, self.form, self.name, self.captions = file, form, name, captions

    def write(self, row: Row) -> None:
        """Write a row.

        Raises:
            BrokenPipeError: the program that reads standard output has ended.
            SettingError: it cannot be written, for example because the disk is full; what was written stays.
        """
        line = self.form.write(row, self.captions)
        if line is not None:
            self.write_line(line)

    def write_line(self, line: str) -> None:
        """Write a line and flush it; characters that the encoding lacks are escaped."""
        try:
            self.file.write(fit_encoding(line, self.file.encoding or "utf-8") + "\n")
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.name:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # Python would write again at its end
                raise SettingError(f"cannot write to standard output: {error.strerror}", "output") from None
            raise SettingError(f"cannot write {self.name}: {error.strerror}; what is in it stays", "resume") from None


def read_first_line(path: Path) -> str:
    """Return the first line of a file, without its end."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.readline().rstrip("\r\n")


@contextmanager
def open_output(path: Path | None, made_by: Mapping[str, Any], append: bool = False) -> Iterator[Writer]:
    """Open an output file, or standard output if the path is None; text in files is UTF-8 in every locale.

    Args:
        path: the output.
        made_by: the settings that make the captions, from `Captioner.describe`. They are written beside a file.
        append: whether to append to the file, or to replace it.

    Raises:
        SettingError: it cannot be opened or written.
    """
    form, captions, tags = find_format(path), made_by.get("captions", 1), bool(made_by.get("show_tags"))
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
        elif form.header is not None and read_first_line(written) not in ("", form.header(captions, tags)):
            raise SettingError(f"{name} has other columns than these captions", "captions", "show_tags", "output")
        writer = Writer(file, form, name, captions)
        if form.header is not None and file.tell() == 0:
            writer.write_line(form.header(captions, tags))
        yield writer
    finally:
        with suppress(OSError):  # a full disk, for which the writer raised an error
            file.close()
    if is_parquet(path):
        try:
            write_parquet(written, Path(os.path.realpath(path)), made_by)
        except OSError as error:
            reason = f"{error.strerror or error}; the captions are in '{escape_name(str(written))}'"
            raise SettingError(f"cannot write {name}: {reason}", "resume") from None
        for part in (written, settings_file(written)):
            part.unlink(missing_ok=True)
