"""Find the images in a folder; captioning and pretraining share this search."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captioner.data.path_filter import EXCLUDED, PathFilter
from captioner.images.names import escape_name
from captioner.images.opening import SUFFIXES, UNREAD, remedy

SIDECARS = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", ".localized", "icon\r", ".picasa.ini"))
"""Files that operating systems and image viewers create in folders, in lower case; also all that start with `._`."""

SIDECAR_FOLDERS = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "system volume information", ".appledouble", ".thumbnails", ".trashes")
    + (".fseventsd", ".spotlight-v100", ".temporaryitems")
)
"""Folders that they create; some hold thumbnails, which are copies of images."""


HIDDEN = "hidden"

READABLE = frozenset(("image", *UNREAD.values()))
"""Kinds of files to which patterns apply."""

KINDS = 8
"""Most kinds of files that one line names; the others are only counted."""


@dataclass
class FolderImages:
    """The result of a search in a folder."""

    root: Path
    files: list[Path] = field(default_factory=list)
    """Paths of images (found by their endings), sorted; each starts with the root."""
    folders: list[Path] = field(default_factory=list)
    """Folders that were searched, the root included."""
    others: Counter[str] = field(default_factory=Counter)
    """Numbers of other files by their ending, and of hidden files and folders."""
    unread: Counter[str] = field(default_factory=Counter)
    """Numbers of images in formats that are not read, by format."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that could not be read, each with its reason."""

    def left_out(self) -> str:
        """Return what was left out, by kind: `2 SVG (not read: convert it to JPEG or PNG), 1 .txt, 3 hidden`."""
        return describe_left_out(self.unread, self.others)


def describe_left_out(unread: Counter[str], others: Counter[str]) -> str:
    """Return what was left out, by kind.

    Args:
        unread: numbers of images in formats that are not read, by format.
        others: numbers of other files, by kind.
    """
    parts = [f"{count} {kind} (not read: {remedy(kind)})" for kind, count in sorted(unread.items())]
    common = others.most_common(KINDS)
    parts += [f"{count} {kind}" for kind, count in common]
    if rest := others.total() - sum(count for _, count in common):
        parts.append(f"{rest} others")
    return ", ".join(parts)


def search_folder(root: Path, path_filter: PathFilter | None = None) -> FolderImages:
    """Find the images in a folder and the folders within it, by their file endings.

    Hidden files and folders (`.git`, `.cache`) are left out and counted. Files of operating systems (`SIDECARS`) are
    left out and not counted. Links to folders are followed, but each folder is searched once, so that circular links
    end. A folder that can be reached without a link is named without it.

    Args:
        root: the folder.
        path_filter: filter of the images; images that do not pass are counted.
    """
    found = FolderImages(root)
    seen: set[tuple[int, int]] = set()
    folders = [root]
    links: list[Path] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            known = os.stat(folder)
            if (known.st_dev, known.st_ino) in seen:
                continue
            seen.add((known.st_dev, known.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append(f"the folder '{escape_name(str(folder))}' cannot be read: {error.strerror}")
            continue
        found.folders.append(folder)
        for entry in entries:
            path, kind = folder / entry.name, classify(entry)
            if kind == "folder":
                folders.append(path)
            elif kind == "link":
                links.append(path)
            elif kind in READABLE and path_filter is not None and not path_filter(path.relative_to(root).as_posix()):
                found.others[EXCLUDED] += 1
            elif kind == "image":
                found.files.append(path)
            elif kind in UNREAD.values():
                found.unread[kind] += 1
            elif kind:
                found.others[kind] += 1
    found.files.sort()
    found.unreadable.sort()
    return found


def classify(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry of a folder: `folder`, `link`, `image`, a format that is not read, or another kind.

    Returns:
        The kind; an empty string for files and folders of an operating system.
    """
    name = entry.name.lower()
    try:
        is_folder = entry.is_dir()
    except OSError:  # a link whose target cannot be reached
        is_folder = False
    if name in (SIDECAR_FOLDERS if is_folder else SIDECARS) or (name.startswith("._") and not is_folder):
        return ""
    if is_folder:
        return HIDDEN if name.startswith(".") else "link" if entry.is_symlink() else "folder"
    return classify_file(name)


def classify_file(name: str) -> str:
    """Return the kind of a file by its name: `image`, a format that is not read, or another kind."""
    ending = os.path.splitext(name.lower())[1]
    if name.startswith("."):
        return HIDDEN
    if ending in SUFFIXES:
        return "image"
    return UNREAD.get(ending) or (escape_name(ending) if ending else "without an ending")


def is_left_by_system(parts: Sequence[str]) -> bool:
    """Return whether an operating system created a file, by the parts of its path; True for an empty path."""
    if not parts:
        return True
    name, folders = parts[-1].lower(), {part.lower() for part in parts[:-1]}
    return name in SIDECARS or name.startswith("._") or not folders.isdisjoint(SIDECAR_FOLDERS)
