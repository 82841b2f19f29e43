"""The page of `captioner score --report`: scores, distributions, and every caption beside its image.

Captions, file names and ids come from others. In HTML they are escaped; for the list of captions they lie in JSON
blocks in which no tag can begin, and the script shows them as text only. The page's content security policy allows this
one script, this one style and embedded images, so that nothing is ever loaded or run from elsewhere.

Images are small WebP files in blocks of `BLOCK`, read when the list comes to one of them: a page of 5,000 images is
20 MB, yet only those on show are decoded.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np

from captioner.images import ImageError, open_image
from captioner.metrics.compare import Difference, signed
from captioner.metrics.files import ImageId
from captioner.metrics.statistics import CaptionStatistics
from captioner.metrics.systems import Evaluation
from captioner.report.plots import histogram, interval

SIDE, QUALITY, BLOCK = 160, 45, 250
"""Longer side of an image in px, its WebP quality, and how many lie in one block."""

PLOTTED = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
"""Scores with a plot of their own: sentences' BLEU-1 to 3 say little beside BLEU-4."""

EVEN = 5e-5
"""Difference of two scores of one image below which they count as even; BLEU of no match is not exactly 0."""


def write_report(file: IO[str], evaluation: Evaluation, annotations: str, images: Mapping[ImageId, Path]) -> int:
    """Write the page.

    Args:
        file: open for text.
        evaluation: one or two systems.
        annotations: name of what they were scored against.
        images: file of each image that has one.

    Returns:
        How many images could not be read; they are left out.
    """
    folder = files("captioner.report")
    style, script, listing = (folder.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html"))
    names = ", ".join(system.name for system in evaluation.systems)
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    parts = (_header(evaluation, annotations), _scores(evaluation), _distributions(evaluation), _captions(evaluation))
    file.write(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(f'Caption scores: {names}')}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )
    file.write("<main>\n" + "\n".join(parts) + f"\n{listing}</main>\n")
    unreadable = 0
    blocks = range(0, len(evaluation.image_ids), BLOCK)
    with ThreadPoolExecutor() as pool:
        for number, start in enumerate(blocks):
            paths = [images.get(image_id) for image_id in evaluation.image_ids[start : start + BLOCK]]
            thumbnails = list(pool.map(_thumbnail, paths))
            unreadable += sum(path is not None and not data for path, data in zip(paths, thumbnails, strict=True))
            file.write(_block(f"images-{number}", thumbnails))
    file.write(_block("data", _data(evaluation, bool(images))))
    file.write(f"<script>{script}</script>\n</body>\n</html>\n")
    return unreadable


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _block(name: str, value: Any) -> str:
    """Embed JSON; without `<` in it, neither a tag nor a comment nor the block's end can stand in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _thumbnail(path: Path | None) -> str:
    """Encode an image anew, small and without metadata, as base64; empty if there is none that can be read."""
    if path is None:
        return ""
    try:
        image = open_image(path)
    except ImageError:
        return ""
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _data(evaluation: Evaluation, images: bool) -> dict:
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
    ids = [image_id if isinstance(image_id, str) or abs(image_id) < 2**53 else str(image_id) for image_id in ids]
    return {"ids": ids, "systems": systems, "references": references, "block": BLOCK, "images": images}


def _header(evaluation: Evaluation, annotations: str) -> str:
    count = len(evaluation.image_ids)
    each = evaluation.references.captions / count
    names = [_name(system.name, place, evaluation) for place, system in enumerate(evaluation.systems)]
    title = " <span class='versus'>against</span> ".join(names)
    notes = [f"{name} absent: {why}" for system in evaluation.systems for name, why in system.scores.absent.items()]
    notes = "".join(f"<li>{escape(text)}</li>" for text in dict.fromkeys([*evaluation.warnings, *notes]))
    warnings = f'<ul class="warnings" aria-label="Warnings">{notes}</ul>' if notes else ""
    return (
        f'<header><p class="kicker">Caption scores</p><h1>{title}</h1>'
        f"<p>{count:,} image{'s' * (count > 1)} of <b>{escape(annotations)}</b>, {each:.1f} references each.</p>"
        f"{warnings}</header>"
    )


def _name(name: str, place: int, evaluation: Evaluation) -> str:
    """Write a system's name, led by its letter where there are two."""
    letter = f'<b class="letter">{"AB"[place]}</b> ' if evaluation.differences is not None else ""
    return f'<span class="name name-{place}">{letter}{escape(name)}</span>'


def _scores(evaluation: Evaluation) -> str:
    systems, gains = evaluation.systems, evaluation.differences
    percent = f"{100 * evaluation.level:g}% interval"
    heads = "".join(f'<th scope="col">{_name(s.name, n, evaluation)}</th>' for n, s in enumerate(systems))
    if gains is None:
        heads = '<th scope="col">Score</th>'
    heads += f'<th scope="col">{percent}</th>'
    if gains is not None:
        heads += f'<th scope="col">B - A</th><th scope="col">{percent}</th><th scope="col">Verdict</th>'
    rows, width = [], 320 if gains is None else 100
    for name in systems[0].scores.corpus:
        found = [system.intervals.get(name) for system in systems]
        cells = "".join(f"<td class='score'>{one.score:.4f}</td>" if one else "<td>absent</td>" for one in found)
        most = max([1.0, *(one.high for one in found if one)])
        ranges = "".join(
            f"<div>{interval(*one, 0, most, f'of-{n}', width)}<span>{one.low:.4f} to {one.high:.4f}</span></div>"
            for n, one in enumerate(found)
            if one
        )
        cells += f'<td class="ranges">{ranges}</td>'
        if gains is not None and name in gains:
            gain = gains[name]
            reach = max(abs(gain.low), abs(gain.high), 1e-9)
            drawn = interval(gain.difference, gain.low, gain.high, -reach, reach, "of-gain", width)
            cells += (
                f"<td class='score'>{signed(gain.difference)}</td><td class='ranges'><div>{drawn}"
                f"<span>{signed(gain.low)} to {signed(gain.high)}</span></div></td>"
                f"<td>{_verdict(gain, evaluation.level)}</td>"
            )
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    note = "Fractions, not percent; intervals by bootstrap over images"
    note += ", p by swapping the two systems' captions at random" if gains is not None else ""
    note += f". {evaluation.samples:,} samples."
    head = f'<thead><tr><th scope="col">Metric</th>{heads}</tr></thead>'
    return _section("scores", "Scores", _table(head, rows, "scores") + f'<p class="note">{note}</p>')


def _verdict(gain: Difference, level: float) -> str:
    if gain.p >= 1 - level:
        return f"no clear difference <small>p {gain.p:.3f}</small>"
    n = int(gain.difference > 0)
    return f'<span class="name name-{n}"><b class="letter">{"AB"[n]}</b> better</span> <small>p {gain.p:.3f}</small>'


def _distributions(evaluation: Evaluation) -> str:
    systems = evaluation.systems
    figures = []
    for name in PLOTTED:
        series = [(s.name, s.scores.per_image[name]) for s in systems if name in s.scores.per_image]
        if series and (drawn := histogram(series, f"{name} of single images")):
            figures.append((name, drawn, _medians(series)))
        if len(series) == 2:
            gain = series[1][1] - series[0][1]
            if drawn := histogram([("difference", gain)], f"difference in {name} of single images", signed=True):
                better = f"A better on {np.mean(gain < -EVEN):.0%}, B on {np.mean(gain > EVEN):.0%}"
                figures.append((f"{name}, B - A", drawn, better))
    lengths = [(s.name, np.array([len(tokens.split()) for tokens in s.scores.predictions])) for s in systems]
    others = [len(caption.split()) for group in systems[0].scores.references for caption in group]
    series = [*lengths, ("references", np.array(others))]
    figures.append(("Words in a caption", histogram(series, "words in a caption", whole=True), _medians(series)))
    drawn = "".join(
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(text)}</span></figcaption>{plot}</figure>"
        for title, plot, text in figures
    )
    keys = "".join(f'<li class="key key-{n}">{escape(system.name)}</li>' for n, system in enumerate(systems))
    keys += f'<li class="key key-{len(systems)}">references</li>'
    note = '<p class="note">Of single images: how many have which score.</p>'
    plots = f'<div class="plots plots-{len(systems)}">{drawn}</div>'
    return _section("spread", "Distributions", f'{note}<ul class="keys">{keys}</ul>{plots}')


def _medians(series: list[tuple[str, np.ndarray]]) -> str:
    return "median " + ", ".join(f"{np.nanmedian(values):.3f}".removesuffix(".000") for _, values in series)


def _captions(evaluation: Evaluation) -> str:
    columns = {"Words": lambda s: f"{s.mean_length:.1f}", "Spread": lambda s: f"± {s.std_length:.1f}"}
    columns["Shortest, longest"] = lambda s: f"{s.min_length}, {s.max_length}"
    columns["Vocabulary"] = lambda s: f"{s.vocabulary:,}"
    shared = len(columns)
    columns["Distinct-1"], columns["Distinct-2"] = lambda s: f"{s.distinct_1:.3f}", lambda s: f"{s.distinct_2:.3f}"
    columns["Different captions"] = lambda s: f"{s.unique:.1%}"
    if any(system.statistics.seen_in_training is not None for system in evaluation.systems):
        columns["Seen in training"] = lambda s: f"{s.seen_in_training:.1%}"

    def row(name: str, found: CaptionStatistics, count: int) -> str:
        cells = [f"<td>{column(found)}</td>" if n < count else "<td></td>" for n, column in enumerate(columns.values())]
        return f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'

    systems = enumerate(evaluation.systems)
    rows = [row(_name(s.name, n, evaluation), s.statistics, len(columns)) for n, s in systems]
    rows.append(row("references", evaluation.references, shared))  # distinct-n depends on how many there are
    heads = "".join(f'<th scope="col">{name}</th>' for name in columns)
    head = f'<thead><tr><th scope="col">Captions</th>{heads}</tr></thead>'
    return _section("words", "What the captions are like", _table(head, rows, "words"))


def _section(name: str, title: str, content: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>'


def _table(head: str, rows: list[str], name: str) -> str:
    """Lay out a table that can be scrolled sideways, by keyboard too."""
    table = f'<table class="figures">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">{table}</div>'
