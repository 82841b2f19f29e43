"""Read images inside zip and tar archives (also shards of WebDataset) in place: nothing is unpacked to disk.

An image is named by the archive and its place in it, `photos.zip/2024/a.jpg`. Such a name is only shown, never opened.
"""

import lzma
import os
import tarfile
import threading
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from captioner.data.image_files import HIDDEN, READABLE, classify_file, describe_left_out, is_left_by_system
from captioner.data.path_filter import EXCLUDED, PathFilter
from captioner.images.names import escape_name
from captioner.images.opening import MAX_BYTES, UNREAD

ZIP, TAR = ".zip", ".tar"

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""Archives that are compressed as a whole, in which an image can only be reached through all those before it."""

BLOCK = 512
"""Bytes of a block of a tar; an empty block ends it."""

OPEN = 8
"""Zip archives that are open at the same time."""

BROKEN = (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""Errors that broken archives raise."""


def is_archive(path: str) -> bool:
    """Return whether a file is an archive, by its ending."""
    return path.lower().endswith((ZIP, TAR, *COMPRESSED))


class ZipFiles:
    """Open zip archives; the least recently used one is closed to make room for another."""

    def __init__(self) -> None:
        self.files: OrderedDict[str, zipfile.ZipFile] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, path: str, info: zipfile.ZipInfo, size: int) -> bytes:
        """Read up to `size` bytes of a file in an archive."""
        with self.lock:
            archive = self.files.pop(path, None) or zipfile.ZipFile(path)
            self.files[path] = archive
            if len(self.files) > OPEN:
                self.files.popitem(last=False)  # closed when the last thread that reads from it is done
        with archive.open(info) as file:
            return file.read(size)


zip_files = ZipFiles()


@dataclass(frozen=True, slots=True)
class Member:
    """An image in an archive, as an open file that `open_image` reads; several threads may read several.

    Attributes:
        archive: path of the archive.
        name: name of the image: the archive's path, and its own path in the archive.
        place: where it is: an entry of a zip, or the offset and size in a tar, in bytes.
    """

    archive: str
    name: str
    place: zipfile.ZipInfo | tuple[int, int]

    def seekable(self) -> bool:
        """Return False: each `read` starts at the first byte."""
        return False

    def read(self, size: int = MAX_BYTES + 1) -> bytes:
        """Read up to `size` bytes from the start.

        Raises:
            OSError: the archive is broken here, or encrypted.
        """
        try:
            if isinstance(self.place, zipfile.ZipInfo):
                return zip_files.read(self.archive, self.place, size)
            start, length = self.place
            with open(self.archive, "rb") as file:
                file.seek(start)
                data = file.read(min(size, length))
            if len(data) < min(size, length):
                raise OSError("the archive is cut off")
            return data
        except (*BROKEN, RuntimeError, NotImplementedError) as error:  # encrypted, or compressed in another way
            raise OSError(str(error) or type(error).__name__) from None


@dataclass
class ArchiveImages:
    """The result of a search in an archive."""

    members: list[Member] = field(default_factory=list)
    """Images, in the order of the archive."""
    others: Counter[str] = field(default_factory=Counter)
    """Numbers of files that are not images, by kind."""
    unread: Counter[str] = field(default_factory=Counter)
    """Numbers of images in formats that are not read, by format."""
    problem: str = ""
    """Why not all of the archive could be read."""

    def left_out(self) -> str:
        """Return what was left out, by kind."""
        return describe_left_out(self.unread, self.others)


def search_archive(path: str, path_filter: PathFilter | None = None) -> ArchiveImages:
    """Find the images in an archive by their endings.

    Links, devices and files that a tar stores in pieces are left out and counted. An archive that is cut off gives the
    images before that place.

    Args:
        path: the archive.
        path_filter: chooses among the images by their path in the archive; the others are counted.
    """
    found, name = ArchiveImages(), f"'{escape_name(path)}'"
    if path.lower().endswith(COMPRESSED):
        found.problem = f"{name} is compressed as a whole, so that its images cannot be read in place: unpack it"
        return found
    seen: Counter[str] = Counter()
    try:
        for inner, place in list_zip(path) if path.lower().endswith(ZIP) else list_tar(path):
            parts = PurePosixPath(inner.replace("\\", "/")).parts
            if is_left_by_system(parts):
                continue
            kind = HIDDEN if any(part.startswith(".") and part != ".." for part in parts) else classify_file(parts[-1])
            if place is None:
                found.others["linked, or not stored in one piece"] += 1
            elif kind in READABLE and path_filter is not None and not path_filter("/".join(parts)):
                found.others[EXCLUDED] += 1
            elif kind == "image":
                seen[inner] += 1
                again = f"#{seen[inner]}" if seen[inner] > 1 else ""  # archives may hold one name several times
                found.members.append(Member(path, f"{path}/{inner}{again}", place))
            elif kind in UNREAD.values():
                found.unread[kind] += 1
            else:
                found.others[kind] += 1
    except BROKEN as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        found.problem = f"{name} cannot be read to its end: {' '.join(reason.split())}"
    return found


def list_zip(path: str) -> Iterator[tuple[str, zipfile.ZipInfo | None]]:
    """Yield the files in a zip."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                is_link = (info.external_attr >> 28) == 0o12
                yield info.filename, None if is_link else info


def list_tar(path: str) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield the files in a tar that is not compressed, and where they are in it."""
    end, size = 0, os.stat(path).st_size
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # otherwise every entry stays in memory until the end
            end = info.offset_data + (-(-info.size // BLOCK) * BLOCK if info.isreg() else 0)
            whole = info.isreg() and not info.issparse()
            if not info.isdir():
                yield info.name, (info.offset_data, info.size) if whole else None
    if end + BLOCK > size:  # tarfile raises no error for a file that is cut off
        raise tarfile.ReadError("it is cut off")
