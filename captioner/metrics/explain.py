"""Why a caption scores as it does: which of its n-grams stand in which references."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from captioner.metrics.ngrams import MAX_N


@dataclass(frozen=True)
class NGramMatch:
    """One n-gram of a caption and the references that have it."""

    ngram: tuple[str, ...]
    count: int
    """Times it stands in the caption."""
    credited: int
    """Times BLEU counts it: no more often than the reference that has it most."""
    references: tuple[int, ...]
    """Which references have it, by place; empty where the caption says what nobody said."""


def matched_ngrams(prediction: str, references: Sequence[str], longest: int = MAX_N) -> list[NGramMatch]:
    """Match the n-grams of a tokenized caption, in the order they stand, shorter before longer.

    Args:
        prediction: tokens joined by spaces.
        references: tokenized references.
        longest: up to how many words.
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
