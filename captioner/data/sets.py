"""Several data sets at once: their names, one split of each, and all of them as one table.

The ids of images are unique within a set only. So scores and results belong to one set each, and in a joined table an
image is its row.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from captioner.data.config import SourceConfig
from captioner.data.readers import read_captions
from captioner.data.splits import NoSplitError
from captioner.data.token_cache import TokenCache, image_names, image_size, open_cache
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

logger = logging.getLogger(__name__)


def set_names(roots: Sequence[str]) -> list[str]:
    """Name data sets for logs and files: by their folder, and where these are equal, also by file or number.

    `flickr8k` and `coco/annotations/captions_train.json` are `flickr8k` and `coco`.
    """
    short = [name_of(root) for root in roots]
    names = [
        name if short.count(name) == 1 else f"{name}_{Path(root).stem}" for name, root in zip(short, roots, strict=True)
    ]
    return [f"{name}_{n}" if name in names[:n] else name for n, name in enumerate(names)]


def name_of(root: str) -> str:
    """Return the name of the folder of a data set, which for a file is the one above `annotations`."""
    path = Path(root).resolve() if Path(root).exists() else Path(root)
    if path.is_file():
        path = path.parent
    return (path.parent if path.name == "annotations" else path).name or "data"


def read_sets(
    data: SourceConfig, split: str, roots: Sequence[str] | None = None, some: bool = False
) -> list["Dataset | None"]:
    """Read one split of each data set.

    Args:
        data: the settings of the data.
        split: name of the split.
        roots: the data sets; `None` for those of `data.root`.
        some: whether sets may lack the split, with a warning, if at least one set has it.

    Returns:
        A caption table for each data set; `None` for a set that lacks the split.

    Raises:
        SettingError: no data set is named.
        NoSplitError: a set lacks the split.
        ValueError: the data cannot be used, see `read_captions`.
        FileNotFoundError: a source or every image of it is missing.
    """
    roots = data.root if roots is None else roots
    if not roots:
        raise SettingError("no captions: name an annotation file, a folder or a hub id", "root")
    tables: list[Dataset | None] = []
    lacking: list[NoSplitError] = []
    for number, root in enumerate(roots):
        try:
            table = read_captions(
                root,
                split,
                images=value_of(data.images, number),
                restval=data.restval,
                on_bad=data.on_bad,
                image_column=data.image_column,
                caption_column=data.caption_column,
                id_column=data.id_column,
            )
        except NoSplitError as error:
            if not some:
                raise
            lacking.append(error)
            table = None
        tables.append(table)
    if len(lacking) == len(roots):
        raise lacking[0]
    for fact in lacking:
        logger.warning("%s; the split '%s' is read from the other data sets", fact, split)
    return tables


def value_of(values: Sequence[T], number: int) -> T | None:
    """Return the value of data set `number`, if `values` has one for all sets, one for each, or none."""
    if not values:
        return None
    return values[number if len(values) > 1 else 0]


def open_caches(
    folders: Sequence[Path],
    model: CaptionerModel,
    processor: CaptionerProcessor,
    grid: Grid | None = None,
    grids: Sequence[Grid] = (),
) -> list[TokenCache]:
    """Open token caches; for arguments and errors see `open_cache`."""
    return [cache for folder in folders if (cache := open_cache(folder, model, processor, grid, grids)) is not None]


def join_sets(tables: Sequence["Dataset"]) -> "Dataset":
    """Join the tables of several data sets into one. Ids become text if they are text in one of the sets."""
    import datasets

    if len(tables) == 1:
        return tables[0]
    if len({str(table.features["image_id"]) for table in tables}) > 1:
        tables = [table.cast_column("image_id", datasets.Value("string")) for table in tables]
    return datasets.concatenate_datasets(list(tables))


def read_bytes(image: dict) -> bytes | None:
    """Return an encoded image, or None where there is no such file."""
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        return Path(image["path"]).read_bytes()
    except OSError:
        return None


def distinct_rows(table: "Dataset") -> list[int]:
    """Return the rows of a table's images that one cache needs: of several rows with one name, the first.

    Raises:
        SettingError: different images have the same id and name.
    """
    first: dict[str, int] = {}
    for number, name in enumerate(image_names(table)):
        if first.setdefault(name, number) != number:
            one, other = table[first[name]]["image"], table[number]["image"]
            if one != other and (image_size(one) != image_size(other) or read_bytes(one) != read_bytes(other)):
                raise SettingError(
                    f"different images have the id and name '{name}' ('{one['path']}' and '{other['path']}'), so that "
                    "one token cache cannot hold both; each needs a cache in a folder of its own",
                    *("splits", "output", "tokens"),
                )
    return sorted(first.values())
