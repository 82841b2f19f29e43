"""BLEU-1..4 and ROUGE-L as pycocoevalcap computes them.

BLEU (Papineni et al., 2002) takes the closest reference length. ROUGE-L (Lin, 2004) has beta 1.2, and takes precision
and recall each from the reference where it is highest.

Letters: B captions, R references, P pairs of a caption and a reference, U distinct n-grams summed over images.
"""

from collections.abc import Sequence

import numpy as np

from captioner.metrics.ngrams import MAX_N, Counts, ReferenceIndex

BETA = 1.2
"""Weight of recall against precision in ROUGE-L."""

LONG = 1000
"""Words in a caption above which `rouge_l` turns the words of its references into bits, not those of the caption. Each
word takes as many bits as the text has words, which would fill the memory."""


def bleu_statistics(index: ReferenceIndex, images: np.ndarray, counts: Counts) -> np.ndarray:
    """Count the numbers from which BLEU is computed, for each caption.

    Args:
        index: the references.
        images: (B,) number of each caption's image.
        counts: n-grams of the B captions.

    Returns:
        (B, 10): matching n-grams for n = 1..4, all n-grams for n = 1..4, words, and words of the reference that is
        closest in length (the shorter one of two equally close). Sums over captions are the numbers of a corpus.
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
    big = length.max() + 1  # the minimum compares distances first, then lengths
    closest = np.minimum.reduceat(np.abs(length - np.repeat(counts.lengths, num)) * big + length, starts) % big
    return np.column_stack([matched, total, counts.lengths, closest]).astype(np.float64)


def bleu(statistics: np.ndarray) -> np.ndarray:
    """Compute BLEU-1..4 (..., 4) from statistics (..., 10) of one caption, or summed over many."""
    small, tiny = 1e-9, 1e-15  # as in pycocoevalcap, where a caption without a match scores nearly zero
    matched, total = statistics[..., :MAX_N], statistics[..., MAX_N : 2 * MAX_N]
    length, closest = statistics[..., -2], statistics[..., -1]
    precision = np.cumprod((matched + tiny) / (total + small), axis=-1) ** (1 / np.arange(1, MAX_N + 1))
    ratio = (length + tiny) / (closest + small)
    with np.errstate(under="ignore"):
        brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return precision * brevity[..., None]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Compute ROUGE-L of one tokenized caption, 0 to 1; single spaces separate the tokens."""
    tokens = prediction.split(" ")
    places = _places(tokens) if len(tokens) <= LONG else None
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        if places is not None:
            common = _longest_common_subsequence(places, len(tokens), others)
        else:  # the same with the two texts exchanged
            common = _longest_common_subsequence(_places(others), len(others), tokens)
        precision, recall = max(precision, common / len(tokens)), max(recall, common / len(others))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _places(tokens: list[str]) -> dict[str, int]:
    """Return the positions of each token, as bits."""
    places: dict[str, int] = {}
    for place, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << place
    return places


def _longest_common_subsequence(places: dict[str, int], length: int, others: list[str]) -> int:
    """Compute the length of the longest common subsequence by bit vectors, one word at a time (Hyyrö, 2004).

    Args:
        places: positions of each token of one sequence, as bits.
        length: length of that sequence.
        others: the other sequence.
    """
    everywhere = row = (1 << length) - 1
    for token in others:
        here = places.get(token)
        if here:
            step = row & here
            row = (row + step | row - step) & everywhere
    return length - row.bit_count()
