"""BLEU-1..4 and ROUGE-L as pycocoevalcap computes them.

BLEU (Papineni et al., 2002) with the closest reference length; ROUGE-L (Lin, 2004) with beta 1.2, precision and
recall each taken from the reference where it is best. Letters: B captions, R references, P caption-reference pairs.
"""

from collections.abc import Sequence

import numpy as np

from captioner.metrics.ngrams import MAX_N, Counts, ReferenceIndex

BETA = 1.2
"""Weight of recall against precision in ROUGE-L."""

LONG = 1000
"""Words of a caption above which the words of its references are turned into bits: a word's take as many as there are
words, which would fill the memory."""


def bleu_statistics(index: ReferenceIndex, images: np.ndarray, counts: Counts) -> np.ndarray:
    """Count what BLEU is made of; sums over captions give the corpus.

    Args:
        index: the references.
        images: (B,) number of each caption's image.
        counts: n-grams of the B captions.

    Returns:
        (B, 10): n-grams that match for n = 1..4, n-grams there are for n = 1..4, words, words of the reference
        closest in length (the shorter of two equally close).
    """
    captions = len(images)
    entry, place = index.find(images, counts)
    most = np.maximum.reduceat(index.count, index.starts[:-1]) if len(index.keys) else index.count  # (U,)
    matched = np.bincount(
        counts.caption[entry] * MAX_N + counts.order[entry],
        weights=np.minimum(counts.count[entry], most[place]),
        minlength=captions * MAX_N,
    ).reshape(captions, MAX_N)
    total = np.maximum(counts.lengths[:, None] - np.arange(MAX_N), 0)  # (B, 4)

    num = index.num[images]
    starts = num.cumsum() - num
    reference = np.arange(num.sum()) + np.repeat(index.first[images] - starts, num)  # (P,)
    length = index.lengths[reference]
    big = length.max() + 1  # orders by distance first, by length second
    closest = np.minimum.reduceat(np.abs(length - np.repeat(counts.lengths, num)) * big + length, starts) % big
    return np.column_stack([matched, total, counts.lengths, closest]).astype(np.float64)


def bleu(statistics: np.ndarray) -> np.ndarray:
    """Turn statistics (..., 10), of one caption or summed over many, into BLEU-1..4 (..., 4)."""
    small, tiny = 1e-9, 1e-15  # pycocoevalcap's, so that no match scores nearly, not exactly, zero
    matched, total = statistics[..., :MAX_N], statistics[..., MAX_N : 2 * MAX_N]
    length, closest = statistics[..., -2], statistics[..., -1]
    precision = np.cumprod((matched + tiny) / (total + small), axis=-1) ** (1 / np.arange(1, MAX_N + 1))
    ratio = (length + tiny) / (closest + small)
    with np.errstate(under="ignore"):
        brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return precision * brevity[..., None]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of one tokenized caption, 0 to 1; tokens are what stands between single spaces."""
    tokens = prediction.split(" ")
    places = _places(tokens) if len(tokens) <= LONG else None
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        if places is not None:
            common = _longest_common_subsequence(places, len(tokens), others)
        else:  # the same the other way round: bits for the words of the shorter
            common = _longest_common_subsequence(_places(others), len(others), tokens)
        precision, recall = max(precision, common / len(tokens)), max(recall, common / len(others))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _places(tokens: list[str]) -> dict[str, int]:
    """Return the positions of each token as bits."""
    places: dict[str, int] = {}
    for place, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << place
    return places


def _longest_common_subsequence(places: dict[str, int], length: int, others: list[str]) -> int:
    """Length of the longest common subsequence, a word at a time by bit vectors (Hyyrö, 2004).

    Args:
        places: for each token of one sequence, its positions as bits.
        length: of that sequence.
        others: the other sequence.
    """
    everywhere = row = (1 << length) - 1
    for token in others:
        here = places.get(token)
        if here:
            step = row & here
            row = (row + step | row - step) & everywhere
    return length - row.bit_count()
