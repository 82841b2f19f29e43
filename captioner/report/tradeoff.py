"""Plot scores over their costs, with one line per encoder, as an SVG file."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from captioner.report.svg import COLOURS, drawing


@dataclass
class Point:
    """One way to encode images: its cost, and its score with a confidence interval."""

    series: str
    name: str
    cost: float
    score: float
    low: float
    high: float


def draw_tradeoff(points: Sequence[Point], cost: str, score: str) -> str:
    """Plot scores over costs, with costs on a logarithmic axis; a line joins the points of a series.

    Args:
        points: the points; those of one series have one colour.
        cost: label of the horizontal axis.
        score: label of the vertical axis.

    Returns:
        The content of an SVG file.

    Raises:
        ValueError: there are no points, or a cost is not positive.
    """
    from matplotlib.ticker import LogLocator  # see `drawing`

    if not points or min(point.cost for point in points) <= 0:
        raise ValueError("a trade-off needs points, with costs above 0")
    with drawing(640, 400) as drawn:
        axes = drawn.figure.add_subplot(xscale="log", xlabel=cost, ylabel=score)
        for number, series in enumerate(dict.fromkeys(point.series for point in points)):
            colour = COLOURS[number % len(COLOURS)]
            own = sorted((point for point in points if point.series == series), key=lambda point: point.cost)
            axes.plot([], [], "o-", color=colour, linewidth=2, markersize=8, markeredgewidth=0, label=series)
            (line,) = axes.plot([p.cost for p in own], [p.score for p in own], color=colour, linewidth=2)
            drawn.mark(line, "series", series)
            for p, after in zip_longest(own, own[1:]):
                axes.plot([p.cost, p.cost], [p.low, p.high], color=colour, linewidth=5, alpha=0.25)
                (dot,) = axes.plot(p.cost, p.score, "o", color=colour, markersize=8, markeredgewidth=0)
                about = f"{p.series} {p.name}: {p.score:.3f} ({p.low:.3f} to {p.high:.3f}) at {p.cost:.3g}"
                drawn.mark(dot, "point", about)
                offset = (8, -15) if after is not None and after.score > p.score else (8, 7)  # beside the line
                axes.annotate(p.name, (p.cost, p.score), offset, textcoords="offset points", color=colour)
        low, high = min(p.cost for p in points) / 1.25, max(p.cost for p in points) * 1.25
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(LogLocator(subs=_tick_steps(high / low)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.legend(loc="upper left")
        names = ", ".join(dict.fromkeys(point.series for point in points))
        return drawn.document(f"{score} over {cost}, for {names}")


def _tick_steps(reach: float) -> tuple[float, ...]:
    """Return the multiples of powers of ten that get a label; an axis from 1 to `reach` then has two to ten labels."""
    if reach > 2000:
        return (1,)
    return (1, 2, 5) if reach > 5 else (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
