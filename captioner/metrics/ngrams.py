"""Integer n-grams: the table BLEU, CIDEr-D and the SCST reward count with.

Letters: B captions, T words in all captions together, E distinct n-grams summed over captions, R references, U
distinct n-grams summed over images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

MAX_N = 4
"""Longest n-gram counted; both BLEU-4 and CIDEr-D go to four."""

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each n-gram stands in each caption; sorted by caption, then n-gram."""

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
    """Numbers for n-grams: a word by a dictionary, a longer one by the number of its beginning and its last word.

    N-grams never seen before get numbers from `size` up, which hold for one call only.
    """

    def __init__(self):
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
            learn: keep the numbers given to new n-grams.
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
        """Look up keys, giving unknown ones numbers from `size` up; return the numbers and the next free one."""
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
    """References of a set of images, arranged so that one search finds an n-gram in all references of its image.

    Args:
        counts: n-grams of the R references, image by image.
        image_of: (R,) ascending number of each reference's image.
        num_images: images in all.
        size: numbers given to n-grams so far.
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
        """Count the images each n-gram stands in: (size,) float64."""
        return np.bincount(self.keys % max(self.size, 1), minlength=self.size).astype(np.float64)

    def find(self, images: np.ndarray, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        """Find the n-grams of captions in their images' references.

        Args:
            images: (B,) number of each caption's image.
            counts: n-grams of the B captions.

        Returns:
            Indices into `counts` of the n-grams that stand in some reference, and for each its place in `keys`.
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
    """List the references of all images, image by image.

    Returns:
        (R,) number of each reference's image, and the R references.

    Raises:
        ValueError: no images, or an image without a list of references.
    """
    if not references:
        raise ValueError("no references; give at least one image with at least one caption")
    empty = [image for image, captions in references.items() if isinstance(captions, str) or not len(captions)]
    if empty:
        raise ValueError(f"{len(empty)} images have no list of references, such as {empty[0]!r}")
    images = np.repeat(np.arange(len(references)), [len(captions) for captions in references.values()])
    return images, [caption for captions in references.values() for caption in captions]
