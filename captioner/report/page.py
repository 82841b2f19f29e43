"""The page of `captioner score --report`: scores, distributions, and every caption beside its image.

The script of the page shows captions as text only, never as HTML (see `captioner.report.html`).

Images are small WebP files in blocks of `BLOCK`. The page decodes only the images that it shows: a page of 5,000
images has 24 MB.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import IO

import numpy as np

from captioner.images import ImageError, open_image
from captioner.metrics.compare import Difference, signed
from captioner.metrics.files import ImageId
from captioner.metrics.objects import LOWER_IS_BETTER
from captioner.metrics.statistics import CaptionStatistics
from captioner.metrics.systems import Evaluation
from captioner.report.html import data_block, figure, page_end, page_start, resource, section, table
from captioner.report.plots import Range, histogram, intervals
from captioner.report.thumbnails import thumbnail

SIDE, QUALITY, BLOCK = 160, 45, 250
"""Longer side of an image in pixels, its WebP quality, and the number of images in a block."""

PLOTTED = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
"""Scores with a histogram; for single images, BLEU-1 to 3 add little to BLEU-4."""

EVEN = 5e-5
"""Difference of two scores of one image up to which they count as equal; BLEU without a match is not exactly 0."""


def write_report(file: IO[str], evaluation: Evaluation, annotations: str, images: Mapping[ImageId, Path]) -> int:
    """Write the page.

    Args:
        file: a file that is open for text in UTF-8.
        evaluation: one or two systems.
        annotations: name of the annotation file.
        images: file of each image that has one, by image id.

    Returns:
        The number of images that could not be read; the page shows a blank in their place.

    Raises:
        OSError: the file cannot be written.
    """
    style, script = resource("page.css"), resource("page.js")
    names = ", ".join(system.name for system in evaluation.systems)
    parts = (_header(evaluation, annotations), _scores(evaluation), _distributions(evaluation), _statistics(evaluation))
    file.write(page_start(f"Caption scores: {names}", style, script))
    file.write("<main>\n" + "\n".join(parts) + f"\n{resource('page.html')}</main>\n")
    unreadable = 0
    blocks = range(0, len(evaluation.image_ids), BLOCK)
    with ThreadPoolExecutor() as pool:
        for number, start in enumerate(blocks):
            paths = [images.get(image_id) for image_id in evaluation.image_ids[start : start + BLOCK]]
            thumbnails = list(pool.map(_thumbnail, paths))
            unreadable += sum(path is not None and not data for path, data in zip(paths, thumbnails, strict=True))
            file.write(data_block(f"images-{number}", thumbnails))
    file.write(data_block("data", _data(evaluation, bool(images))))
    file.write(page_end(script))
    return unreadable


def _thumbnail(path: Path | None) -> str:
    """Return a thumbnail of an image; empty if there is no image or it cannot be read."""
    if path is None:
        return ""
    try:
        return thumbnail(open_image(path), SIDE, QUALITY)
    except ImageError:
        return ""


def _data(evaluation: Evaluation, images: bool) -> dict:
    """Return the data of the list of captions."""
    ids = evaluation.image_ids
    systems = [
        {
            "name": system.name,
            "captions": [system.captions[image_id] for image_id in ids],
            "tokens": system.scores.predictions,
            "scores": {
                name: [None if np.isnan(value) else round(float(value), 4) for value in values]
                for name, values in system.scores.per_image.items()
            },
        }
        for system in evaluation.systems
    ]
    references = evaluation.systems[0].scores.references
    # Numbers in JavaScript are exact only up to 2**53.
    ids = [image_id if isinstance(image_id, str) or abs(image_id) < 2**53 else str(image_id) for image_id in ids]
    return {"ids": ids, "systems": systems, "references": references, "block": BLOCK, "images": images}


def _header(evaluation: Evaluation, annotations: str) -> str:
    count = len(evaluation.image_ids)
    images = "1 image" if count == 1 else f"{count:,} images"
    each = evaluation.references.captions / count
    names = [_name(system.name, place, evaluation) for place, system in enumerate(evaluation.systems)]
    title = ' <span class="versus">against</span> '.join(names)
    notes = [f"{name} absent: {why}" for system in evaluation.systems for name, why in system.scores.absent.items()]
    items = "".join(f"<li>{escape(text)}</li>" for text in dict.fromkeys([*evaluation.warnings, *notes]))
    warnings = f'<ul class="warnings" aria-label="Warnings">{items}</ul>' if items else ""
    return (
        f'<header><p class="kicker">Caption scores</p><h1>{title}</h1>'
        f"<p>{images} of <b>{escape(annotations)}</b>, {each:.1f} references each.</p>"
        f"{warnings}</header>"
    )


def _name(name: str, place: int, evaluation: Evaluation) -> str:
    """Return a system's name; if there are two systems, after its letter."""
    letter = f'<b class="letter">{"AB"[place]}</b> ' if evaluation.differences is not None else ""
    return f'<span class="name name-{place}">{letter}{escape(name)}</span>'


def _scores(evaluation: Evaluation) -> str:
    """Return the section of the scores: a table, and plots of their intervals."""
    systems, gains = evaluation.systems, evaluation.differences
    percent = f"{100 * evaluation.level:g}% interval"
    heads = "".join(f'<th scope="col">{_name(s.name, n, evaluation)}</th>' for n, s in enumerate(systems))
    if gains is None:
        heads = '<th scope="col">Score</th>'
    heads += f'<th scope="col">{percent}</th>'
    if gains is not None:
        heads += f'<th scope="col">B - A</th><th scope="col">{percent}</th><th scope="col">Verdict</th>'
    rows = []
    for name in systems[0].scores.corpus:
        found = [system.intervals.get(name) for system in systems]
        cells = "".join(f'<td class="score">{one.score:.4f}</td>' if one else "<td>absent</td>" for one in found)
        lines = (
            f'<span class="value-{n}">{one.low:.4f} to {one.high:.4f}</span>' for n, one in enumerate(found) if one
        )
        cells += f'<td class="ranges">{"".join(lines)}</td>'
        if gains is not None and name in gains:
            gain = gains[name]
            cells += (
                f'<td class="score">{signed(gain.difference)}</td>'
                f'<td class="ranges"><span>{signed(gain.low)} to {signed(gain.high)}</span></td>'
                f"<td>{_verdict(name, gain, evaluation.level)}</td>"
            )
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    note = (
        f"Scores are fractions, not percent. Intervals come from {evaluation.samples:,} bootstrap samples of the images"
    )
    if gains is not None:
        note += f"; p from swapping the two systems' captions at random, {evaluation.samples:,} times"
    if lower := [name for name in LOWER_IS_BETTER if name in systems[0].scores.corpus]:
        note += f". Lower is better for {', '.join(lower)}"
    head = f'<thead><tr><th scope="col">Metric</th>{heads}</tr></thead>'
    content = table(head, rows, "scores") + f'<div class="intervals">{_intervals(evaluation, percent)}</div>'
    return section("scores", "Scores", f'<div class="with-{len(systems)}">{content}</div><p class="note">{note}.</p>')


def _intervals(evaluation: Evaluation, percent: str) -> str:
    """Return plots of the scores of all systems, and of the differences between two systems."""
    systems, gains = evaluation.systems, evaluation.differences or {}
    names = [name for name in systems[0].scores.corpus if any(name in system.intervals for system in systems)]
    found = {name: [system.intervals.get(name) for system in systems] for name in names}
    rows = [(name, [Range(*one) if one else None for one in found[name]]) for name in names]
    plots = figure("Scores", percent, intervals(rows, f"Scores with their {percent}s; the table has the values"))
    if gains:
        rows = [(name, [Range(gain.difference, gain.low, gain.high)]) for name, gain in gains.items()]
        label = f"Differences with their {percent}s; the table has the values"
        lower = [name for name in LOWER_IS_BETTER if name in gains]
        note = f"{percent}; right of 0, B is better" + (f", but left of 0 for {', '.join(lower)}" if lower else "")
        plots += figure("B - A", note, intervals(rows, label, signed=True))
    return plots


def _verdict(name: str, gain: Difference, level: float) -> str:
    if gain.p >= 1 - level:
        return f"no clear difference <small>p {gain.p:.3f}</small>"
    n = int((gain.difference > 0) != (name in LOWER_IS_BETTER))
    return f'<span class="name name-{n}"><b class="letter">{"AB"[n]}</b> better</span> <small>p {gain.p:.3f}</small>'


def _distributions(evaluation: Evaluation) -> str:
    """Return the section of histograms: scores of single images, and lengths of captions."""
    systems = evaluation.systems
    figures = []
    for name in PLOTTED:
        series = [(s.name, s.scores.per_image[name]) for s in systems if name in s.scores.per_image]
        if series and (drawn := histogram(series, f"{name} of single images")):
            figures.append(figure(name, _medians(series), drawn))
        if len(series) == 2:
            gain = series[1][1] - series[0][1]
            if drawn := histogram([("difference", gain)], f"difference in {name} of single images", signed=True):
                better = f"A better on {np.mean(gain < -EVEN):.0%}, B on {np.mean(gain > EVEN):.0%}"
                figures.append(figure(f"{name}, B - A", better, drawn))
    lengths = [(s.name, np.array([len(tokens.split()) for tokens in s.scores.predictions])) for s in systems]
    others = [len(caption.split()) for group in systems[0].scores.references for caption in group]
    series = [*lengths, ("references", np.array(others))]
    figures.append(figure("Words in a caption", _medians(series), histogram(series, "words in a caption", whole=True)))
    keys = "".join(f'<li class="key key-{n}">{escape(system.name)}</li>' for n, system in enumerate(systems))
    keys += f'<li class="key key-{len(systems)}">references</li>'
    note = '<p class="note">Each plot shows which share of the images has which value.</p>'
    plots = f'<div class="plots plots-{len(systems)}">{"".join(figures)}</div>'
    return section("spread", "Distributions", f'{note}<ul class="keys">{keys}</ul>{plots}')


def _medians(series: list[tuple[str, np.ndarray]]) -> str:
    return "median " + ", ".join(f"{np.nanmedian(values):.3f}".removesuffix(".000") for _, values in series)


def _statistics(evaluation: Evaluation) -> str:
    """Return the section of the captions' statistics."""
    columns: dict[str, Callable[[CaptionStatistics], str]] = {
        "Words": lambda s: f"{s.mean_length:.1f}",
        "Spread": lambda s: f"± {s.std_length:.1f}",
        "Shortest, longest": lambda s: f"{s.min_length}, {s.max_length}",
        "Vocabulary": lambda s: f"{s.vocabulary:,}",
    }
    shared = len(columns)  # the others depend on the number of captions, and there are more references than captions
    columns["Distinct-1"] = lambda s: f"{s.distinct_1:.3f}"
    columns["Distinct-2"] = lambda s: f"{s.distinct_2:.3f}"
    columns["Different captions"] = lambda s: f"{s.unique:.1%}"
    if any(system.statistics.seen_in_training is not None for system in evaluation.systems):
        columns["Seen in training"] = lambda s: f"{s.seen_in_training:.1%}"

    def row(name: str, found: CaptionStatistics, count: int) -> str:
        cells = [f"<td>{column(found)}</td>" if n < count else "<td></td>" for n, column in enumerate(columns.values())]
        return f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'

    systems = enumerate(evaluation.systems)
    rows = [row(_name(s.name, n, evaluation), s.statistics, len(columns)) for n, s in systems]
    rows.append(row("references", evaluation.references, shared))
    heads = "".join(f'<th scope="col">{name}</th>' for name in columns)
    head = f'<thead><tr><th scope="col">Captions</th>{heads}</tr></thead>'
    return section("words", "Length and variety of the captions", table(head, rows, "words"))
