"""Caption readers: whatever the format on disk, one table comes out.

Every reader returns a `datasets.Dataset` with the columns `image_id` (int or str), `image` (path or bytes, not yet
decoded), `captions` (list of str) and `split`. What was wrong with the data is counted in a `ReadReport`, never silent.

| on disk                                                        | reader                          |
|----------------------------------------------------------------|---------------------------------|
| COCO captions JSON (`images`, `annotations`)                   | `read_coco`                     |
| Karpathy JSON (`dataset_coco.json`, `dataset_flickr8k.json`)   | `read_karpathy`                 |
| CSV or JSONL beside its images                                 | `read_rows`                     |
| a `datasets` set, saved on disk or on the hub                  | `read_dataset`                  |

`read_captions` tells them apart.
"""

import csv
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

OnBad = Literal["skip", "refuse"]
MAX_JSON_BYTES = 2 * 2**30
IMAGE_FOLDERS = ("{folder}", "images/{folder}", "images", "{split}2017", "{split}2014", "val2014", "Images", ".")
"""Where the images of an annotation file are looked for, relative to the data root and to the file itself."""


@dataclass
class ReadReport:
    """What a reader found: counts of everything that did not make it into the table, with the first few examples."""

    images: int = 0
    captions: int = 0
    missing_images: list[str] = field(default_factory=list)
    duplicate_ids: list[str] = field(default_factory=list)
    empty_captions: list[str] = field(default_factory=list)
    images_without_captions: list[str] = field(default_factory=list)

    def problems(self) -> dict[str, list[str]]:
        """Map each kind of problem that occurred to the images it occurred in."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), list) and v}

    def __str__(self) -> str:
        found = [
            f"{len(where)} {kind.replace('_', ' ')} ({', '.join(where[:3])}{', ...' if len(where) > 3 else ''})"
            for kind, where in self.problems().items()
        ]
        return f"{self.images} images, {self.captions} captions" + (f"; skipped {'; '.join(found)}" if found else "")


@dataclass
class Record:
    """One image as a reader yields it, unchecked: `image` is a path below the images, or a row of a `datasets` set."""

    image_id: int | str
    image: Any
    captions: list[str]
    split: str


def read_captions(
    source: str | Path,
    split: str | None = None,
    *,
    images: str | Path | None = None,
    restval: bool = False,
    on_bad: OnBad = "skip",
    image_column: str = "image",
    caption_column: str = "captions",
    id_column: str = "image_id",
) -> "Dataset":
    """Read captions and the paths of their images into one table.

    Args:
        source: an annotation file, a folder (COCO root, Karpathy root, CSV/JSONL beside images, a saved `datasets`
            set), or the hub id of a `datasets` set.
        split: which split to keep (`train`, `val`, `test`, or the source's own name); `None` keeps all.
        images: folder of the images, where it is not beside the annotations.
        restval: join Karpathy's `restval` images to `train`.
        on_bad: `skip` drops what is unusable and logs one summary; `refuse` raises on it.
        image_column: the image column of CSV, JSONL and `datasets` sources.
        caption_column: likewise, the captions; a text or a list of texts, one row per caption or per image.
        id_column: likewise, the image id; the image path where there is no such column.

    Raises:
        ValueError: the format is not known, the split is empty, or something is unusable and `on_bad` is `refuse`.
        FileNotFoundError: the source or every image is missing.
    """
    path = Path(source)
    columns = (image_column, caption_column, id_column)
    if not path.exists():
        if is_hub_id(source):
            return build_table(*read_dataset(str(source), split, columns), Path(), None, on_bad, str(source))
        raise FileNotFoundError(f"no annotations at '{source}'")
    if path.is_dir():
        if is_saved_set(path):
            return build_table(*read_dataset(path, split, columns), path, None, on_bad, str(source))
        root, path = path, find_annotations(path, split)
    else:
        root = path.parent
    folder = Path(images) if images is not None else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no image folder at '{images}'")
    if path.suffix in (".csv", ".jsonl"):
        records = read_rows(path, columns)
    else:
        content = load_json(path)
        records = read_karpathy(content, path, restval) if is_karpathy(content) else read_coco(content, path, split)
    if split is not None:
        records = (record for record in records if record.split == split)
    return build_table(records, None, root, folder, on_bad, f"'{path}'" + (f", split '{split}'" if split else ""))


def is_hub_id(source: str | Path) -> bool:
    """Tell whether a source that is not on this disk may be the hub id of a set."""
    return str(source).count("/") <= 1 and not Path(source).suffix and not str(source).startswith((".", "/"))


def is_saved_set(path: Path) -> bool:
    """Tell whether `datasets` saved this folder."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def find_annotations(root: Path, split: str | None) -> Path:
    """Find the annotation file under a data root: Karpathy's, COCO's of the split, or a lone CSV or JSONL.

    Raises:
        FileNotFoundError: none is there.
    """
    patterns = [f"captions_{split}2017.json", f"captions_{split}2014.json", f"captions_{split}.json"] if split else []
    patterns += ["dataset_*.json", "captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv"]
    for pattern in patterns:
        for folder in ("annotations", "."):
            if found := sorted((root / folder).glob(pattern)):
                return found[0]
    raise FileNotFoundError(f"no annotations under '{root}'; looked for {', '.join(patterns)}, also in annotations/")


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: it is larger than `MAX_JSON_BYTES` or not JSON.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"'{path}' is {size / 2**30:.1f} GiB; JSON over {MAX_JSON_BYTES // 2**30} GiB is refused")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # Windows programs write a byte order mark
    except (ValueError, RecursionError) as error:  # also wrong UTF-8 and numbers of thousands of digits
        raise ValueError(f"'{path}' is not JSON: {error}") from None


def is_karpathy(content: Any) -> bool:
    """Tell Karpathy's JSON from COCO's."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def read_coco(content: Any, path: Path, split: str | None) -> Iterator[Record]:
    """Yield the records of COCO captions JSON; the split, which the format does not hold, is the one asked for."""
    if not (isinstance(content, dict) and isinstance(content.get("images"), list)):
        raise ValueError(f"'{path}' is neither COCO nor Karpathy captions: it has no list 'images'")
    if not isinstance(content.get("annotations"), list):
        raise ValueError(f"'{path}' has no list 'annotations'; COCO test files hold no captions")
    split = split or next((name for name in ("train", "val", "test") if name in path.stem), "all")
    try:
        captions: dict[int | str, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in content["images"]:
            yield Record(image["id"], image["file_name"], captions.get(image["id"], []), split)
    except (KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is not COCO captions: an entry lacks {error}") from None


def read_karpathy(content: dict, path: Path, restval: bool = False) -> Iterator[Record]:
    """Yield the records of Karpathy's JSON, COCO and Flickr flavours; `restval` counts as train when asked to."""
    try:
        for image in content["images"]:
            split = "train" if restval and image["split"] == "restval" else image["split"]
            name = PurePosixPath(image.get("filepath", ""), image["filename"])
            image_id = image["cocoid"] if "cocoid" in image else image["imgid"]
            yield Record(image_id, str(name), [sentence["raw"] for sentence in image["sentences"]], split)
    except (KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is not Karpathy captions: an entry lacks {error}") from None


def read_rows(path: Path, columns: tuple[str, str, str]) -> Iterator[Record]:
    """Yield the records of a CSV or JSONL file; rows of the same image are joined."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(s) for s in file if s.strip()]
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"'{path}' cannot be read: {error}") from None
    yield from _join_rows(rows, columns, str(path))


def read_dataset(
    source: str | Path, split: str | None, columns: tuple[str, str, str]
) -> tuple[Iterator[Record], "Dataset | None"]:
    """Read a `datasets` set saved on disk or on the hub.

    Returns:
        The records and, where the set holds images, not paths, these as they are: encoded and on disk. A record's
        `image` is then its row there, so that a set larger than memory passes.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(source) if isinstance(source, Path) else datasets.load_dataset(source)
    except (FileNotFoundError, ValueError, OSError, ConnectionError) as error:
        raise ValueError(f"cannot load '{source}' as a data set: {str(error).splitlines()[0]}") from None
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {split or "all": loaded}
    if split is not None and split not in parts:
        raise ValueError(f"'{source}' has no split '{split}', only {', '.join(parts)}")
    names = [split] if split is not None else list(parts)
    rows = datasets.concatenate_datasets([parts[name] for name in names])
    origins = [name for name in names for _ in range(len(parts[name]))]
    return dataset_records(rows, columns, str(source), origins)


def dataset_records(
    rows: "Dataset", columns: tuple[str, str, str], name: str, splits: list[str]
) -> tuple[Iterator[Record], "Dataset | None"]:
    """Return the records of the rows of a `datasets` set and its pictures, as `read_dataset` does."""
    import datasets

    images, image_column = None, columns[0]
    if isinstance(rows.features.get(image_column), datasets.Image):
        images = rows.select_columns(image_column)
        images = images if image_column == "image" else images.rename_column(image_column, "image")
        rows = rows.remove_columns(image_column).map(lambda _, i: {image_column: i}, with_indices=True)
    return _join_rows(rows, columns, name, splits), images


def _join_rows(
    rows: Iterable[dict], columns: tuple[str, str, str], name: str, splits: list[str] | None = None
) -> Iterator[Record]:
    image_column, caption_column, id_column = columns
    joined: dict[int | str, Record] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or image_column not in row or caption_column not in row:
            raise ValueError(
                f"'{name}', row {number + 1}, lacks '{image_column}' or '{caption_column}'; "
                "name the columns with --data.image-column and --data.caption-column"
            )
        image, captions = row[image_column], row[caption_column]
        key = row.get(id_column) or (image if isinstance(image, str) else number)
        split = splits[number] if splits else row.get("split") or "all"
        record = joined.setdefault(key, Record(key, image, [], split))
        record.captions.extend(captions if isinstance(captions, list) else [captions])
    yield from joined.values()


class ImageFinder:
    """Find image files by name under a data root, listing each folder once; names cannot leave the root."""

    def __init__(self, root: Path, folder: Path | None):
        self.bases = [folder] if folder is not None else [root, root.parent]
        self.listings: dict[Path, frozenset[str]] = {}

    def __call__(self, name: str, split: str) -> Path | None:
        """Return the path of image `name`, or None.

        Raises:
            ValueError: the name is absolute or climbs out of its folder.
        """
        relative = PurePosixPath(str(name))
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"image name '{name}' leaves the image folder; names must be relative, without '..'")
        for base in self.bases:
            for place in IMAGE_FOLDERS:
                folder = base / place.format(folder=relative.parent, split=split)
                if relative.name in self.list(folder):
                    return folder / relative.name
        return None

    def list(self, folder: Path) -> frozenset[str]:
        """Return the names in a folder (none if it does not exist)."""
        if folder not in self.listings:
            self.listings[folder] = frozenset(p.name for p in folder.iterdir()) if folder.is_dir() else frozenset()
        return self.listings[folder]


def build_table(
    records: Iterable[Record], images: "Dataset | None", root: Path, folder: Path | None, on_bad: OnBad, name: str
) -> "Dataset":
    """Check the records, count what is wrong, and build the table; `images` holds the pictures that have no path."""
    import datasets

    report, find, seen = ReadReport(), ImageFinder(root, folder), set()
    table: dict[str, list] = {"image_id": [], "image": [], "captions": [], "split": []}
    for record in records:
        label = str(record.image_id)
        if record.image_id in seen:
            report.duplicate_ids.append(label)
            continue
        seen.add(record.image_id)
        captions = [" ".join(c.split()) for c in record.captions if isinstance(c, str) and c.strip()]
        report.empty_captions += [label] * (len(record.captions) - len(captions))
        image = record.image
        if isinstance(image, str):
            path = find(image, record.split)
            image = {"path": str(path), "bytes": None} if path else None
        if image is None:
            report.missing_images.append(str(record.image))
        elif not captions:
            report.images_without_captions.append(label)
        else:
            for column, value in zip(table, (record.image_id, image, captions, record.split), strict=True):
                table[column].append(value)
    report.images, report.captions = len(table["image"]), sum(map(len, table["captions"]))
    if report.problems():
        if on_bad == "refuse":
            raise ValueError(f"{name}: {report}; fix the data or pass --data.on-bad skip")
        logger.warning("%s: %s", name, report)
    if not report.images:
        if len(report.missing_images) == len(seen) and seen:
            raise FileNotFoundError(
                f"{name}: none of the {len(seen)} images was found; name their folder, --data.images"
            )
        raise ValueError(f"{name}: no captioned images")
    if not all(isinstance(i, int) for i in table["image_id"]):
        table["image_id"] = [str(i) for i in table["image_id"]]
    if images is None:
        return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))
    rows = table.pop("image")
    images = images.cast_column("image", datasets.Image(decode=False))
    if rows != list(range(len(images))):
        images = images.select(rows).flatten_indices()  # a copy on disk, not in memory
    joined = datasets.concatenate_datasets([images, datasets.Dataset.from_dict(table)], axis=1)
    return joined.select_columns(["image_id", "image", "captions", "split"])
