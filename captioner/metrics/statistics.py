"""What captions are like: how long, how varied, how much of it was copied from the training set."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from captioner.metrics.ptb.tokenizer import tokenize


@dataclass(frozen=True)
class CaptionStatistics:
    """Statistics over tokenized captions (lower case, no punctuation)."""

    captions: int
    mean_length: float
    """Words in a caption."""
    std_length: float
    min_length: int
    max_length: int
    vocabulary: int
    """Different words in all captions."""
    distinct_1: float
    """Different words as a share of all words (Li et al., 2016)."""
    distinct_2: float
    """Different pairs of neighbouring words as a share of all such pairs."""
    unique: float
    """Different captions as a share of all."""
    seen_in_training: float | None
    """Share of captions that stand word for word in the training set; None if none was given."""


def caption_statistics(
    captions: Iterable[str], training: Iterable[str] | None = None, tokenized: bool = False
) -> CaptionStatistics:
    """Describe captions.

    Args:
        captions: plain captions.
        training: plain captions of the training set.
        tokenized: both are tokens already, joined by single spaces.

    Raises:
        ValueError: no captions.
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
