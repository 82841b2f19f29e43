"""Scores of predicted labels, several for each image: average precision, precision, recall, calibration.

Letters: n images, K labels.
"""

from dataclasses import dataclass

import numpy as np

BINS = 15
"""Bins of equal width of the expected calibration error."""
LEAST = 0.05
"""Least probability that counts in the calibration error; most labels of an image are far below it."""


@dataclass(frozen=True)
class LabelScores:
    """Scores of the predicted labels of images, or of one label."""

    images: int
    """Images for which at least one label is known."""
    positives: int
    """Pairs of image and label that hold."""
    mean_ap: float
    """Mean over labels of the average precision; labels that no image has are left out."""
    micro_ap: float
    """Average precision of all pairs in one ranking."""
    precision: float
    """Share of the pairs predicted at the threshold that hold."""
    recall: float
    """Share of the pairs that hold which are predicted at the threshold."""
    calibration_error: float
    """Expected calibration error (Naeini et al., AAAI 2015) of the pairs with at least `LEAST` probability."""


def average_precision(scores: np.ndarray, holds: np.ndarray) -> float:
    """Return the average precision of a ranking by scores (n,): the mean precision at each pair that holds (n,), bool.

    Pairs of equal score are ranked together. NaN if none holds.
    """
    if not holds.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, holds = scores[order], holds[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each group of equal scores
    true = np.cumsum(holds)[last]
    gained = np.diff(true, prepend=0)
    return float((gained * true / (last + 1)).sum() / true[-1])


def calibration_error(probabilities: np.ndarray, shares: np.ndarray) -> float:
    """Return the expected calibration error of probabilities (n,) of events that hold in these shares (n,)."""
    counted = probabilities >= LEAST
    probabilities, shares = probabilities[counted], shares[counted]
    if not len(shares):
        return float("nan")
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, probabilities - shares, BINS)
    return float(np.abs(gaps).sum() / len(shares))


def score_labels(
    probabilities: np.ndarray, shares: np.ndarray, threshold: float, least_share: float = 0.4
) -> LabelScores:
    """Score predicted labels.

    Args:
        probabilities: predicted probabilities (n, K).
        shares: share of people who say that a label holds (n, K), 1 or 0 where it is known for certain; NaN where it is
            unknown, and such pairs are left out.
        threshold: least probability at which a label is predicted.
        least_share: least share at which a label holds.
    """
    known = ~np.isnan(shares)
    holds = np.where(known, shares, 0) >= least_share
    each = [average_precision(p[k], h[k]) for p, k, h in zip(probabilities.T, known.T, holds.T, strict=True)]
    predicted = (probabilities >= threshold) & known
    right = int((predicted & holds).sum())
    found = [value for value in each if not np.isnan(value)]
    return LabelScores(
        images=int(known.any(1).sum()),
        positives=int(holds.sum()),
        mean_ap=float(np.mean(found)) if found else float("nan"),
        micro_ap=average_precision(probabilities[known], holds[known]),
        precision=right / predicted.sum() if predicted.any() else float("nan"),
        recall=right / holds.sum() if holds.any() else float("nan"),
        calibration_error=calibration_error(probabilities[known], shares[known]),
    )
