"""CIDEr-D, fast enough for each step of SCST: references are prepared once, and numpy scores whole batches.

CIDEr-D is what pycocoevalcap calls CIDEr (Vedantam et al., 2015, https://arxiv.org/abs/1411.5726, section "CIDEr-D"):
the mean over n = 1..4 of the tf-idf cosine between n-grams, clipped to the reference's counts, times a Gaussian of the
difference in length (sigma 6), averaged over the references, times 10.

Letters: B captions to score, R references in all, E distinct n-grams summed over captions, P pairs of a caption to
score and one of its references.
"""

import os
import zipfile
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from captioner.metrics.ngrams import MAX_N, Counts, NGrams, ReferenceIndex, flatten

SIGMA = 6.0
"""Width of the length penalty, in words."""

SCALE = 10.0
"""Factor that the mean cosine is multiplied by."""


class DocumentFrequency:
    """For each n-gram, the number of images whose references contain it.

    SCST takes these counts from the training split, so that a reward does not depend on the batch.

    Args:
        references: tokenized captions per image, as from `captioner.metrics.tokenize`.

    Raises:
        ValueError: there are no images, or one has no list of references.
    """

    def __init__(self, references: Mapping[Any, Sequence[str]]):
        self.grams = NGrams()
        image_of, captions = flatten(references)
        counts = self.grams.count(captions, learn=True)
        self.num_images = len(references)
        self.counts = ReferenceIndex(counts, image_of, self.num_images, self.grams.size).document_counts()  # (size,)

    @property
    def log_images(self) -> float:
        """Logarithm of the number of images: the weight of an n-gram that no reference contains."""
        return float(np.log(self.num_images))

    def save(self, path: str | os.PathLike) -> None:
        """Write the counts to an `.npz` file, without pickle."""
        grams = self.grams
        columns: dict[str, Any] = {f"keys{order}": grams.keys[order] for order in range(MAX_N)}
        columns |= {f"numbers{order}": grams.numbers[order] for order in range(MAX_N)}
        words = np.frombuffer("\n".join(grams.words).encode(), np.uint8)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, words=words, counts=self.counts, num_images=self.num_images, **columns)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read the counts that `save` wrote.

        Raises:
            ValueError: the file holds something else, or is damaged.
            OSError: the file does not exist or cannot be read.
        """
        try:
            return cls._load(path)
        except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError):
            raise ValueError(f"'{path}' holds no document frequencies; write it with DocumentFrequency.save") from None

    @classmethod
    def _load(cls, path: str | os.PathLike) -> Self:
        self = cls.__new__(cls)
        self.grams = NGrams()
        expected = {"words", "counts", "num_images", *(f"{c}{n}" for c in ("keys", "numbers") for n in range(MAX_N))}
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as columns:
            if set(columns) != expected:
                raise ValueError("other columns")
            words = columns["words"].tobytes().decode()
            self.grams.words = {word: number for number, word in enumerate(words.split("\n"))} if words else {}
            self.grams.keys = [columns[f"keys{order}"] for order in range(MAX_N)]
            self.grams.numbers = [columns[f"numbers{order}"] for order in range(MAX_N)]
            self.counts = columns["counts"]
            self.num_images = int(columns["num_images"])
        self.grams.size = len(self.counts)
        return self


class CiderD:
    """CIDEr-D against fixed references.

    Args:
        references: tokenized captions per image, as from `captioner.metrics.tokenize`.
        document_frequency: n-gram statistics of another corpus (the training split, for a reward); by default those
            of `references`, as in pycocoevalcap.

    Raises:
        ValueError: there are no images, or one has no list of references.
    """

    def __init__(self, references: Mapping[Any, Sequence[str]], document_frequency: DocumentFrequency | None = None):
        image_of, captions = flatten(references)
        self._images = {image: number for number, image in enumerate(references)}
        self._grams = document_frequency.grams.copy() if document_frequency else NGrams()
        counts = self._grams.count(captions, learn=True)
        index = ReferenceIndex(counts, image_of, len(references), self._grams.size)
        self._prepare(index, counts, document_frequency)

    @classmethod
    def from_index(
        cls, index: ReferenceIndex, counts: Counts, document_frequency: DocumentFrequency | None = None
    ) -> Self:
        """Build from references that are counted already. Images have numbers only, so use `score_counts`.

        Args:
            index: the references.
            counts: the counts from which `index` was built.
            document_frequency: statistics of another corpus; `counts` must then continue its table of n-grams.
        """
        self = cls.__new__(cls)
        self._prepare(index, counts, document_frequency)
        return self

    def _prepare(self, index: ReferenceIndex, counts: Counts, other: DocumentFrequency | None) -> None:
        self._index = index
        if other is None:
            frequency, self._log_images = index.document_counts(), float(np.log(len(index.num)))
        else:
            frequency, self._log_images = np.zeros(index.size), other.log_images
            frequency[: len(other.counts)] = other.counts
        self._idf = self._log_images - np.log(np.maximum(1.0, frequency))  # (size,)
        self._norms = _norms(counts, counts.count * self._idf[counts.gram], len(index.lengths))  # (R, 4)

    def score(self, image_ids: Sequence[Hashable], captions: Sequence[str]) -> np.ndarray:
        """Score captions, each against its image's references.

        Args:
            image_ids: the image of each caption; an image may occur several times, as with samples in SCST.
            captions: B tokenized captions.

        Returns:
            (B,) CIDEr-D, float64, 0 to 10.

        Raises:
            ValueError: an image has no references here, or the lists differ in length.
        """
        if len(image_ids) != len(captions):
            raise ValueError(f"{len(image_ids)} image ids for {len(captions)} captions; give one for each")
        unknown = [image for image in image_ids if image not in self._images]
        if unknown:
            raise ValueError(f"no references for {len(unknown)} image ids, such as {unknown[0]!r}")
        images = np.fromiter((self._images[image] for image in image_ids), np.int64, len(image_ids))  # (B,)
        return self.score_counts(images, self._grams.count(captions))

    def score_counts(self, images: np.ndarray, counts: Counts) -> np.ndarray:
        """Score captions whose n-grams are counted already.

        Args:
            images: (B,) number of each caption's image, in the order in which the references were given.
            counts: n-grams of the B captions.

        Returns:
            (B,) CIDEr-D, float64, 0 to 10.
        """
        index = self._index
        known = counts.gram < index.size
        idf = np.full(len(counts.gram), self._log_images)  # (E,)
        idf[known] = self._idf[counts.gram[known]]
        weights = counts.count * idf
        norms = _norms(counts, weights, len(images))  # (B, 4)

        # All pairs of a caption and a reference form one array, ordered by caption.
        num = index.num[images]  # (B,)
        first_pair = num.cumsum() - num  # (B,)
        caption_of = np.repeat(np.arange(len(images)), num)  # (P,)
        reference_of = np.arange(len(caption_of)) + np.repeat(index.first[images] - first_pair, num)  # (P,)

        entry, place = index.find(images, counts)
        times = index.starts[place + 1] - index.starts[place]  # number of references that contain the n-gram
        entry = np.repeat(entry, times)
        where = np.arange(len(entry)) + np.repeat(index.starts[place] - (times.cumsum() - times), times)
        theirs = index.count[where] * idf[entry]
        caption = counts.caption[entry]
        pair = first_pair[caption] + index.reference[where] - index.first[images[caption]]
        dot = np.bincount(
            pair * MAX_N + counts.order[entry],
            weights=np.minimum(weights[entry], theirs) * theirs,
            minlength=len(caption_of) * MAX_N,
        ).reshape(-1, MAX_N)  # (P, 4)

        scale = norms[caption_of] * self._norms[reference_of]  # (P, 4)
        cosine = np.divide(dot, scale, out=np.zeros_like(scale), where=scale > 0)
        # pycocoevalcap takes the number of bigrams as the length, so that captions of no word and one word are equal.
        delta = np.maximum(counts.lengths - 1, 0)[caption_of] - np.maximum(index.lengths - 1, 0)[reference_of]  # (P,)
        pairs = cosine.mean(axis=1) * np.exp(-(delta**2) / (2 * SIGMA**2))  # (P,)
        return SCALE * np.bincount(caption_of, weights=pairs, minlength=len(images)) / num  # (B,)


def _norms(counts: Counts, weights: np.ndarray, captions: int) -> np.ndarray:
    """Return the length of each caption's tf-idf vector for each order, (captions, 4)."""
    squares = np.bincount(counts.caption * MAX_N + counts.order, weights=weights**2, minlength=captions * MAX_N)
    return np.sqrt(squares).reshape(captions, MAX_N)
