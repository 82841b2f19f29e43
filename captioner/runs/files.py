"""Writing files that are there whole or not at all, and may be read by whom the others may."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal


@contextmanager
def open_whole(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO]:
    """Open a file under another name, and give it its own once it is written; text is UTF-8.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, and a file that was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open(mode, **({} if mode == "wb" else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """Undo a `replace_folder` that was killed between its two renames."""
    previous = final.with_name(f".{final.name}.previous")
    if previous.exists() and not final.exists():
        previous.rename(final)
