"""Ridge probes: what of an image's captions and labels a linear map reads off frozen features.

A ridge regression is fitted in closed form on some images and measured on others; its penalty is chosen by
cross-validation on the former. `regression.py` has the fit.

Letters: n images, F features, V targets (words or classes), S bootstrap samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from captioner.metrics.multilabel import average_precision
from captioner.pretraining.regression import TeacherRegression

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties from which the best is chosen, in units of a feature's variance, for each image of the fit."""
SAMPLES = 200
"""Bootstrap samples of an interval."""
WIDTH = 1.96
"""Standard deviations to each side of a figure in its 95% interval."""
BATCH = 512
"""Images of the fit that are added up at a time."""


class RidgeProbe:
    """A ridge regression from features to targets in [0, 1].

    Args:
        features: features of the images to fit on (n, F).
        targets: their targets (n, V).

    Attributes:
        penalty: the chosen penalty, see `PENALTIES`.
        explained: share of the targets' variance that is explained on images outside each fit of the cross-validation.
    """

    def __init__(self, features: torch.Tensor, targets: torch.Tensor):
        self.mean, self.std = features.mean(0), features.std(0, correction=0) + 1e-6
        rows, known = torch.arange(len(features)).split(BATCH), self.standardised(features)
        examples = ((part, known[part], targets[part]) for part in rows)
        fit = TeacherRegression(examples, known.shape[1], targets.shape[1], penalties=PENALTIES)
        self.weights, self.penalty, self.explained = (
            fit.weights[-1],
            fit.penalty,
            fit.explained,
        )  # the mean of the folds

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """Return features (n, F) in units of their standard deviation, and a last one that is 1."""
        return torch.cat([(features - self.mean) / self.std, torch.ones(len(features), 1)], 1)

    def predict(self, features: torch.Tensor) -> np.ndarray:
        """Predict the targets (n, V) of images from their features (n, F); they may lie outside [0, 1]."""
        return (self.standardised(features) @ self.weights).numpy()


@dataclass(frozen=True)
class Measured:
    """A figure with its bootstrap interval; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return the figure and the bounds for JSON, None in place of NaN."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if np.isnan(value) else value for name, value in values.items()}

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "absent"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Compute the average precision of each target (V,) from scores and what is true, both (n, V)."""
    return np.array([average_precision(s, t) for s, t in zip(scores.T, truth.T, strict=True)])


def mean_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Compute the mean average precision (mAP) over the targets that are true of an image; NaN if none is."""
    each = average_precisions(scores, truth)
    known = each[~np.isnan(each)]
    return float(known.mean()) if len(known) else float("nan")


def micro_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Compute the average precision of all pairs of an image and a target together."""
    return average_precision(scores.ravel(), truth.ravel())


def explained_variance(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Compute the share of the variance of all targets (n, V) that predictions explain (R^2)."""
    around = np.square(targets - targets.mean(0)).sum()
    return float(1 - np.square(targets - predicted).sum() / around) if around else float("nan")


def measure(
    figure: Callable[[np.ndarray, np.ndarray], float], predicted: np.ndarray, truth: np.ndarray, seed: int = 0
) -> Measured:
    """Compute a figure and its 95% interval, from its standard deviation when the images are drawn with replacement.

    Percentiles of the draws would lie too high: images that are drawn twice raise the average precision.

    Args:
        figure: computes it from predictions and truth, both (n, V).
        predicted: predictions (n, V).
        truth: what they are compared with (n, V).
        seed: seed of the draws.
    """
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(truth), (SAMPLES, len(truth)))
    drawn = np.array([figure(predicted[rows], truth[rows]) for rows in draws])
    spread = WIDTH * float(drawn[~np.isnan(drawn)].std()) if not np.isnan(drawn).all() else float("nan")
    value = figure(predicted, truth)
    return Measured(value, value - spread, value + spread)


def probe_labels(
    fit: tuple[torch.Tensor, torch.Tensor], held_out: tuple[torch.Tensor, torch.Tensor], classes: Sequence[str]
) -> dict:
    """Probe features for the classes of images.

    Args:
        fit: features (n, F) of the images to fit on, and their targets (n, V): 1 for each class of the image, or 0.
        held_out: the same of the images to measure on.
        classes: names of the V classes.

    Returns:
        `mAP` and `micro AP` as `Measured`, the `penalty`, numbers of images `fitted` and `measured`, and the average
        precision of each class that occurs in `held_out`, `per class`.
    """
    probe = RidgeProbe(*fit)
    scores, truth = probe.predict(held_out[0]), held_out[1].numpy() > 0
    each = average_precisions(scores, truth)
    return {
        "mAP": measure(mean_precision, scores, truth),
        "micro AP": measure(micro_precision, scores, truth),
        "penalty": probe.penalty,
        "fitted": len(fit[0]),
        "measured": len(truth),
        "per class": {name: float(value) for name, value in zip(classes, each, strict=True) if not np.isnan(value)},
    }


def probe_words(
    fit: tuple[torch.Tensor, torch.Tensor], held_out: tuple[torch.Tensor, torch.Tensor], words: Sequence[str]
) -> dict:
    """Probe features for the words of captions.

    Args:
        fit: features (n, F) of the images to fit on, and the share of their captions with each word (n, V).
        held_out: the same of the images to measure on.
        words: the V words.

    Returns:
        `R2` of the shares and `mAP` of the words that any caption has, as `Measured`; the `penalty`; numbers of images
        `fitted` and `measured`; and the `R2` and `AP` of each word that occurs in `held_out`, `per word`.
    """
    probe = RidgeProbe(*fit)
    scores, shares = probe.predict(held_out[0]), held_out[1].numpy()
    clipped, truth = scores.clip(0, 1), shares > 0
    each = average_precisions(scores, truth)
    per_word = {}
    for n, word in enumerate(words):
        if truth[:, n].any():
            r2 = explained_variance(clipped[:, [n]], shares[:, [n]])
            per_word[word] = {"R2": None if np.isnan(r2) else r2, "AP": float(each[n])}
    return {
        "R2": measure(explained_variance, clipped, shares),
        "mAP": measure(mean_precision, scores, truth),
        "penalty": probe.penalty,
        "fitted": len(fit[0]),
        "measured": len(shares),
        "per word": per_word,
    }
