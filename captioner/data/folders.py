"""Find the annotations in a folder of captioned images.

| in the folder, or in its `annotations/`                              | as in                    |
|----------------------------------------------------------------------|--------------------------|
| `captions_train2017.json` and its like, a file for each split        | COCO                     |
| `dataset_*.json`                                                     | Karpathy's splits        |
| `captions.csv`, `captions.jsonl`, `captions.txt`, `metadata.csv`, ... | Kaggle's Flickr8k        |
| `train.csv`, `captions_train.jsonl`, ...: a table for each split     |                          |
| `train/metadata.csv`, `train/a.jpg` and `train/a.txt`, ...           | Hugging Face imagefolder |
| one table of any name                                                |                          |
| `a.jpg` and `a.txt` side by side                                     | kohya's trainers         |
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner.data.records import NO_SPLIT, Record
from captioner.data.splits import ALIASES, SPLITS, NoSplitError, find_split, is_split_name, split_names
from captioner.errors import MissingError, SettingError
from captioner.images import SUFFIXES
from captioner.text_files import read_text

logger = logging.getLogger(__name__)

TABLE_NAMES = ("captions", "metadata")
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
"""File endings of tables, in the order of the search; those of Kaggle may also end in `.txt`."""

CAPTION_FILES = (".txt", ".caption")
"""File endings of caption files beside an image of the same name."""


@dataclass(frozen=True)
class Annotations:
    """Captions in a data folder: a file, or a folder with caption files beside its images."""

    path: Path
    beside: Path | None = None
    """Folder of these annotations if each split has its own; images are searched there first."""
    split: str | None = None
    """Split in the name of their file or folder, for annotations that contain no split."""


def find_annotations(root: Path, split: str | None) -> list[Annotations]:
    """Find the annotations under a data root: several if `split` is None and each split has its own.

    Raises:
        FileNotFoundError: there are no annotations.
        NoSplitError: there are no annotations of the split.
        ValueError: there are several tables, so one must be named.
    """
    places = [list_folder(place) for place in (root / "annotations", root)]
    if found := find_known(root, split, places):
        return [found]
    if parts := find_parts(root, places):
        if split is None:
            return list(parts.values())
        if (name := find_split(parts, split)) is None:
            raise NoSplitError(f"'{root}' has no split '{split}', only {', '.join(parts)}")
        return [parts[name]]
    if table := find_lone_table(root):
        return [Annotations(table)]
    if has_caption_files(root):
        return [Annotations(root)]
    what = "captions_train.json and its like, dataset_*.json, captions.csv or .jsonl, metadata.csv or .jsonl"
    if coco := coco_files(root):
        raise MissingError(f"no annotations under '{root}' that hold all splits; name one of {', '.join(coco)}", "root")
    if any(root.rglob("*.parquet")):
        raise SettingError(f"'{root}' holds parquet files, which are read row by row, in training alone", "streaming")
    raise MissingError(
        f"no annotations under '{root}'; looked for {what}, also in annotations/, for a lone table, and for caption "
        "files beside images",
        "root",
    )


def coco_files(root: Path) -> list[str]:
    """Return the names of COCO's captions files under a root, those of all splits."""
    places = (root / "annotations", root)
    names = [f"captions_{split}{year}.json" for split in SPLITS for year in ("2017", "2014", "")]
    return [name for name in names if any((place / name).is_file() for place in places)]


def list_folder(folder: Path) -> dict[str, Path]:
    """Return what is in a folder by its name in lower case; nothing if there is no such folder."""
    if not folder.is_dir():
        return {}
    return {name.lower(): folder / name for name in sorted(os.listdir(folder), reverse=True)}


def find_known(root: Path, split: str | None, places: Sequence[Mapping[str, Path]]) -> Annotations | None:
    """Find COCO's annotation file of a split, else Karpathy's, else a table of a usual name.

    Args:
        root: the data root.
        split: the split.
        places: what is in `annotations/` and in the root, as `list_folder` returns it.
    """
    folders = [folder for folder in (root / "annotations", root) if folder.is_dir()]
    names = split_names(split) if split else ()
    for folder in folders:  # a folder holds all splits of a set, so it counts more than the year
        for name in (f"captions_{name}{year}.json" for name in names for year in ("2017", "2014", "")):
            if (folder / name).is_file():
                return Annotations(folder / name)
    for folder in folders:
        if karpathy := sorted(folder.glob("dataset_*.json")):
            if split and (coco := coco_files(root)):
                logger.warning(
                    "the split '%s' is read from '%s', and others from %s, which may hold the same images: "
                    "name '%s' to read all from it",
                    *(split, karpathy[0], " and ".join(coco), karpathy[0]),
                )
            return Annotations(karpathy[0])
    tables = [table for stem in TABLE_NAMES for place in places for table in find_tables(place, stem)]
    if not tables:
        return None
    if len(tables) > 1:
        unread = "', '".join(map(str, tables[1:]))
        logger.warning("'%s' is read, '%s' is not; to read another table, give its path", tables[0], unread)
    return Annotations(tables[0], split=folder_split(root) if tables[0].stem.lower() == "metadata" else None)


def folder_split(folder: Path) -> str | None:
    """Return the name of a folder if it is that of a split."""
    name = folder.resolve().name
    return name if is_split_name(name.lower()) else None


def find_parts(root: Path, places: Sequence[Mapping[str, Path]]) -> dict[str, Annotations]:
    """Find the annotations of each split that has a table of its name, or a folder of its name with annotations.

    Args:
        root: the data root.
        places: what is in `annotations/` and in the root, as `list_folder` returns it.
    """
    parts: dict[str, Annotations] = {}
    for name in (name for names in ALIASES.values() for name in names):
        for place in places:
            for stem in (name, f"captions_{name}", f"{name}_captions"):
                if name not in parts and (found := find_table(place, stem)):
                    parts[name] = Annotations(found, split=name)
        folder = next((path for path in (root / name, root / name.capitalize()) if path.is_dir()), None)
        if name in parts or folder is None:
            continue
        files = list_folder(folder)
        tables = [find_table(files, stem) for stem in (*TABLE_NAMES, name)]
        if found := next(filter(None, tables), None) or find_lone_table(folder):
            parts[name] = Annotations(found, folder, name)
        elif has_caption_files(folder):
            parts[name] = Annotations(folder, folder, name)
    return parts


def find_table(files: Mapping[str, Path], stem: str) -> Path | None:
    """Find a table of a folder by its name (compared without ending and case); see `list_folder` for `files`."""
    return next(iter(find_tables(files, stem)), None)


def find_tables(files: Mapping[str, Path], stem: str) -> list[Path]:
    """Find all tables of a folder with this name (see `find_table`), those with preferred endings first."""
    endings = (*TABLES, *((".txt",) if stem in TABLE_NAMES else ()))
    found = (files[stem + ending] for ending in endings if stem + ending in files)
    return [path for path in found if path.is_file()]


def find_lone_table(folder: Path) -> Path | None:
    """Find the only table of a folder, or its only JSON file if there is no table.

    Raises:
        SettingError: there are several.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for endings in (TABLES, (".json",)):
        found = [path for path in files if path.suffix.lower() in endings]
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise SettingError(f"'{folder}' holds {names}; name one of these files", "root")
        if found:
            return found[0]
    return None


def caption_files(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each image under a root with the caption files beside it, and each caption file there without an image."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        images = [path for path in paths if path.suffix.lower() in SUFFIXES]
        texts: dict[str, list[Path]] = {}
        for path in paths:
            if path.suffix.lower() in CAPTION_FILES:
                texts.setdefault(path.stem, []).append(path)
        for image in images:
            yield image, texts.get(image.stem, [])
        stems = {image.stem for image in images}
        if stems & texts.keys():
            yield from ((path, []) for stem, lone in texts.items() if stem not in stems for path in lone)


def has_caption_files(root: Path) -> bool:
    """Return whether any image under a root has a caption file beside it."""
    return any(texts for _, texts in caption_files(root))


def read_caption_files(root: Path) -> Iterator[Record]:
    """Yield a record for each image under a root: its captions are the lines of the text files of its name.

    Raises:
        ValueError: a text file has no known encoding.
        OSError: a text file cannot be read.
    """
    for path, texts in caption_files(root):
        name = path.relative_to(root).as_posix()
        lines = [line for text in texts for line in read_text(text).split("\n") if line.strip()]
        yield Record(name, name if path.suffix.lower() in SUFFIXES else None, lines, NO_SPLIT)
