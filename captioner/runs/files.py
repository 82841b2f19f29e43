"""Writing files and folders so that they are there whole or not at all.

Each is written under a temporary name beside its own, synced to disk, then renamed. A kill or a power cut at any moment
leaves what was there before, or what is new, and never half of it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from safetensors import SafetensorError

from captioner.errors import SettingError

TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream")
"""Words in the RuntimeError that torch raises where a file cannot be written."""


def check_folder(path: Path) -> None:
    """Find out before any work whether files can be written into a folder, which need not be there yet.

    Raises:
        SettingError: they cannot.
    """
    real = Path(os.path.realpath(path))
    there = next(place for place in (real, *real.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise SettingError(f"'{path}' must be a folder, but '{there}' is a file", "output")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise SettingError(f"cannot write into the folder '{path}': {error.strerror}", "output") from None


@contextmanager
def open_whole(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO]:
    """Open a file under a temporary name, and rename it once it is written; text is UTF-8.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, and a file that was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        encoding, newline = (None, None) if mode == "wb" else ("utf-8", "")
        with temporary.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a failed write does not say of which file
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_whole(final: Path, name: str = "the folder", remark: str = "") -> Iterator[Path]:
    """Give a temporary folder to fill, and rename it once it is full; it then replaces a folder of its final name.

    Args:
        final: the folder's own place; `recover_folder` undoes what a kill left there.
        name: what the folder is, for the error.
        remark: a further remark for the error, such as what is still there.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, and a folder that was there is as it was.
    """
    temporary = part_of(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                sync(path)
        replace_folder(temporary, final)
    except (OSError, SafetensorError, RuntimeError) as error:
        check_failed_write(error)
        raise cannot_write(f"{name} '{final}'", error, remark) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def files_whole(folder: Path, name: str = "the files") -> Iterator[Path]:
    """Give a temporary folder to fill, and rename each of its files into a folder that holds others too.

    Each file is whole at any moment; a kill between two renames leaves some of them new and some as they were.

    Args:
        folder: where the files go.
        name: what the files are, for the error.

    Raises:
        OSError: the disk is full or not writable; files that were there are as they were.
    """
    temporary = folder / ".files.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        for path in files:
            sync(path)
        for path in files:
            path.replace(folder / path.name)
    except (OSError, SafetensorError, RuntimeError) as error:
        check_failed_write(error)
        raise cannot_write(f"{name} '{folder}'", error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_failed_write(error: Exception) -> None:
    """Raise an error again that is not about writing: torch has one class of error for everything."""
    if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_WRITER):
        raise error


def cannot_write(what: str, error: Exception, remark: str = "") -> OSError:
    """Return the error that says in one line what could not be written, and why."""
    return OSError(f"cannot write {what} ({str(error).splitlines()[0]}); free some disk space and run again{remark}")


def part_of(final: Path) -> Path:
    """Return the temporary name of a folder."""
    return final.with_name(f".{final.name}.part")


def share_weights(folder: Path) -> None:
    """Give weights the permissions of the `config.json` beside them; safetensors writes them for their owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)


def sync(path: Path) -> None:
    """Have the disk hold a file: a power cut then cannot leave it empty under its final name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_folder(new: Path, final: Path) -> None:
    """Rename a folder to its final name; what stood there is removed only afterwards (see `recover_folder`)."""
    previous = final.with_name(f".{final.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if final.exists():
        final.rename(previous)
    new.rename(final)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Undo what a killed process left of a folder: one half written, or one between the two renames."""
    previous = final.with_name(f".{final.name}.previous")
    if previous.exists() and not final.exists():
        previous.rename(final)
    shutil.rmtree(part_of(final), ignore_errors=True)
