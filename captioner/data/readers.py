"""Caption readers: whatever the format on disk, one table comes out.

Every reader returns a `datasets.Dataset` with the columns `image_id` (int or str), `image` (path or bytes, not yet
decoded), `captions` (list of str) and `split`; `caption_table.py` builds it and says what was wrong with the data.

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
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from captioner.data.caption_table import NO_SPLIT, OnBad, Record, build_table
from captioner.data.config import DataConfig
from captioner.data.splits import keep_split
from captioner.hub import hub_trouble

if TYPE_CHECKING:
    import datasets
    from datasets import Dataset
    from pyarrow import ChunkedArray

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 2 * 2**30

SPLITS = ("train", "val", "test")


ALSO_CALLED = {"image": ("file_name",), "captions": ("caption", "text")}
"""Other usual names of a column, looked for where it is missing."""


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
        records = keep_split(records, split, path, on_bad)
    return build_table(records, None, root, folder, on_bad, f"'{path}'" + (f", split '{split}'" if split else ""))


def is_hub_id(source: str | Path) -> bool:
    """Tell whether a source that is not on this disk may be the hub id of a set."""
    return str(source).count("/") <= 1 and not Path(source).suffix and not str(source).startswith((".", "/"))


def check_hub(source: str) -> None:
    """Refuse the hub id of a data set that the hub has not, or that cannot be asked for.

    Raises:
        ValueError: saying which.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # what was downloaded before is taken
    if trouble := hub_trouble(source, "dataset"):
        raise ValueError(
            f"'{source}' is no file and no folder, and {trouble}; "
            "check the path, or set HF_HUB_OFFLINE=1 to take a data set that was downloaded before"
        )


def is_saved_set(path: Path) -> bool:
    """Tell whether `datasets` saved this folder."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def find_annotations(root: Path, split: str | None) -> Path:
    """Find the annotation file under a data root: COCO's of the split, else Karpathy's, else a lone CSV or JSONL.

    Raises:
        FileNotFoundError: none is there.
    """
    patterns = [f"captions_{split}2017.json", f"captions_{split}2014.json", f"captions_{split}.json"] if split else []
    patterns += ["dataset_*.json", "captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv"]
    places = (root / "annotations", root)
    for pattern in patterns:
        if found := [path for place in places for path in sorted(place.glob(pattern))]:
            known = [f"captions_{other}{year}.json" for other in SPLITS for year in ("2017", "2014", "")]
            coco = [name for name in known if any((place / name).is_file() for place in places)]
            if split and coco and found[0].match("dataset_*.json"):
                logger.warning(
                    "the split '%s' is read from '%s', and others from %s, which may hold the same images: "
                    "name '%s' to read all from it",
                    *(split, found[0], " and ".join(coco), found[0]),
                )
            return found[0]
    raise FileNotFoundError(f"no annotations under '{root}'; looked for {', '.join(patterns)}, also in annotations/")


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: it is larger than `MAX_JSON_BYTES` or not JSON.
    """
    check_size(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # Windows programs write a byte order mark
    except (ValueError, RecursionError) as error:  # also wrong UTF-8 and numbers of thousands of digits
        raise ValueError(f"'{path}' is not JSON: {error}") from None


def check_size(path: Path) -> None:
    """Refuse a text file that would fill the memory.

    Raises:
        ValueError: it is larger than `MAX_JSON_BYTES`.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"'{path}' is {size / 2**30:.1f} GiB; over {MAX_JSON_BYTES // 2**30} GiB is refused")


def is_karpathy(content: Any) -> bool:
    """Tell Karpathy's JSON from COCO's."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def read_coco(content: Any, path: Path, split: str | None) -> Iterator[Record]:
    """Yield the records of COCO captions JSON, those of captions whose image is not listed last, with no image.

    The split, which the format does not hold, is the one asked for, or that of the file's name.
    """
    if not (isinstance(content, dict) and isinstance(content.get("images"), list)):
        raise ValueError(f"'{path}' is neither COCO nor Karpathy captions: it has no list 'images'")
    if not isinstance(content.get("annotations"), list):
        raise ValueError(f"'{path}' has no list 'annotations'; COCO test files hold no captions")
    found = [name for name in SPLITS if name in path.stem]
    named = found[0] if len(found) == 1 else None
    if split in SPLITS and named not in (None, split):
        raise ValueError(
            f"'{path}' holds the split '{named}' by its name, not '{split}'; name the folder of all splits"
        )
    split = split or named or NO_SPLIT
    try:
        captions: dict[int | str, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in content["images"]:
            yield Record(image["id"], image["file_name"], captions.pop(image["id"], []), split)
        for image_id, texts in captions.items():
            yield Record(image_id, None, texts, split)
    except KeyError as error:
        raise ValueError(f"'{path}' is not COCO captions: an entry lacks {error}") from None
    except TypeError as error:
        raise ValueError(f"'{path}' is not COCO captions: an entry is of another form ({error})") from None


def read_karpathy(content: dict, path: Path, restval: bool = False) -> Iterator[Record]:
    """Yield the records of Karpathy's JSON, COCO and Flickr flavours; `restval` counts as train when asked to."""
    try:
        for image in content["images"]:
            split = "train" if restval and image["split"] == "restval" else str(image["split"])
            name = PurePosixPath(image.get("filepath", ""), image["filename"])
            image_id = image["cocoid"] if "cocoid" in image else image["imgid"]
            yield Record(image_id, str(name), [sentence["raw"] for sentence in image["sentences"]], split)
    except KeyError as error:
        raise ValueError(f"'{path}' is not Karpathy captions: an entry lacks {error}") from None
    except TypeError as error:
        raise ValueError(f"'{path}' is not Karpathy captions: an entry is of another form ({error})") from None


def read_rows(path: Path, columns: tuple[str, str, str]) -> Iterator[Record]:
    """Yield the records of a CSV or JSONL file; rows of the same image are joined."""
    for record in _join_rows(load_rows(path), columns, str(path)):
        if isinstance(record.image, dict):  # as `datasets` has images; its path is a name like any other
            record.image = record.image.get("path")
        yield record


def load_rows(path: Path) -> list[Any]:
    """Parse a CSV file into dictionaries, or a JSONL file into whatever its lines hold.

    Raises:
        ValueError: it is not such a file, or larger than `MAX_JSON_BYTES`.
    """
    check_size(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(s) for s in file if s.strip()]
        except (csv.Error, ValueError, RecursionError) as error:
            raise ValueError(f"'{path}' cannot be read: {error}") from None


def read_dataset(
    source: str | Path, split: str | None, columns: tuple[str, str, str]
) -> tuple[Iterator[Record], "Dataset | None"]:
    """Read a `datasets` set saved on disk or on the hub.

    Returns:
        The records and, where the set holds images, not paths, these as they are: encoded and on disk. A record's
        `image` is then its row there, so that a set larger than memory passes.
    """
    import datasets

    if not isinstance(source, Path):
        check_hub(source)
    try:
        loaded = datasets.load_from_disk(source) if isinstance(source, Path) else datasets.load_dataset(source)
    except (FileNotFoundError, ValueError, OSError, ConnectionError) as error:
        raise ValueError(f"cannot load '{source}' as a data set: {str(error).splitlines()[0]}") from None
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {split or NO_SPLIT: loaded}
    if split is not None and split not in parts:
        raise ValueError(f"'{source}' has no split '{split}', only {', '.join(parts)}")
    names = [split] if split is not None else list(parts)
    rows = datasets.concatenate_datasets([parts[name] for name in names])
    origins = [name for name in names for _ in range(len(parts[name]))]
    return dataset_records(rows, columns, str(source), origins)


def dataset_records(
    rows: "Dataset", columns: tuple[str, str, str], name: str, splits: list[str]
) -> tuple[Iterator[Record], "Dataset | None"]:
    """Return the records of the rows of a `datasets` set and its images, as `read_dataset` does."""
    import datasets

    images, image_column = None, find_column(rows.features, columns[0])
    if isinstance(rows.features.get(image_column), datasets.Image):
        images = rows.select_columns(image_column)
        images = images if image_column == "image" else images.rename_column(image_column, "image")
        encoded = images.cast_column("image", datasets.Image(decode=False)).with_format("arrow")
        missing = [lacks for part in encoded.iter(1000) for lacks in _lack_image(part["image"])]
        numbers = [None if lacks else number for number, lacks in enumerate(missing)]
        rows = rows.remove_columns(image_column).add_column(image_column, numbers)
    return _join_rows(rows, (image_column, *columns[1:]), name, splits), images


def _lack_image(images: "ChunkedArray") -> list[bool]:
    """Tell which encoded images of a `datasets` column are none: null, or without bytes and path."""
    from pyarrow import compute

    nothing = [compute.is_null(compute.struct_field(images, field)) for field in ("bytes", "path")]
    return compute.and_(*nothing).to_pylist()


def _join_rows(
    rows: Iterable[dict], columns: tuple[str, str, str], name: str, splits: list[str] | None = None
) -> Iterator[Record]:
    image_column, caption_column, id_column = columns
    joined: dict[int | str, Record] = {}
    for number, row in enumerate(rows):
        if number == 0 and isinstance(row, dict):
            image_column, caption_column = find_column(row, image_column), find_column(row, caption_column)
        if not isinstance(row, dict) or image_column not in row or caption_column not in row:
            raise ValueError(
                f"'{name}', row {number + 1}, lacks '{image_column}' or '{caption_column}'; "
                "name the columns with --data.image-column and --data.caption-column"
            )
        image, captions, key = row[image_column], row[caption_column], row.get(id_column)
        if key is None or key == "":
            key = image if isinstance(image, str) else number
        if not isinstance(key, int | str):
            raise ValueError(
                f"'{name}', row {number + 1}: the image id {key!r} is neither a whole number nor text"[:300]
            )
        split = splits[number] if splits else str(row.get("split") or NO_SPLIT)
        record = joined.setdefault(key, Record(key, image, [], split))
        if record.split == NO_SPLIT:
            record.split = split
        record.several_splits |= split not in (record.split, NO_SPLIT)
        record.captions.extend(captions if isinstance(captions, list) else [captions])
    yield from joined.values()


def find_column(names: Iterable[str], column: str) -> str:
    """Return a column, or another usual name of it where that is the one there is."""
    return next((name for name in (column, *ALSO_CALLED.get(column, ())) if name in names), column)


def read_split(data: DataConfig, split: str) -> "datasets.Dataset":
    """Read one split of the configured data.

    Raises:
        ValueError: no data is configured, or a stream of it.
    """
    if data.root is None:
        raise ValueError("no captions: name an annotation file, a folder or a hub id with --data.root")
    if data.streaming:
        raise ValueError("--data.streaming is for training alone; leave it out here")
    return read_captions(
        data.root,
        split,
        images=data.images,
        restval=data.restval,
        on_bad=data.on_bad,
        image_column=data.image_column,
        caption_column=data.caption_column,
        id_column=data.id_column,
    )
