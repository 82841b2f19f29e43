"""The curves of a training run, as one SVG file."""

from collections.abc import Sequence
from pathlib import Path

from captioner.report.svg import COLOURS, SOFT, drawing
from captioner.runs.files import open_whole

PANELS = (("Loss", ("loss", "loss_val")), ("CIDEr", ("CIDEr",)), ("Reward", ("reward", "reward_greedy")))
"""Title of each panel, and the fields of `log.jsonl` that it shows, with those of single data sets (`CIDEr/coco`).
Panels without values are left out."""


def write_curves(records: Sequence[dict], path: Path) -> None:
    """Plot the records of a run over its steps, as an SVG file.

    Args:
        records: lines of `log.jsonl`, each with `step` and some of the fields of `PANELS`. A field is drawn once it
            has two values.
        path: the SVG file, which is written completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    panels = []
    fields = dict.fromkeys(field for record in records for field in record)
    for title, roots in PANELS:
        names = [name for root in roots for name in (root, *(f for f in fields if f.startswith(f"{root}/")))]
        series = {name: [(r["step"], r[name]) for r in records if name in r] for name in names}
        series = {name: points for name, points in series.items() if len(points) > 1}
        if series:
            panels.append((title, series))
    with drawing(640, 40 + 180 * max(1, len(panels))) as drawn:
        axes = None
        for place, (title, series) in enumerate(panels):
            axes = drawn.figure.add_subplot(len(panels), 1, place + 1, sharex=axes)
            axes.set_title(title)
            for number, (name, points) in enumerate(series.items()):
                steps, values = zip(*points, strict=True)
                (line,) = axes.plot(steps, values, color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=name)
                drawn.mark(line, f"curve {name}", name)
            axes.locator_params(axis="y", nbins=5)
            axes.locator_params(axis="x", integer=True)
            axes.ticklabel_format(useOffset=False, style="plain")
            if len(series) > 1:
                axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series), borderpad=0)
        if axes is None:
            drawn.figure.text(0.5, 0.5, "no curve before the second record", color=SOFT, ha="center")
        else:
            axes.set_xlabel("step")
        with open_whole(path) as file:
            file.write(drawn.document("Curves of the training run: " + ", ".join(title for title, _ in panels)))
