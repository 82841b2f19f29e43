"""Splits of captioned data: which records belong to one, and reading one as the settings have it."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.data.caption_table import NO_SPLIT, OnBad, Record

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


def keep_split(records: Iterable[Record], split: str, path: Path, on_bad: OnBad = "skip") -> Iterator[Record]:
    """Keep the records of a split, and say how many name none.

    Raises:
        ValueError: there are none, or some name none and `on_bad` is `refuse`.
    """
    splits: Counter[str] = Counter()
    for record in records:
        splits[record.split] += 1
        if record.split == split:
            yield record
    if split not in splits:
        named = set(splits) - {NO_SPLIT}
        found = f"; name one of {', '.join(sorted(named))}" if named else ": its rows have no column 'split'"
        raise ValueError(f"'{path}' has no split '{split}'{found}")
    if splits[NO_SPLIT] and split != NO_SPLIT:
        told = f"'{path}': left out images that name no split: {splits[NO_SPLIT]}"
        if on_bad == "refuse":
            raise ValueError(f"{told}; fix the data or pass --data.on-bad skip")
        logger.warning(told)
