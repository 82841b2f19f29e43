"""Explain the score of a caption: which of its n-grams occur in which references."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from captioner.metrics.ngrams import MAX_N


@dataclass(frozen=True)
class NGramMatch:
    """One n-gram of a caption, and the references that contain it."""

    ngram: tuple[str, ...]
    count: int
    """How often it occurs in the caption."""
    credited: int
    """How often BLEU counts it: at most as often as it occurs in any one reference."""
    references: tuple[int, ...]
    """Indices of the references that contain it; empty if none does."""


def matched_ngrams(prediction: str, references: Sequence[str], longest: int = MAX_N) -> list[NGramMatch]:
    """Match the n-grams of a tokenized caption with its references.

    Args:
        prediction: tokens joined by spaces.
        references: tokenized references.
        longest: words in the longest n-grams.

    Returns:
        The n-grams in the order in which they first occur in the caption, shorter ones before longer ones.
    """
    others = [_ngrams(reference, longest) for reference in references]
    matches = []
    for ngram, count in sorted(_ngrams(prediction, longest).items(), key=lambda item: len(item[0])):
        times = [counts[ngram] for counts in others]
        having = tuple(place for place, number in enumerate(times) if number)
        matches.append(NGramMatch(ngram, count, min(count, max(times, default=0)), having))
    return matches


def _ngrams(caption: str, longest: int) -> Counter:
    words = caption.split()
    return Counter(
        tuple(words[place : place + n]) for n in range(1, longest + 1) for place in range(len(words) - n + 1)
    )
