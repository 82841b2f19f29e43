"""Write caption files beside images, as tools that train on images read them: `a.txt` beside `a.jpg`."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from captioner.data.caption_formats import Row
from captioner.data.image_inputs import Source
from captioner.errors import SettingError
from captioner.images import ImageError
from captioner.images.names import escape_name
from captioner.images.opening import SUFFIXES, UNREAD
from captioner.runs.files import open_whole

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk, after which no other file can be written either."""


class CaptionFiles:
    """Writer of one caption file for each image: the name of the image with another ending.

    Args:
        ending: ending of the caption files, such as `.txt`.
        prefix: text before every caption.
        suffix: text after every caption.
        resume: whether images that have a caption file are left out.
        overwrite: whether caption files that exist are replaced.

    Raises:
        SettingError: the ending is not valid, or is an ending of images.
    """

    def __init__(self, ending: str, prefix: str = "", suffix: str = "", resume: bool = False, overwrite: bool = False):
        self.resume, self.overwrite = resume, overwrite
        self.ending, self.prefix, self.suffix = f".{ending.removeprefix('.')}", prefix, suffix
        if len(self.ending) < 2 or any(mark in self.ending for mark in ("/", "\\", "\0")):
            raise SettingError(f"'{escape_name(ending)}' is not the ending of a file, such as txt", "beside")
        if self.ending.lower() in SUFFIXES | UNREAD.keys():
            raise SettingError(f"{self.ending} is an ending of images, which caption files would replace", "beside")

    @property
    def where(self) -> str:
        """The place of the captions, for a message about images."""
        return f"*{self.ending} files beside them"

    def place(self, name: str) -> Path:
        """Return the caption file of an image."""
        path = Path(name)
        return path.with_name(path.stem + self.ending)

    def plan(
        self,
        images: Sequence[tuple[str, Source]],
    ) -> tuple[list[tuple[str, Source]], list[str], set[str]]:
        """Find out which images can have a caption file.

        Args:
            images: names and sources.

        Returns:
            The images that can have a file, each once; a line for every other image, which is not a file or
            shares its caption file with another image; and the names of the images that are already captioned.

        Raises:
            SettingError: caption files exist, and neither `resume` nor `overwrite` is set.
        """
        owners: dict[str, str] = {}
        chosen: list[tuple[str, Source]] = []
        problems: list[str] = []
        exist: set[str] = set()
        for name, source in images:
            if not isinstance(source, str) or not Path(name).name:
                problems.append(f"'{escape_name(name)}' is no file of its own and has no caption file beside it")
                continue
            place = self.place(name)
            owner = owners.get(os.path.abspath(place))
            if owner is None:
                owners[os.path.abspath(place)] = name
                chosen.append((name, source))
                if os.path.lexists(place):
                    exist.add(name)
            elif os.path.abspath(owner) != os.path.abspath(name):
                problems.append(
                    f"'{escape_name(name)}' is left out: its caption file '{escape_name(str(place))}' is that of "
                    f"'{escape_name(owner)}'"
                )
        if exist and not (self.resume or self.overwrite):
            count = "1 caption file exists" if len(exist) == 1 else f"{len(exist)} caption files exist"
            raise SettingError(f"{count}, such as '{escape_name(str(self.place(min(exist))))}'", "resume", "overwrite")
        return chosen, problems, exist if self.resume else set()

    def write(self, row: Row) -> None:
        """Write the captions of an image, one per line, whole or not at all; an image without captions gets no file.

        Raises:
            SettingError: the disk is full; files that were written stay.
            ImageError: this one file cannot be written.
        """
        if row["error"] is not None:
            return
        texts = [one["caption"] for one in row.get("captions") or [row]]
        place = self.place(row["path"])
        try:
            with open_whole(place) as file:
                file.write("".join(f"{self.prefix}{text}{self.suffix}\n" for text in texts))
        except OSError as error:
            fact = f"cannot write '{escape_name(str(place))}': {error.strerror or error}"
            if error.errno in FULL:
                raise SettingError(f"{fact}; the files that were written stay", "resume") from None
            raise ImageError(fact, "caption file cannot be written") from None
