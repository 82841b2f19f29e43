"""The plots of the report page: histograms of scores, and scores with their confidence intervals.

The page's style sheet sets the colours by classes, so that a dark page can have others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from captioner.report.svg import drawing

BINS, MOST_BINS = 25, 60
"""Bars of a histogram, and most bars of one of whole numbers: a broken captioner writes captions of any length."""


class Range(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def histogram(series: Sequence[tuple[str, np.ndarray]], label: str, whole: bool = False, signed: bool = False) -> str:
    """Draw a histogram of one or more series in one plot; bars are shares of the values of their series.

    Args:
        series: name and values (N,) of each, at most three; NaN is left out. The first is drawn as bars, with classes
            `bar bar-0`, the others as outlines, with classes `line line-1` and `line line-2`.
        label: name of the values, for screen readers.
        whole: whether the values are whole numbers, each with its own bar.
        signed: whether the values are differences. 0 is marked, and bars have the class `less`, `even` or `more`.

    Returns:
        An `<svg>` element, or an empty string if there are no values.
    """
    finite = [(name, values[~np.isnan(values)].astype(np.float64)) for name, values in series]
    finite = [(name, values) for name, values in finite if len(values)]
    if not finite:
        return ""
    edges = _edges(np.concatenate([values for _, values in finite]), whole, signed)
    low, high = edges[0], edges[-1]
    with drawing(300, 150) as drawn:
        axes = drawn.figure.add_subplot()
        for place, (name, values) in enumerate(finite):
            # The first and the last bar also count the values beyond the axis, mostly half a percent at each end.
            counts, _ = np.histogram(np.clip(values, low, np.nextafter(high, low)), edges)
            shares = counts / len(values)
            if place:
                outline = axes.stairs(shares, edges, color=f"C{place}", linewidth=2, baseline=None)
                drawn.mark(outline, f"line line-{place}", name)
                continue
            bars = axes.bar(edges[:-1], shares, width=0.92 * np.diff(edges), align="edge")
            for number, (bar, share) in enumerate(zip(bars, shares, strict=True)):
                if not share:
                    bar.remove()
                    continue
                side = "less" if edges[number + 1] < 0 else "more" if edges[number] > 0 else "even"
                classes = f"bar {side}" if signed else "bar bar-0"
                drawn.mark(bar, classes, f"{_bin(edges, number, whole)}: {100 * share:.1f}%")
        if signed:
            drawn.mark(axes.axvline(0, linewidth=1, linestyle=(0, (3, 3))), "zero")
        axes.set(xlim=(low, high), ylim=(0, None))
        axes.grid(axis="x", visible=False)
        axes.locator_params(axis="x", nbins=6, integer=whole)
        axes.locator_params(axis="y", nbins=3)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value + 0.0:.4g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        spoken = "; ".join(_spoken(name, values) for name, values in finite)
        return drawn.svg(f"Histogram of {label}. {spoken}", "plot")


def intervals(rows: Sequence[tuple[str, Sequence[Range | None]]], label: str, signed: bool = False) -> str:
    """Draw values as dots on their confidence intervals, with a row for each name.

    Args:
        rows: name of each row and its values, one for each series; `None` if a series has no value. The marks of
            series n have the class `of-n`.
        label: name of the values, for screen readers.
        signed: whether the values are differences, with the class `of-gain`; 0 is then marked, in the middle.

    Returns:
        An `<svg>` element, or an empty string if there are no values.
    """
    ranges = [one for _, found in rows for one in found if one is not None]
    if not ranges:
        return ""
    count = max(len(found) for _, found in rows)
    with drawing(360, 36 + 30 * len(rows)) as drawn:
        axes = drawn.figure.add_subplot()
        for height, (_, found) in enumerate(rows):
            for place, one in enumerate(found):
                if one is None:
                    continue
                y = height + (place - (count - 1) / 2) * 0.34
                classes = "of-gain" if signed else f"of-{place}"
                (line,) = axes.plot([one.low, one.high], [y, y], linewidth=5, solid_capstyle="round", alpha=0.4)
                (dot,) = axes.plot(one.value, y, "o", markersize=7, markeredgewidth=0)
                about = f"{one.value:.4f}, {one.low:.4f} to {one.high:.4f}"
                drawn.mark(line, f"range {classes}", about)
                drawn.mark(dot, f"dot {classes}", about)
        if signed:
            drawn.mark(axes.axvline(0, linewidth=1, linestyle=(0, (3, 3)), zorder=0.5), "zero")
            reach = 1.08 * max(max(abs(one.low), abs(one.high)) for one in ranges) or 1.0
            axes.set_xlim(-reach, reach)
        else:
            axes.set_xlim(0, 1.04 * max(max(one.high for one in ranges), 1e-9))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value + 0.0:.4g}")
        return drawn.svg(label, "plot")


def _edges(values: np.ndarray, whole: bool, signed: bool) -> np.ndarray:
    """Return the edges of the bars; they cover all values but half a percent at each end."""
    low, high = (float(value) for value in np.quantile(values, [0.005, 0.995]))
    if whole:
        low = np.floor(low)
        return np.arange(low, np.clip(np.ceil(high), low + 1, low + MOST_BINS) + 2) - 0.5
    if signed:
        high = max(-low, high) or 1.0
        return np.linspace(-high, high, BINS + 1)
    return np.linspace(min(low, 0.0), max(high, min(low, 0.0) + 0.01), BINS + 1)


def _bin(edges: np.ndarray, number: int, whole: bool) -> str:
    return f"{edges[number] + 0.5:.0f}" if whole else f"{edges[number]:.3g} to {edges[number + 1]:.3g}"


def _spoken(name: str, values: np.ndarray) -> str:
    lower, middle, upper = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{name}: median {middle:.3g}, middle half {lower:.3g} to {upper:.3g}"
