"""Splits of captioned data: their names, and the selection of the records of one split."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

from captioner.data.records import NO_SPLIT, OnBad, Record
from captioner.errors import SettingError

logger = logging.getLogger(__name__)


SPLITS = ("train", "val", "test")
"""Names of splits in most data sets."""

SPLIT_SETTINGS = ("split", "splits", "train_split", "val_split", "captions_split")
"""Settings that select a split; each job has some of them."""


class NoSplitError(SettingError):
    """Data have no split of this name."""

    def __init__(self, fact: str):
        super().__init__(fact, *SPLIT_SETTINGS)


ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Names that stand for the same split, in the order of the search."""


def split_names(split: str) -> tuple[str, ...]:
    """Return the names that a split may have; the given one is the first."""
    return next(((split, *(n for n in names if n != split)) for names in ALIASES.values() if split in names), (split,))


def is_split_name(name: str) -> bool:
    """Return whether a name is a usual name of a split."""
    return any(name in names for names in ALIASES.values())


def find_split(names: Iterable[str], split: str) -> str | None:
    """Return the name of a split in a data set, such as `validation` for `val`; None if there is no such split."""
    known: dict[str, str] = {}
    for name in names:
        if name == split:
            return name
        known.setdefault(name.lower(), name)
    return next((known[name] for name in split_names(split.lower()) if name in known), None)


def select_split(records: Iterable[Record], split: str, name: str, on_bad: OnBad = "skip") -> Iterator[Record]:
    """Yield the records of a split; a warning states the number of records without a split.

    If no record has a split, all of them belong to `train`, so that no model is validated on its training images. The
    split `all` has them, too.

    Args:
        records: the records.
        split: name of the split.
        name: name of the data in errors and warnings.
        on_bad: whether records without a split are left out or refused, if others have one.

    Raises:
        NoSplitError: there is no such split.
        SettingError: some records have no split and `on_bad` is `refuse`.
    """
    records = list(records)
    counts = Counter(record.split for record in records)
    named = counts.keys() - {NO_SPLIT}
    if records and not named and split == "train":
        for record in records:
            record.split = split
        yield from records
        return
    chosen = NO_SPLIT if split == NO_SPLIT else find_split(named, split)
    if records and chosen not in counts:
        found = (
            f"; name one of {', '.join(sorted(named))}"
            if named
            else ": its rows have no column 'split', so that all are 'train'"
        )
        raise NoSplitError(f"{name} has no split '{split}'{found}")
    yield from (record for record in records if record.split == chosen)
    if counts[NO_SPLIT] and split != NO_SPLIT:
        fact = f"{name}: left out images that name no split: {counts[NO_SPLIT]}"
        if on_bad == "refuse":
            raise SettingError(fact, "on_bad")
        logger.warning(fact)
