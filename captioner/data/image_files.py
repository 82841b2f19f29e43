"""Finding the images of a folder: the same search for captioning, for pretraining and for whoever needs one."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captioner.data.path_filter import EXCLUDED, PathFilter
from captioner.images.names import escape_name
from captioner.images.opening import SUFFIXES, UNREAD, remedy

SIDECARS = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", ".localized", "icon\r", ".picasa.ini"))
"""Files that operating systems and their image viewers leave in folders, in lower case; `._x.jpg` is one, too."""

SIDECAR_FOLDERS = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "system volume information", ".appledouble", ".thumbnails", ".trashes")
    + (".fseventsd", ".spotlight-v100", ".temporaryitems")
)
"""Folders of that kind; those with thumbnails hold copies of images."""


HIDDEN = "hidden"

READABLE = frozenset(("image", *UNREAD.values()))
"""Kinds of files that patterns choose among."""

KINDS = 8
"""Kinds of files that are named in one line; others are only counted."""


@dataclass
class FolderImages:
    """What a search has found under a folder."""

    root: Path
    files: list[Path] = field(default_factory=list)
    """Images by their ending, sorted; each begins with the root."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that are not images by their ending, hidden files and hidden folders: how many of each kind."""
    unread: Counter[str] = field(default_factory=Counter)
    """Images of formats that are not read: how many of each."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that could not be read, each with its reason."""

    def left_out(self) -> str:
        """Say what was left out, by kind: `2 SVG (not read: convert it to JPEG or PNG), 1 .txt, 3 hidden`."""
        return describe_left_out(self.unread, self.others)


def describe_left_out(unread: Counter[str], others: Counter[str]) -> str:
    """Say what was left out, by kind.

    Args:
        unread: images of formats that are not read.
        others: files that are no images.
    """
    parts = [f"{count} {kind} (not read: {remedy(kind)})" for kind, count in sorted(unread.items())]
    common = others.most_common(KINDS)
    parts += [f"{count} {kind}" for kind, count in common]
    if rest := others.total() - sum(count for _, count in common):
        parts.append(f"{rest} others")
    return ", ".join(parts)


def search_folder(root: Path, wanted: PathFilter | None = None) -> FolderImages:
    """Find the images in a folder and the folders within it, by their file endings.

    Hidden files and folders (`.git`, `.cache`) are left out and counted; what operating systems leave in folders is
    not even counted. Links to folders are followed, and every folder is searched once, by the name that needs no link
    where there is one, so that links in a circle end.

    Args:
        root: the folder.
        wanted: chooses among the images; the others are counted.
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
        for entry in entries:
            path, kind = folder / entry.name, classify(entry)
            if kind == "folder":
                folders.append(path)
            elif kind == "link":
                links.append(path)
            elif kind in READABLE and wanted is not None and not wanted(path.relative_to(root).as_posix()):
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
    """Say what an entry of a folder is: folder, link, image, the name of a format that is not read, or another kind.

    Returns:
        An empty string for what an operating system has left.
    """
    name = entry.name.lower()
    try:
        is_folder = entry.is_dir()
    except OSError:  # a link to what cannot be reached
        is_folder = False
    if name in (SIDECAR_FOLDERS if is_folder else SIDECARS) or (name.startswith("._") and not is_folder):
        return ""
    if is_folder:
        return HIDDEN if name.startswith(".") else "link" if entry.is_symlink() else "folder"
    return classify_file(name)


def classify_file(name: str) -> str:
    """Say what a file is by its name: image, the name of a format that is not read, or another kind."""
    ending = os.path.splitext(name.lower())[1]
    if name.startswith("."):
        return HIDDEN
    if ending in SUFFIXES:
        return "image"
    return UNREAD.get(ending) or (escape_name(ending) if ending else "without an ending")


def is_left_by_system(parts: Sequence[str]) -> bool:
    """Tell whether an operating system has left a file, by the parts of its path; so is one without a name."""
    if not parts:
        return True
    name, folders = parts[-1].lower(), {part.lower() for part in parts[:-1]}
    return name in SIDECARS or name.startswith("._") or not folders.isdisjoint(SIDECAR_FOLDERS)
