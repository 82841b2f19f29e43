"""Confidence intervals of scores, and tests of the difference of two systems, by resampling images.

For each sample, BLEU and METEOR are computed again from the counts of its images; other scores are means. The document
frequencies of CIDEr stay those of the whole set.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from captioner.errors import SettingError
from captioner.metrics.scores import Scores

Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]

_BLOCK = 200  # samples computed at once: 200 x 5,000 images take 8 MB


class Interval(NamedTuple):
    """A score with its bootstrap confidence interval."""

    score: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference in one score between two systems."""

    first: float
    second: float
    difference: float
    """second - first."""
    low: float
    high: float
    """Bootstrap interval of the difference."""
    p: float
    """p-value: the probability of a difference this large if, for each image, a coin decided which system wrote which
    of the two captions."""


def signed(value: float) -> str:
    """Format a difference with its sign; one that rounds to zero gets a plus."""
    return f"{round(value, 4) + 0.0:+.4f}"


def confidence(scores: Scores, samples: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
    """Compute bootstrap confidence intervals of the corpus scores (Efron, 1979; percentiles).

    Args:
        scores: the scores of one system.
        samples: number of times that the images are drawn, with replacement.
        level: share of the samples that lies inside the interval.
        seed: the same seed gives the same intervals.

    Returns:
        The interval of each score, by name; absent scores have none.

    Raises:
        ValueError: `level` is not between 0 and 1, or there are fewer than two samples.
    """
    _check(samples, level)
    generator = np.random.default_rng(seed)
    drawn = _resample(scores.corpus_of, len(scores.image_ids), samples, generator)
    return {
        name: Interval(score, *_percentiles(values, level))
        for name, values in drawn.items()
        if (score := scores.corpus[name]) is not None
    }


def paired_test(
    first: Scores, second: Scores, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """Compare two systems on the same images.

    The p-value comes from approximate randomisation (Noreen, 1989; Riezler and Maxwell, 2005), two-sided. The interval
    comes from a paired bootstrap.

    Args:
        first: the scores of one system.
        second: the scores of the other system, against the same references.
        samples: number of times that the images are drawn, and that their captions are swapped. The smallest p-value
            is 1 / (samples + 1).
        level: share of the samples that lies inside the interval.
        seed: the same seed gives the same result.

    Returns:
        The difference of each score that both systems have, by name.

    Raises:
        ValueError: the two were scored on different images, with different tokens or against different references.
    """
    _check(samples, level)
    if set(first.image_ids) != set(second.image_ids):
        apart = set(first.image_ids) ^ set(second.image_ids)
        raise ValueError(
            f"the two systems differ in {len(apart)} images, such as {next(iter(apart))!r}; score the same"
        )
    if first.tokenizer != second.tokenizer:
        raise ValueError("the two systems were tokenized differently; score both the same way")
    second = _in_order(second, first.image_ids)
    if first.references != second.references:
        raise ValueError("the two systems were scored against different references; score both against the same")
    names = [name for name in first.per_image if name in second.per_image]
    a, b = ({name: score for name, score in of.corpus.items() if score is not None} for of in (first, second))
    count, generator = len(first.image_ids), np.random.default_rng(seed)

    def gain(weights: np.ndarray) -> dict[str, np.ndarray]:
        one, two = first.corpus_of(weights), second.corpus_of(weights)
        return {name: two[name] - one[name] for name in names}

    drawn = _resample(gain, count, samples, generator)
    both = _joined(first, second, names)
    extreme = dict.fromkeys(names, 0)
    for start in range(0, samples, _BLOCK):
        swapped = generator.integers(0, 2, (min(_BLOCK, samples - start), count)).astype(np.float64)
        one = both.corpus_of(np.concatenate([1 - swapped, swapped], axis=1))
        two = both.corpus_of(np.concatenate([swapped, 1 - swapped], axis=1))
        for name in names:
            observed = abs(b[name] - a[name])
            extreme[name] += int(np.sum(np.abs(two[name] - one[name]) >= observed - 1e-12))
    return {
        name: Difference(
            a[name],
            b[name],
            b[name] - a[name],
            *_percentiles(drawn[name], level),
            (extreme[name] + 1) / (samples + 1),
        )
        for name in names
    }


def _check(samples: int, level: float) -> None:
    if samples < 2:
        raise SettingError(f"samples must be two or more, not {samples}", "samples")
    if not 0 < level < 1:
        raise SettingError(f"level must be between 0 and 1, such as 0.95, not {level}", "level")


def _resample(statistic: Statistic, count: int, samples: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Apply a statistic of image weights to bootstrap samples; returns (samples,) by name."""
    blocks = []
    for start in range(0, samples, _BLOCK):
        weights = generator.multinomial(count, np.full(count, 1 / count), min(_BLOCK, samples - start))
        blocks.append(statistic(weights.astype(np.float64)))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _in_order(scores: Scores, image_ids: list) -> Scores:
    """Return the same scores with the images in another order."""
    place = {image_id: number for number, image_id in enumerate(scores.image_ids)}
    order = [place[image_id] for image_id in image_ids]
    per_image = {name: values[order] for name, values in scores.per_image.items()}
    statistics = {name: rows[order] for name, rows in scores.statistics.items()}
    references = [scores.references[place] for place in order]
    return Scores(
        scores.corpus, per_image, list(image_ids), scores.tokenizer, statistics=statistics, references=references
    )


def _joined(first: Scores, second: Scores, names: list[str]) -> Scores:
    """Concatenate the images of both systems, so that weights choose which system's caption counts."""
    per_image = {name: np.concatenate([first.per_image[name], second.per_image[name]]) for name in names}
    statistics = {
        name: np.concatenate([rows, second.statistics[name]])
        for name, rows in first.statistics.items()
        if name in second.statistics
    }
    return Scores({}, per_image, first.image_ids + second.image_ids, first.tokenizer, statistics=statistics)
