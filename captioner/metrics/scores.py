"""The usual caption scores, by image id: `score(predictions, references) -> Scores`.

BLEU-1..4, ROUGE-L and CIDEr (which is CIDEr-D) equal those of pycocoevalcap and need no Java. METEOR needs Java; SPICE
needs Java and its models, and is computed on request. Scores are fractions, not percent.
"""

import math
import os
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from captioner.errors import SettingError
from captioner.metrics import java, overlap
from captioner.metrics.cider import CiderD, DocumentFrequency
from captioner.metrics.explain import NGramMatch, matched_ngrams
from captioner.metrics.ngrams import NGrams, ReferenceIndex, flatten
from captioner.metrics.ptb.tokenizer import tokenize
from captioner.metrics.spaces import count_unsplit

KEYS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
"""Names of the scores, in the order in which papers print them."""

METRICS = ("BLEU", "METEOR", "ROUGE-L", "CIDEr")
"""The default metrics of `score`; `SPICE` may be added."""

PTB = "PTB (Python, the tokens of Stanford CoreNLP 3.4.1 as pycocoevalcap runs it)"
NO_TOKENIZER = "none (captions taken as tokens between spaces)"

Predictions = Mapping[Any, str] | Iterable[Mapping]
References = Mapping[Any, Sequence[str]]


@dataclass
class Scores:
    """Scores of one system on one set of images."""

    corpus: dict[str, float | None]
    """Score of the whole set, by name (see `KEYS`); None for a requested score that could not be computed."""
    per_image: dict[str, np.ndarray]
    """Score of each image (images,), by name, in the order of `image_ids`; NaN where there is none."""
    image_ids: list[Any]
    """Ids of the scored images, in the order of the references."""
    tokenizer: str
    """Name of the tokenizer that split the captions into words."""
    absent: dict[str, str] = field(default_factory=dict)
    """Reason why a score is None, by name."""
    warnings: list[str] = field(default_factory=list)
    """Facts that limit what the scores mean, or what they can be compared with."""
    partial: dict[str, int] | None = None
    """With `partial=True`, numbers of images: `scored`, `missing` (no prediction) and `extra` (no references)."""
    predictions: list[str] = field(default_factory=list, repr=False)
    """Tokenized predictions, in the order of `image_ids`."""
    references: list[list[str]] = field(default_factory=list, repr=False)
    """Tokenized references, in the order of `image_ids`."""
    statistics: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Rows of numbers whose sum over images gives a corpus score: `BLEU` (images, 10), `METEOR` (images, 23)."""

    def __getitem__(self, name: str) -> float | None:
        return self.corpus[name]

    def __str__(self) -> str:
        rows = [f"{name:<8}{'absent' if value is None else f'{value:.4f}'}" for name, value in self.corpus.items()]
        notes = [f"{name} absent: {reason}" for name, reason in self.absent.items()]
        notes += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*rows, f"{len(self.image_ids)} images, tokenizer: {self.tokenizer}", *notes])

    def image(self, image_id: Hashable) -> dict[str, float]:
        """Return the scores of one image, by name.

        Raises:
            ValueError: the image was not scored.
        """
        place = self._place(image_id)
        return {name: float(values[place]) for name, values in self.per_image.items()}

    def explain(self, image_id: Hashable) -> list[NGramMatch]:
        """Return which references contain each n-gram of an image's caption; raises ValueError as `image` does."""
        place = self._place(image_id)
        return matched_ngrams(self.predictions[place], self.references[place])

    def corpus_of(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Compute corpus scores in which each image counts as often as its weight.

        Args:
            weights: (..., images); at least one weight of a row is not zero.

        Returns:
            An array (...,) for each score that is not absent, by name.
        """
        results: dict[str, np.ndarray] = {}
        for name, values in self.per_image.items():
            if name == "BLEU-1":
                values = overlap.bleu(weights @ self.statistics["BLEU"])
                results |= {f"BLEU-{n + 1}": values[..., n] for n in range(4)}
            elif name == "METEOR":
                results[name] = java.meteor(weights @ self.statistics["METEOR"])
            elif not name.startswith("BLEU"):
                results[name] = weights @ np.nan_to_num(values) / (weights @ ~np.isnan(values))
        return results

    def to_dict(self) -> dict:
        """Return plain values for JSON: scores of the corpus and of each image, tokenizer, warnings."""
        images = [
            {"image_id": image_id, **{name: _plain(values[place]) for name, values in self.per_image.items()}}
            for place, image_id in enumerate(map(python_id, self.image_ids))
        ]
        return {
            "corpus": {name: None if value is None else _plain(value) for name, value in self.corpus.items()},
            "images": images,
            "tokenizer": self.tokenizer,
            "absent": self.absent,
            "warnings": self.warnings,
            "partial": self.partial,
        }

    def _place(self, image_id: Hashable) -> int:
        if image_id not in self.image_ids:
            raise ValueError(f"image id {image_id!r} was not scored")
        return self.image_ids.index(image_id)


def score(
    predictions: Predictions,
    references: References,
    *,
    metrics: Sequence[str] | str = METRICS,
    partial: bool = False,
    allow_empty: bool = False,
    tokenized: bool = False,
    document_frequency: DocumentFrequency | None = None,
    spice_models: str | os.PathLike | None = None,
    java_timeout: float = java.TIMEOUT,
) -> Scores:
    """Score captions against references.

    Args:
        predictions: one caption per image id; or COCO results, a list of `{"image_id": ..., "caption": ...}`.
        references: the references of each image id. Their order changes tokens only where pycocoevalcap's does, see
            `captioner.metrics.ptb.tokenizer`.
        metrics: any of `BLEU`, `METEOR`, `ROUGE-L`, `CIDEr`, `SPICE`.
        partial: whether to score only the images that both sides have; the numbers of the others are recorded.
        allow_empty: whether an empty prediction gets zeros instead of an error.
        tokenized: whether the captions are tokens already, joined by single spaces.
        document_frequency: n-gram statistics for CIDEr from another corpus; by default from `references`.
        spice_models: folder with SPICE's models, see `captioner.metrics.java.spice`.
        java_timeout: longest time in seconds that METEOR and SPICE may take, each.

    Raises:
        ValueError: an id is missing, extra or given twice, a caption is not text or is empty, or a metric is unknown.
    """
    if not 0 < java_timeout < math.inf:
        raise SettingError(f"java_timeout must be a positive number of seconds, not {java_timeout}", "java_timeout")
    metrics = (metrics,) if isinstance(metrics, str) else metrics
    unknown = [name for name in metrics if name not in (*METRICS, "SPICE")]
    if unknown:
        raise ValueError(f"no metric '{unknown[0]}'; choose from {', '.join((*METRICS, 'SPICE'))}")
    captions = _one_each(predictions)
    image_ids, counts = _common_ids(captions, references, partial)
    _check_text(captions, references, image_ids, allow_empty)
    sides = [captions[image_id] for image_id in image_ids], [list(references[image_id]) for image_id in image_ids]
    scores = Scores({}, {}, image_ids, NO_TOKENIZER if tokenized else PTB, partial=counts if partial else None)
    scores.predictions, scores.references = sides if tokenized else (tokenize(sides[0]), _tokenize_groups(sides[1]))

    if "BLEU" in metrics or "CIDEr" in metrics:
        _count_ngrams(scores, metrics, document_frequency)
    if "ROUGE-L" in metrics:
        pairs = zip(scores.predictions, scores.references, strict=True)
        scores.per_image["ROUGE-L"] = np.array([overlap.rouge_l(caption, others) for caption, others in pairs])
    if "METEOR" in metrics:
        try:
            rows = java.meteor_statistics(scores.predictions, scores.references, java_timeout)
            scores.statistics["METEOR"], scores.per_image["METEOR"] = rows, java.meteor(rows)
        except java.JavaError as error:
            scores.absent["METEOR"] = str(error)
    if "SPICE" in metrics:
        try:
            if spice_models is None:
                raise java.JavaError("spice_models must name the folder of its models; nothing is downloaded")
            found = java.spice(scores.predictions, scores.references, spice_models, java_timeout)
            if np.isnan(found).all():
                raise java.JavaError("the program gave no caption a score")
            scores.per_image["SPICE"] = found
        except java.JavaError as error:
            scores.absent["SPICE"] = str(error)

    scores.per_image = {name: scores.per_image[name] for name in KEYS if name in scores.per_image}
    corpus = scores.corpus_of(np.ones(len(image_ids)))
    named = [name for name in KEYS if name in corpus or name in scores.absent]
    scores.corpus = {name: float(corpus[name]) if name in corpus else None for name in named}
    scores.warnings = _limits(scores, captions, counts, document_frequency is None)
    if unsplit := count_unsplit([*scores.predictions, *(text for group in scores.references for text in group)]):
        scores.warnings.append(
            f"captions without spaces between words (as in Chinese, Japanese, Thai): {unsplit}; each counts as few "
            "words or one; put spaces between words first"
        )
    return scores


def _count_ngrams(scores: Scores, metrics: Sequence[str], document_frequency: DocumentFrequency | None) -> None:
    """Add BLEU and CIDEr to the scores; both count the same n-grams."""
    grams = document_frequency.grams.copy() if document_frequency else NGrams()
    image_of, references = flatten(dict(enumerate(scores.references)))
    counts = grams.count(references, learn=True)
    images = np.arange(len(scores.image_ids))
    index = ReferenceIndex(counts, image_of, len(images), grams.size)
    predicted = grams.count(scores.predictions)
    if "BLEU" in metrics:
        scores.statistics["BLEU"] = overlap.bleu_statistics(index, images, predicted)
        values = overlap.bleu(scores.statistics["BLEU"])
        scores.per_image |= {f"BLEU-{n + 1}": values[:, n] for n in range(4)}
    if "CIDEr" in metrics:
        scorer = CiderD.from_index(index, counts, document_frequency)
        scores.per_image["CIDEr"] = scorer.score_counts(images, predicted)


def _tokenize_groups(groups: list[list[str]]) -> list[list[str]]:
    tokens = iter(tokenize([caption for group in groups for caption in group]))
    return [[next(tokens) for _ in group] for group in groups]


def _one_each(predictions: Predictions) -> Mapping[Hashable, str]:
    """Return predictions as a mapping; COCO results become one.

    Raises:
        ValueError: a row lacks a key, or an id is unusable or given twice.
    """
    if isinstance(predictions, Mapping):
        return predictions
    if not isinstance(predictions, Iterable):
        raise ValueError(f"predictions must be a mapping or COCO results, not {type(predictions).__name__}")
    rows = list(predictions)
    bad = [row for row in rows if not isinstance(row, Mapping) or not {"image_id", "caption"} <= set(row)]
    if bad:
        raise ValueError(f"{len(bad)} results lack 'image_id' or 'caption', such as {str(bad[0])[:80]}")
    odd = [row["image_id"] for row in rows if not _is_hashable(row["image_id"])]
    if odd:
        raise ValueError(f"{name_ids(odd)} with an id that is neither a number nor text")
    times = Counter(row["image_id"] for row in rows)
    twice = [image_id for image_id, number in times.items() if number > 1]
    if twice:
        raise ValueError(f"{name_ids(twice)} predicted more than once; give one caption each")
    return {row["image_id"]: row["caption"] for row in rows}


def _common_ids(captions: Mapping, references: References, partial: bool) -> tuple[list[Any], dict[str, int]]:
    """Return the ids that both sides have, and the numbers of `Scores.partial`."""
    if not isinstance(references, Mapping):
        raise ValueError(f"references must be a mapping of image ids to captions, not {type(references).__name__}")
    missing = [image_id for image_id in references if image_id not in captions]
    extra = [image_id for image_id in captions if image_id not in references]
    if (missing or extra) and not partial:
        parts = []
        if missing:
            parts.append(f"{name_ids(missing)} without a prediction")
        if extra:
            parts.append(f"{name_ids(extra)} predicted but without references")
        ours, theirs = ({type(image_id).__name__ for image_id in ids} for ids in (captions, references))
        differ = ours and theirs and ours.isdisjoint(theirs)
        hint = f" (ids are {'/'.join(ours)} in the one, {'/'.join(theirs)} in the other)" if differ else ""
        raise SettingError(f"{'; '.join(parts)}{hint}", "partial")
    common = [image_id for image_id in references if image_id in captions]
    if not common:
        raise ValueError("no image id has both a prediction and references")
    return common, {"scored": len(common), "missing": len(missing), "extra": len(extra)}


def _check_text(captions: Mapping, references: References, image_ids: list[Any], allow_empty: bool) -> None:
    odd = [image_id for image_id in image_ids if not isinstance(captions[image_id], str)]
    if odd:
        what = repr(captions[odd[0]])[:60]
        raise ValueError(f"{name_ids(odd)} with a prediction that is no text but {what}")
    empty = [image_id for image_id in image_ids if not captions[image_id].strip()]
    if empty and not allow_empty:
        raise SettingError(f"{name_ids(empty)} with an empty prediction", "allow_empty")
    odd = [image_id for image_id in image_ids if not _is_group(references[image_id])]
    if odd:
        raise ValueError(f"{name_ids(odd)} without a list of references")
    odd = [image_id for image_id in image_ids if not all(isinstance(caption, str) for caption in references[image_id])]
    if odd:
        raise ValueError(f"{name_ids(odd)} with a reference that is no text")
    empty = [image_id for image_id in image_ids if not all(caption.strip() for caption in references[image_id])]
    if empty:
        raise ValueError(f"{name_ids(empty)} with an empty reference; remove it")


def _limits(scores: Scores, captions: Mapping, counts: dict[str, int], own_frequency: bool) -> list[str]:
    """Return the warnings of `Scores`: facts that limit what the scores mean."""
    limits = []
    if counts["missing"] or counts["extra"]:
        limits.append(describe_counts(counts))
    if len(scores.image_ids) == 1 and own_frequency and "CIDEr" in scores.corpus:
        limits.append("CIDEr of a single image is always 0: every n-gram stands in all documents, so none has weight")
    few = sum(len(others) < 5 for others in scores.references)
    if few:
        limits.append(f"images with fewer than five references: {few}; scores are not comparable with published ones")
    pairs = zip(scores.predictions, scores.references, strict=True)
    copied = sum(tokens in others for tokens, others in pairs)
    if copied > len(scores.predictions) / 2:
        limits.append(
            f"predictions equal to one of their own references: {copied}; the references may contain the predictions"
        )
    unscored = int(np.isnan(scores.per_image.get("SPICE", np.zeros(1))).sum())
    if unscored:
        limits.append(f"images that SPICE gave no score, left out of its mean: {unscored}")
    silent = sum(not tokens for tokens in scores.predictions)
    if silent:
        limits.append(f"predictions without words: {silent}")
    return limits


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return how many images a partial score covers and leaves out, as a line of text."""
    return "images scored: {scored}; without a prediction: {missing}; without references: {extra}".format(**counts)


def name_ids(image_ids: Iterable[Hashable], first: int = 3) -> str:
    """Return the number of images and the first few ids, for a message."""
    image_ids = list(image_ids)
    shown = [f"{image_id!r}"[:60] for image_id in image_ids[:first]]
    if len(image_ids) > first:
        shown.append("...")
    count = "1 image" if len(image_ids) == 1 else f"{len(image_ids)} images"
    return f"{count} ({', '.join(shown)})"


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_group(captions: Any) -> bool:
    return isinstance(captions, Collection) and not isinstance(captions, str | bytes) and len(captions) > 0


def python_id(image_id: Hashable) -> Hashable:
    """Return an id that is a number of numpy, or a tensor of one number, as one of Python; others are unchanged."""
    return image_id.item() if hasattr(image_id, "item") else image_id


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
