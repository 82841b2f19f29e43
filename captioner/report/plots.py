"""Small plots as inline SVG: no library, no script, colours from the page's style (so dark pages work too)."""

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, BASE = 300, 130, 6, 104
"""Drawing in px: its size, the margin to both sides, and where the x axis lies."""

BINS, MOST = 25, 60
"""Bars of a plot, and of one of whole numbers at most: a broken captioner writes captions of any length."""


def histogram(series: Sequence[tuple[str, np.ndarray]], label: str, whole: bool = False, signed: bool = False) -> str:
    """Draw how values are distributed, one or more series over each other, each as shares of its own values.

    Args:
        series: (name, values) each; NaN is left out. The first is filled, the others are lines. At most three.
        label: what the values are, for readers who hear the page.
        whole: values are whole numbers, a bar for each.
        signed: values lie on both sides of 0, which is marked.
    """
    kept = [(name, values[~np.isnan(values)].astype(np.float64)) for name, values in series]
    kept = [(name, values) for name, values in kept if len(values)]
    if not kept:
        return ""
    edges = _edges(np.concatenate([values for _, values in kept]), whole, signed)
    low, high, count = edges[0], edges[-1], len(edges) - 1
    # What lies beyond the axis, as a rule half a percent at most, is counted at its end.
    inside = [(name, values, np.clip(values, low, np.nextafter(high, low))) for name, values in kept]
    shares = [np.histogram(values, edges)[0] / len(values) for _, _, values in inside]
    tallest = max(float(share.max()) for share in shares)
    step = (WIDTH - 2 * LEFT) / count
    parts = []
    for place, ((name, _, _), share) in enumerate(zip(inside, shares, strict=True)):
        tops = BASE - (BASE - 8) * share / tallest
        if place == 0:
            for n, (top, part) in enumerate(zip(tops, share, strict=True)):
                about = f"{_bin(edges, n, whole)}: {100 * part:.1f}%"
                x, height = LEFT + n * step + 0.5, BASE - top
                kind = "bar" + (" less" if edges[n + 1] < 0 else " more" if edges[n] > 0 else " even") * signed
                bar = f'<rect class="{kind}" x="{x:.1f}" y="{top:.1f}" width="{step - 1:.1f}" height="{height:.1f}">'
                parts.append(f"{bar}<title>{escape(about)}</title></rect>" if part else "")
        else:
            path = f"M{LEFT} {BASE}" + "".join(f"V{top:.1f}h{step:.2f}" for top in tops) + f"V{BASE}"
            parts.append(f'<path class="line line-{place}" d="{path}"><title>{escape(name)}</title></path>')
    if signed:
        zero = LEFT + (WIDTH - 2 * LEFT) * (0 - low) / (high - low)
        parts.append(f'<path class="zero" d="M{zero:.1f} 4V{BASE}"/>')
    parts.append(f'<path class="axis" d="M{LEFT} {BASE}H{WIDTH - LEFT}"/>')
    for tick in _ticks(low, high, whole):
        x = LEFT + (WIDTH - 2 * LEFT) * (tick - low) / (high - low)
        anchor = "start" if x < 20 else "end" if x > WIDTH - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{BASE + 16}" text-anchor="{anchor}">{tick + 0.0:.4g}</text>')
    spoken = f"Histogram of {label}. " + "; ".join(_spoken(name, values) for name, values in kept)
    svg = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">'
    return svg + "".join(parts) + "</svg>"


def interval(value: float, low: float, high: float, least: float, most: float, kind: str, width: int = 140) -> str:
    """Draw a value as a dot in its confidence interval, on an axis from `least` to `most`, `width` px wide."""

    def x(number: float) -> float:
        return 4 + (width - 8) * (number - least) / (most - least)

    zero = f'<path class="zero" d="M{x(0):.1f} 2V18"/>' if least < 0 < most else ""
    axis, bar = (
        f'<path class="axis" d="M4 10H{width - 4}"/>',
        f'<path class="range" d="M{x(low):.1f} 10H{x(high):.1f}"/>',
    )
    dot = f'<circle cx="{x(value):.1f}" cy="10" r="4"/>'
    size = f'width="{width}" height="20" viewBox="0 0 {width} 20"'
    return f'<svg class="interval {kind}" {size} aria-hidden="true">{axis}{zero}{bar}{dot}</svg>'


def _edges(values: np.ndarray, whole: bool, signed: bool) -> np.ndarray:
    low, high = (float(value) for value in np.quantile(values, [0.005, 0.995]))
    if whole:
        low = np.floor(low)
        return np.arange(low, np.clip(np.ceil(high), low + 1, low + MOST) + 2) - 0.5
    if signed:
        high = max(-low, high) or 1.0
        return np.linspace(-high, high, BINS + 1)
    return np.linspace(min(low, 0.0), max(high, min(low, 0.0) + 0.01), BINS + 1)


def _ticks(low: float, high: float, whole: bool) -> np.ndarray:
    """Round numbers from `low` to `high`, three to six of them."""
    step = 10 ** np.floor(np.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 3 - 1e-9)
    step = max(step, 1.0) if whole else step
    return np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step


def _bin(edges: np.ndarray, number: int, whole: bool) -> str:
    return f"{edges[number] + 0.5:.0f}" if whole else f"{edges[number]:.3g} to {edges[number + 1]:.3g}"


def _spoken(name: str, values: np.ndarray) -> str:
    lower, middle, upper = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{name}: median {middle:.3g}, middle half {lower:.3g} to {upper:.3g}"
