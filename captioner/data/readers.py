"""Caption readers: they read all formats into one table.

| on disk                                                        | reader                                    |
|----------------------------------------------------------------|-------------------------------------------|
| COCO captions JSON (`images`, `annotations`)                   | `json_files.read_coco`                    |
| Karpathy JSON (`dataset_coco.json`, `dataset_flickr8k.json`)   | `json_files.read_karpathy`                |
| CSV, TSV, JSON Lines, or a JSON list of rows                   | `row_files.load_rows`, `row_records`      |
| a text file beside each image                                  | `folders.read_caption_files`              |
| a `datasets` set, saved on disk or on the hub                  | `dataset_files.read_dataset`              |

`folders.find_annotations` finds out which of them a folder holds. `records.py` checks which records can be used, by the
rules of `captions.py`. `caption_table.py` builds the table.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.data.caption_table import build_table
from captioner.data.columns import Columns
from captioner.data.dataset_files import is_hub_id, is_saved_set, read_dataset
from captioner.data.folders import Annotations, find_annotations, read_caption_files
from captioner.data.image_finder import ImageFinder, portable_name
from captioner.data.json_files import is_karpathy, is_row_list, read_coco, read_karpathy
from captioner.data.records import NO_SPLIT, OnBad, Record
from captioner.data.row_files import Rows, load_document
from captioner.data.row_records import row_records
from captioner.data.splits import is_split_name, select_split
from captioner.errors import MissingError, SettingError

if TYPE_CHECKING:
    from datasets import Dataset


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
        source: an annotation file, a folder (see `folders.py`), a saved `datasets` set, or the hub id of one.
        split: the split to read (`train`, `val`, `test`, or the source's own name); `None` for all.
        images: folder of the images, if it is not beside the annotations.
        restval: whether Karpathy's `restval` images belong to `train`.
        on_bad: `skip` leaves out records that cannot be used and logs one summary; `refuse` raises an error.
        image_column: column of the image in CSV, JSONL and `datasets` sources.
        caption_column: column of the captions in those: a text or a list of texts, in one row per caption or image.
        id_column: column of the image id in those; without such a column, the path of an image is its id.

    Returns:
        A `datasets.Dataset` with the columns `image_id`, `image`, `captions` and `split`; see `build_table`.

    Raises:
        ValueError: the format is unknown, the split is empty, or a record cannot be used and `on_bad` is `refuse`.
        FileNotFoundError: the source or every image is missing.
    """
    path, columns = Path(source), Columns(image_column, caption_column, id_column)
    folder = Path(images) if images is not None else None
    if folder is not None and not folder.is_dir():
        raise MissingError(f"no image folder at '{images}'", "images")
    if not path.exists() and not is_hub_id(source):
        raise MissingError(f"no annotations at '{source}'", "root")
    if not path.exists() or is_saved_set(path):
        records, encoded = read_dataset(path if path.exists() else str(source), split, columns)
        finder = ImageFinder(path if path.exists() else Path(), folder)
        return build_table(records, encoded, finder, on_bad, f"'{source}'")
    found = find_annotations(path, split) if path.is_dir() else [Annotations(path)]
    records = chain.from_iterable(read_annotations(part, split, columns, restval) for part in found)
    name = f"'{found[0].path if len(found) == 1 else path}'"
    if split is not None:
        records = select_split(records, split, name, on_bad)
    finder = ImageFinder(path if path.is_dir() else path.parent, folder)
    return build_table(records, None, finder, on_bad, name + (f", split '{split}'" if split else ""))


def read_annotations(found: Annotations, split: str | None, columns: Columns, restval: bool) -> Iterator[Record]:
    """Yield the records of one annotation file, or of the caption files beside the images of one folder."""
    path = found.path
    if path.is_dir():
        records = read_caption_files(path)
    elif isinstance(content := load_document(path), Rows):
        records = row_records(content, columns, f"'{path}'")
    elif is_row_list(content):
        records = row_records(Rows(content), columns, f"'{path}'")
    elif columns != Columns():
        name = next(name for name, usual in zip(columns, Columns(), strict=True) if name != usual)
        fact = f"'{path}' has no column '{name}': it is JSON in the format of COCO or Karpathy, which has no columns"
        raise SettingError(fact, "image_column", "caption_column", "id_column")
    elif is_karpathy(content):
        records = read_karpathy(content, path, restval)
    else:
        records = read_coco(content, path, split)
    for record in records:
        if record.split == NO_SPLIT:
            record.split = found.split or split_of_name(record, path) or NO_SPLIT
        if found.beside is not None:
            if record.image_id == record.image:  # names are unique only within their folder
                record.image_id = f"{found.beside.name}/{record.image}"
            record.beside = found.beside
        yield record


def split_of_name(record: Record, path: Path) -> str | None:
    """Return the split in the name of the image's folder, for a Hugging Face imagefolder with one table; else None."""
    if path.stem.lower() != "metadata" or not isinstance(record.image, str):
        return None
    folder = portable_name(record.image).partition("/")[0]
    return folder if is_split_name(folder.lower()) else None
