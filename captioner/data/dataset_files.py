"""Read data sets of Hugging Face `datasets`, from disk or from the hub. Images stay encoded, and on disk."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.data.captions import is_missing
from captioner.data.columns import Columns, find_columns
from captioner.data.records import NO_SPLIT, Record
from captioner.data.row_records import join_rows
from captioner.data.splits import NoSplitError, find_split
from captioner.errors import SettingError, first_line
from captioner.hub import hub_trouble

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray

ENDS = 2**14
"""Bytes at each end of an encoded image that are compared with those of another image of the same length."""


def is_hub_id(source: str | Path) -> bool:
    """Return whether a source that is not on this disk may be the hub id of a set."""
    return str(source).count("/") <= 1 and not Path(source).suffix and not str(source).startswith((".", "/"))


def is_saved_set(path: Path) -> bool:
    """Return whether `datasets` saved this folder."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def check_hub(source: str) -> None:
    """Refuse the hub id of a data set that the hub does not have, or when the hub does not answer.

    Raises:
        ValueError: the message names which of the two it is.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # data sets that were downloaded before can be used
    if trouble := hub_trouble(source, "dataset"):
        raise ValueError(
            f"'{source}' is no file and no folder, and {trouble}; "
            "check the path, or set HF_HUB_OFFLINE=1 to take a data set that was downloaded before"
        )


def read_dataset(source: str | Path, split: str | None, columns: Columns) -> tuple[Iterator[Record], "Dataset | None"]:
    """Read a `datasets` set saved on disk or on the hub.

    Returns:
        The records; and, if the set contains images and not paths, the encoded images, which stay on disk. The `image`
        of a record is then its row there. So a set may be larger than memory.

    Raises:
        SettingError: there is no such split or column.
        ValueError: there is no such set.
    """
    import datasets

    if not isinstance(source, Path):
        check_hub(source)
    try:
        loaded = datasets.load_from_disk(source) if isinstance(source, Path) else datasets.load_dataset(source)
    except (FileNotFoundError, ValueError, OSError, ConnectionError) as error:
        raise SettingError(f"cannot load '{source}' as a data set: {first_line(error)}", "root") from None
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {split or NO_SPLIT: loaded}
    names = list(parts) if split is None else [pick_split(parts, split, source)]
    rows = datasets.concatenate_datasets([parts[name] for name in names])
    origins = [name for name in names for _ in range(len(parts[name]))]
    return dataset_records(rows, columns, f"'{source}'", origins)


def pick_split(names: Any, split: str, source: str | Path) -> str:
    """Return the name of a split in a set.

    Raises:
        NoSplitError: there is no such split.
    """
    if (found := find_split(names, split)) is None:
        raise NoSplitError(f"'{source}' has no split '{split}', only {', '.join(names)}")
    return found


def dataset_records(
    rows: "Dataset", columns: Columns, name: str, splits: list[str]
) -> tuple[Iterator[Record], "Dataset | None"]:
    """Return the records and the images of the rows of a set, as `read_dataset` does."""
    import datasets

    found = find_columns(rows.features, columns, name)
    image_column, _, id_column = found
    images = None
    if isinstance(rows.features[image_column], datasets.Image):
        images = rows.select_columns(image_column)
        images = images if image_column == "image" else images.rename_column(image_column, "image")
        encoded = images.cast_column("image", datasets.Image(decode=False)).with_format("arrow")
        missing = [lacks for part in encoded.iter(1000) for lacks in lack_image(part["image"])]
        numbers: list[int | None] = [None if lacks else number for number, lacks in enumerate(missing)]
        if id_column is not None:
            number_repeats(encoded, rows[id_column][:], numbers)
        rows = rows.remove_columns(image_column).add_column(image_column, numbers)
    present = [column for column in found if column is not None]
    return join_rows(rows.select_columns(present), found, splits, name, lambda number: f"row {number}"), images


def lack_image(images: "ChunkedArray") -> list[bool]:
    """Return which encoded images of a `datasets` column are missing: null, or without bytes and path."""
    from pyarrow import compute

    nothing = [compute.is_null(compute.struct_field(images, field)) for field in ("bytes", "path")]
    return compute.and_(*nothing).to_pylist()


def number_repeats(encoded: "Dataset", ids: list[Any], numbers: list[int | None]) -> None:
    """Give rows with equal ids and equal images the number of the first of them; other rows keep their own number.

    Args:
        encoded: the encoded images, in the format `arrow`.
        ids: the image id of each row.
        numbers: the row of each image, None where there is none; changed in place.
    """
    times = Counter(map(str, ids))
    repeated = [n for n, i in enumerate(ids) if numbers[n] is not None and not is_missing(i) and times[str(i)] > 1]
    first: dict[tuple[str, Any], int] = {}
    for start in range(0, len(repeated), 100):
        some = repeated[start : start + 100]
        for number, image in zip(some, encoded.select(some)[:]["image"], strict=True):
            numbers[number] = first.setdefault((str(ids[number]), image_mark(image)), number)


def image_mark(image: Any) -> Any:
    """Return a value that differs between different images of the same id: a digest, or a path.

    Args:
        image: an Arrow value with `bytes` and `path`.
    """
    if not image["bytes"].is_valid:
        return image["path"].as_py()
    content = memoryview(image["bytes"].as_buffer())
    return len(content), hashlib.blake2b(bytes(content[:ENDS]) + bytes(content[-ENDS:])).digest()
