"""Splits of captioned data: their names, and which records belong to one."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

from captioner.data.records import NO_SPLIT, OnBad, Record
from captioner.errors import SettingError

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
"""Splits in the names that most data sets give them."""

SPLIT_SETTINGS = ("split", "splits", "train_split", "val_split", "captions_split")
"""Settings that name a split, of which a job has some."""

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Names that mean the same split, in the order in which they are looked for."""


def split_names(split: str) -> tuple[str, ...]:
    """Return the names that a split may have, its own first."""
    return next(((split, *(n for n in names if n != split)) for names in ALIASES.values() if split in names), (split,))


def is_split_name(name: str) -> bool:
    """Tell whether a name is one of those that splits usually have."""
    return any(name in names for names in ALIASES.values())


def find_split(names: Iterable[str], split: str) -> str | None:
    """Return the one of the names of a data set's splits that means a split, or None: `validation` for `val`."""
    known: dict[str, str] = {}
    for name in names:
        if name == split:
            return name
        known.setdefault(name.lower(), name)
    return next((known[name] for name in split_names(split.lower()) if name in known), None)


def select_split(records: Iterable[Record], split: str, name: str, on_bad: OnBad = "skip") -> Iterator[Record]:
    """Yield the records of a split, and report how many name none.

    Where no record names a split, all are taken for `train`, so that no model is validated on the images it was
    trained on; the split `all` has them, too.

    Args:
        name: what errors and warnings call the data.

    Raises:
        SettingError: there are none, or some name none and `on_bad` is `refuse`.
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
        raise SettingError(f"{name} has no split '{split}'{found}", *SPLIT_SETTINGS)
    yield from (record for record in records if record.split == chosen)
    if counts[NO_SPLIT] and split != NO_SPLIT:
        fact = f"{name}: left out images that name no split: {counts[NO_SPLIT]}"
        if on_bad == "refuse":
            raise SettingError(fact, "on_bad")
        logger.warning(fact)
