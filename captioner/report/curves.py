"""The curves of a run as one SVG file, drawn without a plotting library: they are a few polylines."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from captioner.runs.files import open_whole

PANELS = (("loss", ("loss", "loss_val")), ("CIDEr", ("CIDEr",)), ("reward", ("reward", "reward_greedy")))
"""Title of each panel and the fields of `log.jsonl` in it; panels without values are left out."""

WIDTH, HEIGHT, LEFT, TOP = 640, 200, 64, 34
"""Size in px of a panel, its left margin and its top margin."""

COLOURS = ("#1f6feb", "#d9480f")
STYLE = (
    "text{font:12px sans-serif;fill:#444}.title{font-weight:bold}.grid{stroke:#ddd}"
    "polyline{fill:none;stroke-width:1.5}svg{background:#fff}"
)


def write_curves(records: Sequence[dict], path: Path) -> None:
    """Draw the records of a run, each a dict with `step`, to an SVG file."""
    panels = []
    for title, names in PANELS:
        series = {name: [(r["step"], r[name]) for r in records if name in r] for name in names}
        series = {name: points for name, points in series.items() if len(points) > 1}
        if series:
            panels.append(draw_panel(title, series, len(panels) * HEIGHT))
    height = HEIGHT * max(1, len(panels))
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(panels)}</svg>\n'
    with open_whole(path) as file:
        file.write(svg)


def draw_panel(title: str, series: dict[str, list[tuple[int, float]]], offset: int) -> str:
    """Draw one panel, `offset` px from the top: lines over steps, round numbers beside grid lines."""
    values = np.array([value for points in series.values() for _, value in points])
    steps = np.array([step for points in series.values() for step, _ in points])
    low, high = widen(values.min(), values.max())
    first, last = widen(steps.min(), steps.max())
    bottom, right = HEIGHT - 26, WIDTH - 16

    def x(step: float) -> float:
        return LEFT + (right - LEFT) * (step - first) / (last - first)

    def y(value: float) -> float:
        return offset + bottom - (bottom - TOP) * (value - low) / (high - low)

    parts = [f'<text class="title" x="{LEFT}" y="{offset + 18}">{escape(title)}</text>']
    for tick in round_numbers(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in round_numbers(first, last):
        parts.append(f'<text x="{x(tick):.1f}" y="{offset + HEIGHT - 8}" text-anchor="middle">{tick:.6g}</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline stroke="{colour}" points="{line}"/>')
        place = right - 110 * (len(series) - number - 1)
        parts.append(
            f'<text x="{place}" y="{offset + 18}" text-anchor="end" style="fill:{colour}">{escape(name)}</text>'
        )
    return "".join(parts)


def widen(low: float, high: float) -> tuple[float, float]:
    """Return a range that is not empty."""
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def round_numbers(low: float, high: float) -> list[float]:
    """List the multiples of 1, 2 or 5 times a power of ten between two numbers: three to six of them."""
    power = 10 ** np.floor(np.log10((high - low) / 3))
    step = next(power * factor for factor in (5, 2, 1) if (high - low) / (power * factor) >= 2.5)
    count = int(np.floor((high - np.ceil(low / step) * step) / step + 1e-9)) + 1
    return [float((np.ceil(low / step) + n) * step) for n in range(count)]
