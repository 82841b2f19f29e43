"""Writing files that are there whole or not at all, and may be read by whom the others may."""

import os
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
