"""One or two captioners measured on the same images: scores, how sure they are, what the captions are like."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from captioner.data.captions import ImageId
from captioner.errors import SettingError
from captioner.metrics.compare import Difference, Interval, confidence, paired_test
from captioner.metrics.files import ReferenceSet
from captioner.metrics.ptb.tokenizer import tokenize
from captioner.metrics.scores import Scores, describe_counts, score
from captioner.metrics.statistics import CaptionStatistics, caption_statistics


@dataclass(frozen=True)
class System:
    """What one captioner wrote and all that was measured of it."""

    name: str
    captions: dict[ImageId, Any]
    """Its captions as it wrote them, also of images that were not scored."""
    scores: Scores
    intervals: dict[str, Interval]
    statistics: CaptionStatistics

    def to_dict(self) -> dict:
        """Return plain values for JSON."""
        whole = {"results": self.name, **self.scores.to_dict()}
        for row in whole["images"]:
            row["caption"] = self.captions[row["image_id"]]
        confidence = {name: [interval.low, interval.high] for name, interval in self.intervals.items()}
        return whole | {"confidence": confidence, "statistics": asdict(self.statistics)}


@dataclass(frozen=True)
class Evaluation:
    """One or two systems, on the same images in the same order."""

    systems: tuple[System, ...]
    differences: dict[str, Difference] | None
    """What the second gains over the first, by score; None for one system."""
    references: CaptionStatistics
    """What the references of the scored images are like."""
    level: float
    """Share of samples inside the intervals."""
    samples: int
    """Bootstrap samples behind them."""

    @property
    def image_ids(self) -> list[ImageId]:
        """The images scored."""
        return self.systems[0].scores.image_ids

    @property
    def warnings(self) -> list[str]:
        """What makes the scores doubtful, each once; led by the name of the system if only one of two is meant."""
        shared = set.intersection(*(set(system.scores.warnings) for system in self.systems))
        return list(
            dict.fromkeys(
                text if text in shared else f"{system.name}: {text}"
                for system in self.systems
                for text in system.scores.warnings
            )
        )

    def to_dict(self) -> dict:
        """Return plain values for JSON: the system itself, or `systems` and their `differences`."""
        shared = {"references": asdict(self.references), "level": self.level, "samples": self.samples}
        if self.differences is None:
            return self.systems[0].to_dict() | shared
        differences = {name: difference._asdict() for name, difference in self.differences.items()}
        return {"systems": [system.to_dict() for system in self.systems], "differences": differences} | shared


def evaluate_systems(
    results: Mapping[str, Sequence[Mapping]],
    references: ReferenceSet,
    *,
    training: Iterable[str] | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    partial: bool = False,
    **options,
) -> Evaluation:
    """Score one system, or two against each other.

    Args:
        results: COCO results (see `read_results`) by the system's name; one or two.
        references: what they are scored against.
        training: plain captions of the training set, for the share that was copied from it.
        samples: bootstrap samples, and swaps of the paired test.
        level: share of samples inside an interval.
        seed: of both.
        partial: score the images that all sides have, and say so.
        **options: further options of `score`.

    Raises:
        ValueError: what `score` refuses, led by the system's name.
    """
    captions = {name: {row["image_id"]: row["caption"] for row in rows} for name, rows in results.items()}
    shared = set(references.captions)
    if partial and len(results) > 1:
        shared = shared & set.intersection(*(set(rows) for rows in captions.values()))
        if not shared:
            raise ValueError(f"no image with references has a caption of both {' and '.join(captions)}")
    known = None if training is None else set(tokenize(training))
    systems = []
    for name, rows in results.items():
        try:
            scores = score_shared(rows, references.captions, shared, partial=partial, **options)
        except ValueError as error:
            raise SettingError(f"'{name}': {error}", *getattr(error, "settings", ())) from None
        scores.warnings += references.warnings
        statistics = caption_statistics(scores.predictions, known, tokenized=True)
        systems.append(System(name, captions[name], scores, confidence(scores, samples, level, seed), statistics))
    others = [caption for group in systems[0].scores.references for caption in group]
    differences = None
    if len(systems) > 1:
        differences = paired_test(systems[0].scores, systems[1].scores, samples, level, seed)
    return Evaluation(tuple(systems), differences, caption_statistics(others, tokenized=True), level, samples)


def score_shared(
    rows: Sequence[Mapping], references: Mapping[ImageId, list[str]], shared: Collection[ImageId], **options
) -> Scores:
    """Score the rows of the images that all systems share; what that leaves out is counted as of this system alone."""
    if len(shared) == len(references):
        return score(rows, references, **options)
    scores = score(
        [row for row in rows if row["image_id"] in shared],
        {image_id: group for image_id, group in references.items() if image_id in shared},
        **options,
    )
    named = {row["image_id"] for row in rows}
    missing, extra = len(references.keys() - named), len(named - references.keys())
    scores.partial = {"scored": len(shared), "missing": missing, "extra": extra}
    if missing or extra:
        scores.warnings.insert(0, describe_counts(scores.partial))
    if lone := len((named & references.keys()) - set(shared)):
        scores.warnings.append(f"images that the other system has no caption for, left out: {lone}")
    return scores
