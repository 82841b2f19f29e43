"""N-grams as integers: the tables in which BLEU, CIDEr-D and the SCST reward count.

Letters: B captions, T words in all captions together, E distinct n-grams summed over captions, R references, U
distinct n-grams summed over images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

MAX_N = 4
"""Longest n-gram that is counted; BLEU-4 and CIDEr-D both go up to four."""

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each n-gram occurs in each caption, sorted by caption, then by n-gram."""

    caption: np.ndarray
    """(E,) index of the caption."""
    gram: np.ndarray
    """(E,) the n-gram's number."""
    order: np.ndarray
    """(E,) n - 1."""
    count: np.ndarray
    """(E,) occurrences."""
    lengths: np.ndarray
    """(B,) words in each caption."""


class NGrams:
    """A table that gives each n-gram a number.

    A word has its number in a dictionary. A longer n-gram is looked up by the number of the n-gram without its last
    word, and the last word. N-grams that are not in the table get numbers from `size` up, which are valid within one
    call.
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        empty = np.empty(0, np.int64)
        self.keys = [empty] * MAX_N  # sorted, one array per order
        self.numbers = [empty] * MAX_N  # the n-gram's number for each key
        self.size = 0

    def copy(self) -> Self:
        """Return a table that can grow without changing this one."""
        other = type(self)()
        other.words, other.keys, other.numbers, other.size = dict(self.words), [*self.keys], [*self.numbers], self.size
        return other

    def count(self, captions: Sequence[str], learn: bool = False) -> Counts:
        """Count the n-grams of tokenized captions (words between white space).

        Args:
            captions: B captions.
            learn: whether new n-grams are added to the table.
        """
        split = [caption.split() for caption in captions]
        lengths = np.fromiter(map(len, split), np.int64, len(split))  # (B,)
        known = self.words if learn else {}
        words = np.empty(lengths.sum(), np.int64)  # (T,)
        place, get, first_new = 0, self.words.get, len(self.words)
        for line in split:
            for word in line:
                number = get(word)
                if number is None:
                    number = known.setdefault(word, len(known) if learn else first_new + len(known))
                words[place] = number
                place += 1
        owner = np.repeat(np.arange(len(split)), lengths)  # (T,)
        left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(words))  # (T,) words from here to the caption's end

        found, size = [], self.size
        prefix = np.zeros(len(words), np.int64)
        for order in range(MAX_N):
            here = np.flatnonzero(left > order)
            keys = (prefix[here] << _WORD_BITS) | words[here + order]
            numbers, size = self._number(order, keys, size, learn)
            prefix = np.zeros(len(words), np.int64)
            prefix[here] = numbers
            found.append((owner[here], numbers, np.full(len(here), order)))
        if learn:
            self.size = size
        caption, gram, orders = (np.concatenate(columns) for columns in zip(*found, strict=True))
        _, first, count = np.unique(caption * max(size, 1) + gram, return_index=True, return_counts=True)
        return Counts(caption[first], gram[first], orders[first], count, lengths)

    def _number(self, order: int, keys: np.ndarray, size: int, learn: bool) -> tuple[np.ndarray, int]:
        """Look up keys. Unknown ones get numbers from `size` up. Returns the numbers and the next free number."""
        table = self.keys[order]
        place = np.searchsorted(table, keys)
        place[place == len(table)] = 0
        known = table[place] == keys if len(table) else np.zeros(len(keys), bool)
        numbers = np.empty(len(keys), np.int64)
        numbers[known] = self.numbers[order][place[known]]
        new, which = np.unique(keys[~known], return_inverse=True)
        numbers[~known] = size + which
        if learn and len(new):
            merged = np.concatenate([table, new])
            ranks = np.argsort(merged, kind="stable")
            self.keys[order] = merged[ranks]
            self.numbers[order] = np.concatenate([self.numbers[order], size + np.arange(len(new))])[ranks]
        return numbers, size + len(new)


class ReferenceIndex:
    """The references of a set of images, arranged so that one search finds an n-gram in all references of an image.

    Args:
        counts: n-grams of the R references, ordered by image.
        image_of: (R,) number of each reference's image, ascending.
        num_images: number of images.
        size: number of n-grams in the table that counted the references.
    """

    def __init__(self, counts: Counts, image_of: np.ndarray, num_images: int, size: int):
        self.size = size
        self.first = np.searchsorted(image_of, np.arange(num_images))  # (images,) each image's first reference
        self.num = np.bincount(image_of, minlength=num_images)  # (images,)
        self.lengths = counts.lengths  # (R,)
        keys = image_of[counts.caption] * size + counts.gram  # (E,)
        ranks = np.argsort(keys, kind="stable")
        self.keys, starts = np.unique(keys[ranks], return_index=True)  # (U,)
        self.starts = np.append(starts, len(keys))  # (U + 1,) where each key's entries begin
        self.reference = counts.caption[ranks].astype(np.int32)  # (E,)
        self.count = counts.count[ranks].astype(np.int32)  # (E,)

    def document_counts(self) -> np.ndarray:
        """Count, for each n-gram, the images whose references contain it; returns (size,) float64."""
        return np.bincount(self.keys % max(self.size, 1), minlength=self.size).astype(np.float64)

    def find(self, images: np.ndarray, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        """Find the n-grams of captions in their images' references.

        Args:
            images: (B,) number of each caption's image.
            counts: n-grams of the B captions.

        Returns:
            Indices into `counts` of the n-grams that occur in a reference of their image, and the place of each in
            `keys`.
        """
        known = np.flatnonzero(counts.gram < self.size)
        keys = images[counts.caption[known]] * self.size + counts.gram[known]
        if not len(self.keys):
            return known[:0], known[:0]
        place = np.searchsorted(self.keys, keys)
        place[place == len(self.keys)] = 0
        hit = self.keys[place] == keys
        return known[hit], place[hit]


def flatten(references: Mapping[Any, Sequence[str]]) -> tuple[np.ndarray, list[str]]:
    """Put the references of all images into one list, ordered by image.

    Returns:
        (R,) number of each reference's image, and the R references.

    Raises:
        ValueError: there are no images, or one has no list of references.
    """
    if not references:
        raise ValueError("no references; give at least one image with at least one caption")
    empty = [image for image, captions in references.items() if isinstance(captions, str) or not len(captions)]
    if empty:
        raise ValueError(f"{len(empty)} images have no list of references, such as {empty[0]!r}")
    images = np.repeat(np.arange(len(references)), [len(captions) for captions in references.values()])
    return images, [caption for captions in references.values() for caption in captions]
