"""Write files and folders completely or not at all.

Each is written under a temporary name in the same folder, synced to disk, then renamed. If the process is killed or the
power fails, either the old content or the new content is there, and never a part of it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from safetensors import SafetensorError

from captioner.errors import SettingError, first_line

TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream")
"""Words in the RuntimeError that torch raises if a file cannot be written."""


def check_folder(path: Path) -> None:
    """Check before any work that files can be written into a folder. The folder need not exist yet.

    Raises:
        SettingError: files cannot be written into it.
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
    """Open a file under a temporary name, and rename it after the block ends; text is UTF-8.

    Raises:
        OSError: the disk is full or not writable; no temporary file remains, and an existing file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        encoding, newline = (None, None) if mode == "wb" else ("utf-8", "")
        with temporary.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # without this, a power failure may leave the name without the content
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # the error of a failed write has no file name
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_whole(final: Path, name: str = "the folder", remark: str = "") -> Iterator[Path]:
    """Yield a temporary folder to write into, and rename it after the block ends; it replaces an earlier folder.

    Args:
        final: final path of the folder; `recover_folder` repairs what a killed process left there.
        name: what the folder is, for the error.
        remark: further text at the end of the error.

    Raises:
        OSError: the disk is full or not writable; no temporary folder remains, and an existing folder is unchanged.
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
    """Yield a temporary folder to write into, and rename each of its files into a folder that may contain others.

    Each file is complete at any moment. If the process is killed between two renames, some files are new and some old.

    Args:
        folder: folder of the files.
        name: what the files are, for the error.

    Raises:
        OSError: the disk is full or not writable; existing files are unchanged.
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
    """Raise an error again unless it is about writing: torch raises RuntimeError for every kind of fault."""
    if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_WRITER):
        raise error


def cannot_write(what: str, error: Exception, remark: str = "") -> OSError:
    """Return an error that names in one line what could not be written, and why."""
    return OSError(f"cannot write {what} ({first_line(error)}); free some disk space and run again{remark}")


def part_of(final: Path) -> Path:
    """Return the temporary name of a folder."""
    return final.with_name(f".{final.name}.part")


def share_weights(folder: Path) -> None:
    """Give weights the permissions of the `config.json` beside them; safetensors lets only their owner read them."""
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)


def sync(path: Path) -> None:
    """Write a file from the system's buffers to the disk, so that a power failure cannot leave it empty."""
    with path.open("r+b") as file:  # Windows syncs no file that is open for reading alone
        os.fsync(file.fileno())


def replace_folder(new: Path, final: Path) -> None:
    """Rename a folder to its final name; an existing folder is removed only afterwards (see `recover_folder`)."""
    previous = final.with_name(f".{final.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if final.exists():
        final.rename(previous)
    new.rename(final)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Repair what a killed process left of a folder: an incomplete one, or one between the two renames."""
    previous = final.with_name(f".{final.name}.previous")
    if previous.exists() and not final.exists():
        previous.rename(final)
    shutil.rmtree(part_of(final), ignore_errors=True)
