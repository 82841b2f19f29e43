"""Write captions into the metadata of images: XMP's description, and IPTC's caption if the format has IPTC.

An image is changed in memory and checked, then written whole beside the original, which it replaces. The pixels are
copied, not encoded again.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from captioner.data.caption_beside import FULL
from captioner.data.caption_formats import Row
from captioner.data.image_inputs import Source
from captioner.errors import SettingError
from captioner.images import ImageError, open_image
from captioner.images.names import escape_name
from captioner.runs.files import open_whole

XMP, IPTC = "Xmp.dc.description", "Iptc.Application2.Caption"

CHARACTERS = {"Iptc.Envelope.CharacterSet": "\x1b%G"}
"""The entry of IPTC that declares its text to be UTF-8."""

DEFAULT = 'lang="x-default"'

LONGEST = 2000
"""Bytes of an IPTC caption."""

UNWRITABLE = "metadata cannot be written"


def load_library() -> ModuleType:
    """Return the library that reads and writes metadata.

    Raises:
        SettingError: it is not installed.
    """
    try:
        import pyexiv2
    except (ImportError, OSError):
        raise SettingError("writing metadata needs the package pyexiv2: pip install 'captioner[metadata]'") from None
    pyexiv2.set_log_level(4)  # its warnings would go to standard error
    return pyexiv2


class Metadata:
    """Writer of captions into the metadata of the images.

    Args:
        overwrite: whether existing descriptions are replaced.

    Raises:
        SettingError: the library is not installed.
    """

    def __init__(self, overwrite: bool):
        self.library, self.overwrite = load_library(), overwrite

    def plan(self, images: Sequence[tuple[str, Source]]) -> tuple[list[tuple[str, Source]], list[str], set[str]]:
        """Find out which images can hold a caption.

        Args:
            images: names and sources.

        Returns:
            The images that are files, each once; a line for every other image; and the names of the images that have a
            description, which stays.
        """
        chosen: dict[str, tuple[str, Source]] = {}
        problems: list[str] = []
        done: set[str] = set()
        for name, source in images:
            if not isinstance(source, str):
                problems.append(f"'{escape_name(name)}' is no file of its own, into which a caption could be written")
            elif (real := os.path.realpath(source)) not in chosen:
                chosen[real] = (name, source)
                if not self.overwrite and self.has_description(source):
                    done.add(name)
        return list(chosen.values()), problems, done

    @property
    def where(self) -> str:
        """The place of the captions, for a message about images."""
        return "the images themselves"

    def has_description(self, path: str) -> bool:
        """Return whether an image has a description; metadata that cannot be read counts as none."""
        try:
            with self.library.Image(path) as image:
                return bool(image.read_xmp().get(XMP) or image.read_iptc().get(IPTC))
        except (OSError, RuntimeError, UnicodeError, ValueError):
            return False

    def write(self, row: Row) -> None:
        """Write the best caption of an image into it.

        Raises:
            SettingError: the disk is full; the image is as it was.
            ImageError: its format takes no metadata, or it cannot be written; it is as it was.
        """
        if row["error"] is not None:
            return
        path, name = Path(os.path.realpath(row["path"])), f"'{escape_name(row['path'])}'"
        try:
            before = path.read_bytes()
            after = self.describe(before, row["caption"])
            if open_image(after).tobytes() != open_image(before).tobytes():
                raise ImageError(f"{name} would not have the same pixels with metadata", UNWRITABLE)
            with open_whole(path, "wb") as file:
                shutil.copymode(path, file.name)
                file.write(after)
        except OSError as error:
            fact = f"cannot write {name}: {error.strerror or error}"
            if error.errno in FULL:
                raise SettingError(f"{fact}; the image is as it was") from None
            raise ImageError(fact, UNWRITABLE) from None
        except (RuntimeError, UnicodeError) as error:
            reason = " ".join(str(error).split()) or os.strerror(errno.EINVAL)
            raise ImageError(f"no caption can be written into {name}: {reason}", UNWRITABLE) from None

    def describe(self, data: bytes, caption: str) -> bytes:
        """Return an encoded image with a caption.

        Raises:
            RuntimeError: its format takes no metadata.
        """
        with self.library.ImageData(data) as image:
            old = image.read_xmp().get(XMP)
            image.modify_xmp({XMP: {**(old if isinstance(old, dict) else {}), DEFAULT: caption}})
            short = caption.encode()[:LONGEST].decode(errors="ignore")
            image.modify_iptc({**CHARACTERS, IPTC: short})
            return image.get_bytes()
