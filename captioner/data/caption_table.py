"""The table of all caption readers: one row per image, with its captions and its image, which is not opened yet."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from captioner.data.image_finder import ImageFinder
from captioner.data.records import OnBad, ReadReport, Record, usable_records
from captioner.errors import MissingError, SettingError
from captioner.images.names import escape_name

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def one_line(caption: str) -> str:
    """Return a caption in which single spaces replace all white space."""
    return " ".join(caption.split())


def build_table(
    records: Iterable[Record], images: "Dataset | None", find: ImageFinder, on_bad: OnBad, name: str
) -> "Dataset":
    """Check the records, count the unusable ones, and build the table.

    Args:
        records: the records of a reader.
        images: encoded images without a path, in the column `image`; the `image` of a record is then its row there.
        find: finds image files by their names.
        on_bad: whether unusable records are left out or refused.
        name: name of the data in errors and warnings.

    Returns:
        A `datasets.Dataset` with the columns `image_id` (int, or str where one of them is text), `image` (path or
        bytes, not decoded), `captions` (list of str) and `split`.

    Raises:
        SettingError: a record cannot be used, and `on_bad` is `refuse`.
        FileNotFoundError: no image was found.
        ValueError: no image with a caption is left.
    """
    import datasets

    def locate(record: Record) -> Any:
        image = record.image
        if isinstance(image, str):
            path = find(image, record.split, record.beside)
            if path is None:
                return None
            str(path).encode()  # raises for a path that is not UTF-8, which Arrow could not hold
            return {"path": str(path), "bytes": None}
        return image if images is not None else None  # without a column of images, only a name can be an image

    report = ReadReport()
    table: dict[str, list] = {"image_id": [], "image": [], "captions": [], "split": []}
    for record, image, texts in usable_records(records, report, locate):
        table["image_id"].append(record.image_id)
        table["image"].append(image)
        table["captions"].append([one_line(text) for text in texts])
        table["split"].append(record.split)
    if report.problems():
        if on_bad == "refuse":
            raise SettingError(f"{name}: {report}", "on_bad")
        logger.warning("%s: %s", name, report)
    if not report.images:
        others = report.duplicate_ids or report.images_without_captions or report.images_in_several_splits
        if report.missing_images and not (others or report.images_named_not_in_utf_8):
            count, example = len(report.missing_images), report.missing_images[0]
            raise MissingError(
                f"{name}: none of the {count} images was found, such as '{escape_name(str(example))}'; "
                "give the folder that contains the images",
                "images",
            )
        raise ValueError(f"{name}: no captioned images{report.unusable()}")
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
