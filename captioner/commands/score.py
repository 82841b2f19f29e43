"""`captioner score`: read results and annotations, print a table of scores, write scores and a report."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import tyro

from captioner.data.captions import ImageId, clean_text
from captioner.data.image_finder import ImageFinder
from captioner.errors import SettingError, check_seed
from captioner.metrics import KEYS, METRICS, match_ids, read_references, read_results
from captioner.metrics.compare import signed
from captioner.metrics.files import ReferenceSet
from captioner.metrics.java import spice_models
from captioner.metrics.matching import check_names, names_in_results
from captioner.metrics.systems import Evaluation, evaluate_systems
from captioner.runs.files import open_whole


@dataclass(frozen=True)
class ScoreConfig:
    """Score the captions of any system against references, or compare two systems."""

    files: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RESULTS [RESULTS_B] ANNOTATIONS")
    ] = ()
    """One or two results files (COCO results, a table, or the output of `captioner caption`), then the annotations
    (COCO's or Karpathy's JSON)."""
    split: str | None = None
    """Split of Karpathy's annotations; `None` for `test`."""
    output: Path | None = None
    """File for the scores; its ending gives the format: .json (everything) or .csv (one row per image)."""
    report: Path | None = None
    """HTML page to write, all in one file: scores, distributions, and captions beside their images."""
    images: Path | None = None
    """Folder of the images for the report, if they are not beside the annotations."""
    overwrite: bool = False
    """Replace files that exist."""
    partial: bool = False
    """Score only the images that both results and annotations have, and print how many are left out."""
    allow_empty: bool = False
    """Score an empty caption as zero instead of refusing it."""
    metrics: tuple[Literal["BLEU", "METEOR", "ROUGE-L", "CIDEr"], ...] = ("BLEU", "METEOR", "ROUGE-L", "CIDEr")
    """Scores to compute. METEOR needs Java; without Java it is left out with a note. For SPICE see `--spice`."""
    spice: Path | None = None
    """Folder with SPICE's models. Without it, SPICE is not computed."""
    train: Path | None = None
    """Annotations of the training set. The share of the captions that occur in it word for word is then printed."""
    samples: int = 1000
    """Number of bootstrap samples for the intervals, and of random swaps for the p-values."""
    level: float = 0.95
    """Confidence level of the intervals."""
    seed: int = 0
    """Seed of the bootstrap samples and the swaps."""
    java_timeout: float = 1800.0
    """Longest time in seconds that METEOR and SPICE may take, each."""


SETTINGS = ScoreConfig


def run(config: ScoreConfig) -> int:
    """Score, and return the exit code."""
    score_files(config)
    return 0


def score_files(config: ScoreConfig) -> Evaluation:
    """Run the scoring job: print the table, and write the files that the settings name.

    Raises:
        ValueError: a file has another format, or its ids or captions cannot be scored (see `captioner.metrics.score`).
        OSError: a file cannot be read or written.
    """
    check_seed(config)
    *paths, annotations = check_paths(config)
    references = read_references(annotations, config.split)
    results: dict[str, list[dict[str, Any]]] = {}
    names: dict[ImageId, ImageId] = {}
    for path, name in zip(paths, short_names(paths), strict=True):
        rows = read_results(path)
        results[name], note = match_ids(rows, references)
        if note:
            references.warnings.append(f"{name}: {note}")
        check_names(rows, results[name], references, path, config.partial)
        names = names or names_in_results(rows, results[name], references)
    if names:  # images get the names in the results
        references = references.renamed(names)
        for rows in results.values():
            for row in rows:
                row["image_id"] = names.get(row["image_id"], row["image_id"])
    images = find_images(references, annotations, config.images) if config.report else {}
    evaluation = evaluate_systems(
        results,
        references,
        training=read_training(config.train),
        samples=config.samples,
        level=config.level,
        seed=config.seed,
        partial=config.partial,
        allow_empty=config.allow_empty,
        metrics=(*config.metrics, "SPICE") if config.spice else config.metrics,
        spice_models=config.spice,
        java_timeout=config.java_timeout,
    )
    print(format_table(evaluation, annotations.name))
    if config.output:
        with open_whole(config.output) as file:
            WRITERS[config.output.suffix](evaluation, file)
        print(f"scores written to {config.output}")
    if config.report:
        from captioner.report import write_report

        with open_whole(config.report) as file:
            unreadable = write_report(file, evaluation, annotations.name, images)
        found = sum(image_id in images for image_id in evaluation.image_ids) - unreadable
        print(f"report written to {config.report}, with {found:,} images of {len(evaluation.image_ids):,}")
    return evaluation


def check_paths(config: ScoreConfig) -> tuple[Path, ...]:
    """Check the command line and return its files before anything is read.

    Raises:
        ValueError: too few or too many files, an unknown ending, an output that exists or is an input.
    """
    if not (config.metrics or config.spice):
        raise ValueError(f"no score to compute; name some of {', '.join(METRICS)} with --metrics")
    if config.spice:
        spice_models(config.spice)
    if config.images and not config.report:
        raise ValueError("--images are for the page of --report; name that too")
    if len(config.files) not in (2, 3):
        raise ValueError(f"name RESULTS [RESULTS_B] ANNOTATIONS, two files or three, not {len(config.files)}")
    for path in (*config.files, *([config.train] if config.train else [])):
        if not path.exists():
            raise FileNotFoundError(f"no file '{path}'")
        if path.is_dir():
            raise ValueError(f"'{path}' is a folder; name the file")
    for option, written, endings in (("output", config.output, WRITERS), ("report", config.report, (".html", ".htm"))):
        if written is None:
            continue
        if written.suffix not in endings:
            raise ValueError(f"--{option} '{written}' must end in {' or '.join(endings)}")
        if any(written.resolve() == other.resolve() for other in (*config.files, config.train) if other):
            raise ValueError(f"--{option} '{written}' is a file to read; name another")
        if written.is_dir():
            raise ValueError(f"--{option} '{written}' is a folder; name a file")
        if written.exists() and not config.overwrite:
            raise SettingError(f"'{written}' exists", "overwrite")
    return config.files


def short_names(paths: list[Path]) -> list[str]:
    """Return short names of files that differ from each other."""
    names = [clean_text(path.name) for path in paths]
    if len(set(names)) == len(names):
        return names
    names = [clean_text(f"{path.resolve().parent.name}/{path.name}") for path in paths]
    return names if len(set(names)) == len(names) else [f"{letter}: {n}" for letter, n in zip("AB", names, strict=True)]


def read_training(path: Path | None) -> list[str] | None:
    """Read the captions of a training set: a whole COCO file, or Karpathy's `train` and `restval`."""
    if path is None:
        return None
    references = read_references(path, restval=True, default_split="train")
    return [caption for group in references.captions.values() for caption in group]


def find_images(references: ReferenceSet, annotations: Path, folder: Path | None) -> dict[ImageId, Path]:
    """Find the image files of a report; missing ones are left out.

    Raises:
        FileNotFoundError: there is no such folder, or it contains none of the images.
        ValueError: the annotations do not name the files of their images.
    """
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no image folder at '{folder}'")
    find = ImageFinder(annotations.parent, folder)
    found = {image_id: find(name, references.split) for image_id, name in references.files.items()}
    images = {image_id: path for image_id, path in found.items() if path}
    if folder is not None and not found:
        raise ValueError(f"'{annotations}' does not name the files of its images, so that none is found in '{folder}'")
    if folder is not None and not images:
        name = next(iter(references.files.values()))
        raise FileNotFoundError(f"none of the {len(found):,} images, such as '{name}', is in '{folder}'")
    return images


def format_table(evaluation: Evaluation, annotations: str) -> str:
    """Return the table of scores and statistics, for a terminal."""
    systems, differences = evaluation.systems, evaluation.differences
    captions = f"{evaluation.references.captions / len(evaluation.image_ids):.1f} references each"
    lines = [f"{len(evaluation.image_ids):,} images of {annotations}, {captions}", ""]
    letters = ["A", "B"] if differences is not None else ["score"]
    if differences is not None:
        lines += [*(f"{letter}: {s.name}" for letter, s in zip(letters, systems, strict=True)), ""]
    percent = f"{100 * evaluation.level:g}% interval"
    head = ["", *(cell for letter in letters for cell in (letter, percent))]
    rows = [[*head, "B - A", percent, "p"] if differences is not None else head]
    for name in systems[0].scores.corpus:
        row = [name]
        for system in systems:
            found = system.intervals.get(name)
            row += [f"{found.score:.4f}", f"{found.low:.4f} to {found.high:.4f}"] if found else ["absent", ""]
        if differences is not None and name in differences:
            gain = differences[name]
            least = gain.p <= 1 / (evaluation.samples + 1)  # the smallest one that this number of samples allows
            row += [signed(gain.difference), f"{signed(gain.low)} to {signed(gain.high)}"]
            row.append(f"<= {gain.p:.3f}" if least else f"{gain.p:.3f}")
        rows.append(row)
    lines += [*_aligned(rows), ""]

    seen = any(system.statistics.seen_in_training is not None for system in systems)
    rows = [["captions", "words", "shortest to longest", "vocabulary", "distinct-1", "distinct-2", "different"]]
    if seen:
        rows[0].append("seen in training")
    for letter, system in zip(letters, systems, strict=True):
        words = system.statistics
        row = ["" if letter == "score" else letter, f"{words.mean_length:.1f}"]
        row += [f"{words.min_length} to {words.max_length}", f"{words.vocabulary:,}", f"{words.distinct_1:.3f}"]
        row += [f"{words.distinct_2:.3f}", f"{100 * words.unique:.1f}%"]
        if words.seen_in_training is not None:
            row.append(f"{100 * words.seen_in_training:.1f}%")
        rows.append(row)
    # Distinct-n depends on the number of captions, so that of the references is not comparable and not shown.
    others = evaluation.references
    length = f"{others.min_length} to {others.max_length}"
    rows.append(["references", f"{others.mean_length:.1f}", length, f"{others.vocabulary:,}"])
    lines += _aligned(rows)
    notes = {f"{name} absent: {why}": 0 for system in systems for name, why in system.scores.absent.items()}
    notes |= {f"warning: {text}": 0 for text in evaluation.warnings}
    return "\n".join([*lines, "", *notes] if notes else lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return the rows as lines with aligned columns: the first column to the left, the others to the right."""
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(max(map(len, rows)))]
    return [
        "  ".join(cell.ljust(widths[n]) if n == 0 else cell.rjust(widths[n]) for n, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def write_json(evaluation: Evaluation, file: IO[str]) -> None:
    """Write all scores as JSON."""
    json.dump(evaluation.to_dict(), file, ensure_ascii=False, indent=1, allow_nan=False)
    file.write("\n")


def write_csv(evaluation: Evaluation, file: IO[str]) -> None:
    """Write comma-separated rows: first those of the whole set (see the column `row`), then one for each image."""
    names = [name for name in KEYS if name in evaluation.systems[0].scores.corpus]
    writer = csv.writer(file)
    writer.writerow(["results", "row", "image_id", "caption", *names])
    for system in evaluation.systems:
        scores, intervals = system.scores, system.intervals
        writer.writerow([system.name, "corpus", "", "", *("" if scores[n] is None else scores[n] for n in names)])
        for bound in ("low", "high"):
            values = (getattr(intervals[name], bound) if name in intervals else "" for name in names)
            writer.writerow([system.name, bound, "", "", *values])
    differences = evaluation.differences or {}
    for name in ("difference", "low", "high", "p") if differences else ():
        values = (getattr(differences.get(key), name, "") for key in names)
        label = name if name in ("difference", "p") else f"difference {name}"
        writer.writerow(["second - first", label, "", "", *values])
    for system in evaluation.systems:
        for row in system.to_dict()["images"]:
            values = ("" if row.get(name) is None else row[name] for name in names)
            writer.writerow([system.name, "image", row["image_id"], row["caption"], *values])


WRITERS: dict[str, Callable[[Evaluation, IO[str]], None]] = {".json": write_json, ".csv": write_csv}
