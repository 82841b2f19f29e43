"""A plot of what a score costs: one line per encoder, drawn as an SVG file that needs nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BASE = 640, 400, 64, 24, 24, 340
"""Drawing in px: its size and where the axes lie."""

COLOURS = ("#0b6e8a", "#c2571a", "#5a7d2a", "#7a4aa0")


@dataclass
class Point:
    """One way to encode an image: its cost and its score with the ends of an interval."""

    series: str
    name: str
    cost: float
    score: float
    low: float
    high: float


def draw_tradeoff(points: Sequence[Point], cost: str, score: str) -> str:
    """Draw scores over costs, the costs on a logarithmic axis; points of a series are joined.

    Args:
        cost: label of the horizontal axis.
        score: label of the vertical axis.

    Raises:
        ValueError: there are no points, or a cost is not positive.
    """
    if not points or min(point.cost for point in points) <= 0:
        raise ValueError("a trade-off needs points, with costs above 0")
    left, right = math.log(min(p.cost for p in points) / 1.25), math.log(max(p.cost for p in points) * 1.25)
    bottom, top = min(p.low for p in points), max(p.high for p in points)
    margin = 0.08 * (top - bottom) or 0.1
    bottom, top = max(0.0, bottom - margin), top + margin

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(value) - left) / (right - left)

    def y(value: float) -> float:
        return BASE - (BASE - TOP) * (value - bottom) / (top - bottom)

    parts = [f'<path d="M{LEFT} {TOP}V{BASE}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>']
    for tick in cost_ticks(math.exp(left), math.exp(right)):
        parts.append(f'<text x="{x(tick):.1f}" y="{BASE + 18}" text-anchor="middle">{tick:g}</text>')
    for n in range(5):
        value = bottom + (top - bottom) * n / 4
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3f}</text>')
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        colour = COLOURS[number % len(COLOURS)]
        own = sorted((point for point in points if point.series == series), key=lambda point: point.cost)
        line = "L".join(f"{x(p.cost):.1f} {y(p.score):.1f}" for p in own)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for p in own:
            across, about = (
                x(p.cost),
                f"{p.series} {p.name}: {p.score:.3f} ({p.low:.3f} to {p.high:.3f}) at {p.cost:.3g}",
            )
            parts.append(f'<path d="M{across:.1f} {y(p.low):.1f}V{y(p.high):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{across:.1f}" cy="{y(p.score):.1f}" r="4" fill="{colour}">')
            parts.append(f"<title>{escape(about)}</title></circle>")
            parts.append(f'<text x="{across + 8:.1f}" y="{y(p.score) - 8:.1f}" fill="{colour}">{escape(p.name)}</text>')
        height = TOP + 16 * number
        parts.append(f'<text x="{LEFT + 12}" y="{height}" fill="{colour}" font-weight="bold">{escape(series)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{escape(cost)}</text>')
    parts.append(
        f'<text transform="translate(14 {(TOP + BASE) / 2}) rotate(-90)" text-anchor="middle">{escape(score)}</text>'
    )
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#333"'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {style}>'
    return head + f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>' + "".join(parts) + "</svg>\n"


def cost_ticks(low: float, high: float) -> list[float]:
    """Return round numbers (1, 2, 5 times a power of ten) within an interval."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for p in powers for m in (1, 2, 5) if low <= (value := m * 10.0**p) <= high]
