"""Measure one or two captioners on the same images: scores, confidence intervals, statistics of the captions."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from captioner.data.captions import ImageId
from captioner.errors import SettingError
from captioner.metrics.compare import Difference, Interval, confidence, paired_test
from captioner.metrics.files import ReferenceSet
from captioner.metrics.inputs import describe_counts
from captioner.metrics.ptb.tokenizer import tokenize
from captioner.metrics.scores import Scores, score
from captioner.metrics.statistics import CaptionStatistics, caption_statistics


@dataclass(frozen=True)
class System:
    """The captions of one captioner, and everything that was measured on them."""

    name: str
    captions: dict[ImageId, Any]
    """Its captions before tokenization, by image id; also those of images that were not scored."""
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
    """Differences between the second system and the first, by score; None for one system."""
    references: CaptionStatistics
    """Statistics of the references of the scored images."""
    level: float
    """Share of the bootstrap samples that lies inside the intervals."""
    samples: int
    """Number of bootstrap samples."""

    @property
    def image_ids(self) -> list[ImageId]:
        """Ids of the scored images."""
        return self.systems[0].scores.image_ids

    @property
    def warnings(self) -> list[str]:
        """Warnings of all systems, each once; one that concerns only one of two systems starts with its name."""
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
    **options: Any,
) -> Evaluation:
    """Score one system, or compare two.

    Args:
        results: COCO results (see `read_results`) of one or two systems, by name.
        references: the reference captions.
        training: captions of the training set, for the share of captions that occur there.
        samples: number of bootstrap samples, and of swaps in the paired test.
        level: share of the samples that lies inside an interval.
        seed: seed of samples and swaps.
        partial: whether to score only the images that all sides have; a warning states the numbers of the others.
        **options: further options of `score`.

    Raises:
        ValueError: `score` refuses the captions of a system; the message starts with its name.
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
    rows: Sequence[Mapping], references: Mapping[ImageId, list[str]], shared: Collection[ImageId], **options: Any
) -> Scores:
    """Score the images that all systems share; the warnings count the images that this system lacks or adds itself."""
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
