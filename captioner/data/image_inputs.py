"""Resolve the inputs of a command (files, folders, archives, patterns, standard input) to images, in this order."""

import codecs
import glob
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from captioner.data.archives import Member, is_archive, search_archive
from captioner.data.image_files import search_folder
from captioner.data.path_filter import EXCLUDED, PathFilter
from captioner.images.names import escape_name
from captioner.images.opening import MAX_BYTES, SUFFIXES, UNREAD, read_size, supported

STANDARD_INPUT = "-"

ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""Encoding of a list by its byte order mark."""

HEAD = 4096
"""First bytes of standard input that are checked to distinguish a list from an image."""


Source: TypeAlias = str | Member | BinaryIO


@dataclass
class FoundImages:
    """Images to caption, and messages about all other inputs."""

    images: list[tuple[str, Source]] = field(default_factory=list)
    """Name of each image, and its path, its place in an archive, or its content from standard input."""
    problems: list[str] = field(default_factory=list)
    """Errors: inputs that gave no image."""
    notes: list[str] = field(default_factory=list)
    """Notes: files in folders that were left out because they are not images."""

    def add_left_out(self, place: str, left_out: str, empty: bool, unread: bool) -> None:
        """Add a message about the files of a folder or an archive that are left out, or about an empty one.

        Args:
            place: its kind and name.
            left_out: the files, counted by kind; empty for none.
            empty: whether it has no image.
            unread: whether some of the files are images of a format that is not read.
        """
        if empty:
            self.problems.append(f"no images in {place}" + (f"; left out: {left_out}" if left_out else ""))
        elif left_out:
            (self.problems if unread else self.notes).append(f"left out in {place}: {left_out}")


def find_images(
    inputs: Sequence[str], standard_input: BinaryIO | None = None, path_filter: PathFilter | None = None
) -> FoundImages:
    """Resolve inputs to images, in the order given; images of a folder are sorted.

    Args:
        inputs: files, folders, archives, glob patterns, and `-` for standard input.
        standard_input: an image, or a list of paths: one a line, or each ended by a zero byte as `find -print0` does.
        path_filter: filter of the files in folders and archives and of those that patterns match. Files that are named
            always pass.
    """
    found = FoundImages()
    for item in inputs:
        name, path = escape_name(item), Path(item)
        if item == STANDARD_INPUT:
            add_standard_input(found, standard_input, path_filter)
        elif os.path.isdir(item):  # pathlib would raise an error for a path that cannot be reached
            add_folder(found, item, path_filter)
        elif glob.has_magic(item) and not os.path.lexists(item):
            add_pattern(found, item, path_filter)
        elif item.endswith(os.sep) and not os.path.lexists(item.rstrip(os.sep)):
            found.problems.append(f"there is no folder '{name}'")
        elif not os.path.lexists(item) and path.suffix.lower() not in SUFFIXES | UNREAD.keys():
            found.problems.append(f"there is no file and no folder '{name}'")
        else:
            add_file(found, item, path_filter)
    return found


def add_file(found: FoundImages, path: str, path_filter: PathFilter | None) -> None:
    """Add an image file, or the images in an archive."""
    if not is_archive(path) or not os.path.isfile(path):
        found.images.append((path, path))
        return
    archive, name = search_archive(path, path_filter), escape_name(path)
    found.images += [(member.name, member) for member in archive.members]
    if archive.problem:
        found.problems.append(archive.problem)
    empty = not archive.members and not archive.problem
    found.add_left_out(f"the archive '{name}'", archive.left_out(), empty, bool(archive.unread))


def add_folder(found: FoundImages, name: str, path_filter: PathFilter | None) -> None:
    """Add the images of a folder and the folders within it."""
    folder = search_folder(Path(name), path_filter)
    found.images += [(path, path) for path in sorted(map(str, folder.files))]
    found.problems += folder.unreadable
    empty = not folder.files and not folder.unreadable
    found.add_left_out(f"the folder '{escape_name(name)}'", folder.left_out(), empty, bool(folder.unread))


def add_pattern(found: FoundImages, pattern: str, path_filter: PathFilter | None) -> None:
    """Add the files that match a pattern. Matching folders are searched, unless the pattern has `**`."""
    matches, excluded = sorted(expand(pattern, found.problems)), 0
    if "**" in pattern.split(os.sep):
        matches = [match for match in matches if not os.path.isdir(match)]
    if not matches:
        found.problems.append(f"no file matches '{escape_name(pattern)}'")
    for match in matches:
        if os.path.isdir(match):
            add_folder(found, match, path_filter)
        elif path_filter is None or path_filter(Path(match).as_posix()):
            add_file(found, match, path_filter)
        else:
            excluded += 1
    if excluded:
        found.notes.append(f"left out of '{escape_name(pattern)}': {excluded} {EXCLUDED}")


def expand(pattern: str, problems: list[str]) -> set[str]:
    """Return the paths that match a pattern, in which `**` stands for a folder and all folders below it.

    `search_folder` finds the folders, each of them once. Python's `glob` would follow links in a circle.

    Args:
        pattern: a glob pattern.
        problems: list to which an error is added for each folder that cannot be read.
    """
    parts = pattern.split(os.sep)
    parts = [part for part, before in zip(parts, ["", *parts], strict=False) if not part == before == "**"]
    if "**" not in parts:
        return set(glob.glob(pattern))
    place = parts.index("**")
    start, rest = os.sep.join(parts[:place]), os.sep.join(parts[place + 1 :]) or "*"
    if place and not start:
        start = os.sep  # the pattern starts at the root
    found: set[str] = set()
    for root in expand(start, problems) if start else (os.curdir,):
        if os.path.isdir(root):
            search = search_folder(Path(root))
            problems += search.unreadable
            for folder in search.folders:
                within = "" if str(folder) == os.curdir else glob.escape(str(folder))
                found |= expand(os.path.join(within, rest), problems)
    return found


def add_standard_input(found: FoundImages, file: BinaryIO | None, path_filter: PathFilter | None) -> None:
    """Add the image, or the images of the list, on standard input."""
    data = b"" if file is None else file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        found.problems.append(f"standard input holds over {MAX_BYTES // 2**20} MiB, which is refused")
    elif not data:
        found.problems.append("standard input is empty")
    elif is_image(data):
        image = io.BytesIO(data)
        image.name = "standard input"  # its name in messages
        found.images.append((STANDARD_INPUT, image))
    elif names := read_list(data):
        for path in names:
            add_file(found, path, path_filter)
    else:
        found.problems.append("standard input contains no name of an image")


def is_image(data: bytes) -> bool:
    """Return whether standard input is an image, and not a list of paths.

    Data that a decoder recognises are an image. Data with zero bytes that are not a list are an image, too, in another
    format or broken; it is refused when it is opened.
    """
    formats = [name for name in supported() if name != "TGA"]  # TGA has no signature, so its decoder accepts text
    if read_size(data, formats) is not None:
        return True
    head = data[:HEAD]
    if b"\0" not in head or data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return False
    first = os.fsdecode(data.partition(b"\0")[0])
    printable = not any(byte < 32 and byte not in b"\0\t\n\r\x0b\x0c\x1b" for byte in head)
    return b"\0\0" in data or not first or not (printable or os.path.lexists(first))


def read_list(data: bytes) -> list[str]:
    """Read paths from a list: each ends with a zero byte if there are any, else with a line feed.

    If all lines also end with a carriage return, as on Windows, it is not part of the names.
    """
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if data.startswith(mark)), None)
    text = data.decode(encoding, errors="surrogateescape") if encoding else os.fsdecode(data)
    if "\0" in text:
        return [name for name in text.split("\0") if name]
    lines = [line for line in text.split("\n") if line]
    if all(line.endswith("\r") for line in lines):
        lines = [line[:-1] for line in lines]
    return [line for line in lines if line]
