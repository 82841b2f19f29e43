"""Find the image files that annotations name, in the usual folders under a data root."""

import os
import re
import unicodedata
from functools import cached_property
from pathlib import Path, PurePosixPath

IMAGE_FOLDERS = ("{folder}", "images/{folder}", "images", "{split}2017", "{split}2014", "val2014", "Images", ".")
"""Folders in which images are searched, relative to the data root and to the folder of the annotations. `{folder}` is
the folder in the image's own name."""


def portable_name(name: str) -> str:
    """Return an image's name in the form for comparisons: with `/`, and composed characters (NFC)."""
    if "\\" in name or "./" in name or "//" in name:
        name = str(PurePosixPath(name.replace("\\", "/")))
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class Listing:
    """The names in a folder, which is read once; no names if it does not exist.

    Raises:
        OSError: the folder cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        kinds: dict[str, bool] = {}
        if folder.is_dir():
            with os.scandir(folder) as entries:
                kinds = {entry.name: entry.is_dir() for entry in entries}
        self.names = frozenset(kinds)
        self.folders = frozenset(name for name, is_folder in kinds.items() if is_folder)

    @cached_property
    def composed(self) -> dict[str, str]:
        """Map the composed form (NFC) of names to the names on disk; macOS writes the decomposed form (NFD)."""
        return {unicodedata.normalize("NFC", name): name for name in self.names if not name.isascii()}

    def find(self, name: str) -> str | None:
        """Return the name on disk, which may have another Unicode form; None if there is none."""
        if name in self.names:
            return name
        return None if name.isascii() else self.composed.get(unicodedata.normalize("NFC", name))


class ImageFinder:
    """Finds image files by name under a data root. Each folder is listed once, and names cannot leave the root.

    Args:
        root: folder of the annotations or of the data; its parent is searched, too.
        folder: folder of the images; if it is given, only this folder is searched.
    """

    def __init__(self, root: Path, folder: Path | None = None):
        self.bases, self.fixed = ([root, root.parent], False) if folder is None else ([folder], True)
        self.listings: dict[Path, Listing] = {}
        self.places: dict[tuple[str, str, Path | None], list[Listing]] = {}

    def __call__(self, name: str, split: str, beside: Path | None = None) -> Path | None:
        """Return the path of image `name`, or None.

        Args:
            name: a relative path with `/`, or `\\` as Windows writes it.
            split: the image's split; in some data sets, names of folders contain it.
            beside: folder of its annotations, if that is not the root; it is searched first.

        Raises:
            ValueError: the name is absolute or contains `..`.
        """
        for form in (name, name.replace("\\", "/")) if "\\" in name else (name,):
            parent, slash, last = form.rpartition("/")
            if last == ".." or (slash and (not parent or self.leaves(parent))):
                raise ValueError(f"image name '{name}' leaves the image folder; names must be relative, without '..'")
            for listing in self.search(parent, split, beside):
                if (found := listing.find(last)) and found not in listing.folders:
                    return listing.folder / found
        return None

    def leaves(self, parent: str) -> bool:
        """Return whether the folder in an image's name is not below the image folder."""
        return bool(re.match(r"/|[A-Za-z]:(/|$)", parent)) or ".." in parent.split("/")

    def search(self, parent: str, split: str, beside: Path | None) -> list[Listing]:
        """Return the folders that may contain the images of a folder and split, in the order of the search."""
        key = parent, split, beside
        if key not in self.places:
            bases = self.bases if self.fixed or beside is None else [beside, *self.bases]
            known = [place for place in IMAGE_FOLDERS if "{split}" not in place or "/" not in split]
            folders = [
                self.folder(base, place.format(folder=PurePosixPath(parent), split=split))
                for base in bases
                for place in known
            ]
            self.places[key] = [listing for listing in dict.fromkeys(folders) if listing.names]
        return self.places[key]

    def folder(self, base: Path, below: str) -> Listing:
        """List a folder below a base; its name on disk may have another Unicode form."""
        folder = base / below
        if not below.isascii() and not folder.is_dir():
            folder = base
            for part in PurePosixPath(below).parts:
                folder = folder / (self.listing(folder).find(part) or part)
        return self.listing(folder)

    def listing(self, folder: Path) -> Listing:
        """List a folder once."""
        if folder not in self.listings:
            self.listings[folder] = Listing(folder)
        return self.listings[folder]
