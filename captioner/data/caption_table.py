"""The table that every caption reader fills: one row an image, its captions cleaned, its image found but not opened."""

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
    """Return a caption with single spaces in place of all white space."""
    return " ".join(caption.split())


def build_table(
    records: Iterable[Record], images: "Dataset | None", find: ImageFinder, on_bad: OnBad, name: str
) -> "Dataset":
    """Check the records, count what is wrong, and build the table.

    Args:
        images: the images that have no path, encoded, in the column `image`; a record's `image` is its row there.
        find: finds the images that have a name.
        on_bad: whether what cannot be used is left out or refused.
        name: what errors and warnings call the data.

    Returns:
        A `datasets.Dataset` with the columns `image_id` (int, or str where one of them is text), `image` (path or
        bytes, not decoded), `captions` (list of str) and `split`.

    Raises:
        SettingError: something cannot be used, and `on_bad` is `refuse`.
        FileNotFoundError: not one image was found.
        ValueError: no image with a caption is left.
    """
    import datasets

    def locate(record: Record) -> Any:
        image = record.image
        if isinstance(image, str):
            path = find(image, record.split, record.beside)
            return {"path": str(path), "bytes": None} if path else None
        return image if images is not None else None  # without a column of images, only a name is one

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
        if report.missing_images and not others:
            count, example = len(report.missing_images), report.missing_images[0]
            raise MissingError(
                f"{name}: none of the {count} images was found, such as '{escape_name(str(example))}'; "
                "name the folder of the images",
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
