"""Statistics of captions: their length, their variety, and the share that occurs in the training set."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from captioner.metrics.ptb.tokenizer import tokenize


@dataclass(frozen=True)
class CaptionStatistics:
    """Statistics of tokenized captions (lower case, no punctuation)."""

    captions: int
    """Number of captions."""
    mean_length: float
    """Mean number of words in a caption."""
    std_length: float
    """Standard deviation of the number of words."""
    min_length: int
    """Words in the shortest caption."""
    max_length: int
    """Words in the longest caption."""
    vocabulary: int
    """Number of different words in all captions."""
    distinct_1: float
    """Share of different words among all words (Li et al., 2016)."""
    distinct_2: float
    """Share of different pairs of neighbouring words among all such pairs."""
    unique: float
    """Share of different captions among all captions."""
    seen_in_training: float | None
    """Share of captions that occur word for word in the training set; None if no training set was given."""


def caption_statistics(
    captions: Iterable[str], training: Iterable[str] | None = None, tokenized: bool = False
) -> CaptionStatistics:
    """Compute the statistics of captions.

    Args:
        captions: captions as plain text.
        training: captions of the training set, as plain text.
        tokenized: whether both are tokens already, joined by single spaces.

    Raises:
        ValueError: there are no captions.
    """
    tokens = list(captions) if tokenized else tokenize(captions)
    if not tokens:
        raise ValueError("no captions to describe")
    words = [caption.split() for caption in tokens]
    lengths = np.array([len(caption) for caption in words])
    pairs = [pair for caption in words for pair in pairwise(caption)]
    vocabulary = {word for caption in words for word in caption}
    seen = None
    if training is not None:
        known = set(training if tokenized else tokenize(training))
        seen = sum(caption in known for caption in tokens) / len(tokens)
    return CaptionStatistics(
        captions=len(tokens),
        mean_length=float(lengths.mean()),
        std_length=float(lengths.std()),
        min_length=int(lengths.min()),
        max_length=int(lengths.max()),
        vocabulary=len(vocabulary),
        distinct_1=len(vocabulary) / max(int(lengths.sum()), 1),
        distinct_2=len(set(pairs)) / max(len(pairs), 1),
        unique=len(set(tokens)) / len(tokens),
        seen_in_training=seen,
    )
