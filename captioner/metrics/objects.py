"""Object scores: which objects captions name, and whether these are in the image.

CHAIR (Rohrbach et al., 2018) asks whether a named object is among the labels of the image or in its references. Object
recall asks which labelled objects are named. Two further scores need references alone: what several people name should
be named, and what nobody names is taken to be invented.

An object counts once in a caption, however often the caption names it; the authors' code of CHAIR counts each mention.

Letters: n images, K objects.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioner.data.captions import ImageId
from captioner.data.image_finder import portable_name
from captioner.data.label_files import ImageLabels, read_labels
from captioner.errors import SettingError, check_positive
from captioner.tags import TagVocabulary

COCO_WORDS = Path(__file__).with_name("coco_objects.json")
"""The phrases by which captions name the 80 object classes of COCO."""

COUNTS = (
    *("named", "hallucinated", "hallucinating", "labelled images", "labelled", "labelled and named"),
    *("agreed", "agreed and named", "named anywhere", "invented"),
)
"""The counts of an image. The first six are 0 for an image without labels."""

RATIOS = {
    "CHAIR-i": ("hallucinated", "named"),
    "CHAIR-s": ("hallucinating", "labelled images"),
    "object-recall": ("labelled and named", "labelled"),
    "objects-named": ("agreed and named", "agreed"),
    "objects-invented": ("invented", "named anywhere"),
}
"""For each object score, the counts of which it is the ratio."""

OF_LABELS = ("CHAIR-i", "CHAIR-s", "object-recall")
"""Object scores that need labels."""

PER_OBJECT = ("labelled", "labelled_named", "agreed", "agreed_named", "named", "invented")
"""Counts of each object; see `ObjectCounts`."""

LOWER_IS_BETTER = ("CHAIR-i", "CHAIR-s", "objects-invented")


@dataclass(frozen=True)
class ObjectConfig:
    """Scores of the objects that captions name: CHAIR and object recall, from labels or from the references alone."""

    labels: Path | None = None
    """Labels of the images: COCO's `instances_*.json`, or JSON with `classes` and, for each image's file name, the
    numbers of its classes. They give CHAIR-i, CHAIR-s and object-recall."""
    words: str | None = None
    """Phrases by which captions name the objects: `coco` for those of COCO's 80 classes, or a JSON file whose `words`
    map each object to its phrases. They give objects-named and objects-invented; with labels, `coco` is the default."""
    agreement: int = 3
    """Number of references that must name an object for objects-named to expect it."""
    leave_out: tuple[str, ...] = ()
    """Objects that are not counted, such as `person`."""

    def __post_init__(self) -> None:
        check_positive(self, "agreement")

    @property
    def wanted(self) -> bool:
        """Whether object scores are to be computed."""
        return self.labels is not None or self.words is not None

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others to the reason."""
        return {} if self.wanted else dict.fromkeys(("agreement", "leave_out"), "no object scores are computed")


@dataclass(frozen=True)
class Objects:
    """What object scores need to know.

    Attributes:
        vocabulary: the K objects, and the phrases by which captions name them.
        labels: numbers of the objects in each labelled image, by image id; `None` without labels.
        labelled: numbers of the objects that the labels can hold; others do not count in the scores of labels.
        agreement: number of references that must name an object for `objects-named` to expect it.
        left_out: numbers of the objects that are not counted.
        warnings: facts that limit what the scores mean.
    """

    vocabulary: TagVocabulary
    labels: Mapping[ImageId, AbstractSet[int]] | None = None
    labelled: frozenset[int] = frozenset()
    agreement: int = 3
    left_out: frozenset[int] = frozenset()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObjectCounts:
    """The objects of some captions, counted.

    Attributes:
        rows: the `COUNTS` of each image (n, 10); their sum over images gives the scores.
        per_object: for each object by name, numbers of images: `labelled`, and of those `labelled_named`; `agreed`
            (enough references name it), and of those `agreed_named`; `named` by the caption, and of those `invented`
            (no reference names it); and `recall`, the share of the labelled ones that are named. Objects that occur
            nowhere are left out.
        per_image: each score of each image (n,), by name; NaN where the image has nothing to count.
        absent: reason why a score cannot be computed, by name.
    """

    rows: np.ndarray
    per_object: dict[str, dict[str, int | float | None]]
    per_image: dict[str, np.ndarray]
    absent: dict[str, str]


def object_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the object scores from summed counts (..., 10); a score without anything to count is NaN."""
    with np.errstate(invalid="ignore"):
        parts = {name: [counts[..., COUNTS.index(part)] for part in ratio] for name, ratio in RATIOS.items()}
        return {name: top / bottom for name, (top, bottom) in parts.items()}


def count_objects(
    image_ids: Sequence[ImageId],
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    objects: Objects,
) -> ObjectCounts:
    """Count the objects in captions, in their references and in the labels.

    Args:
        image_ids: ids of the n images.
        captions: caption of each image, as plain text.
        references: references of each image, as plain text.
        objects: what to count.
    """
    find, names = objects.vocabulary.find, objects.vocabulary.names
    rows = np.zeros((len(image_ids), len(COUNTS)))
    tally = {key: Counter[int]() for key in PER_OBJECT}
    for row, image_id, caption, others in zip(rows, image_ids, captions, references, strict=True):
        named = set(find(caption)) - objects.left_out
        mentions = Counter(number for other in others for number in set(find(other)) - objects.left_out)
        agreed = {number for number, times in mentions.items() if times >= objects.agreement}
        row[6:] = len(agreed), len(agreed & named), len(named), len(named - mentions.keys())
        found: dict[str, AbstractSet[int]]
        found = {"agreed": agreed, "agreed_named": agreed & named, "named": named, "invented": named - mentions.keys()}
        if objects.labels is not None and image_id in objects.labels:
            there = objects.labels[image_id] - objects.left_out
            seen = named & objects.labelled
            wrong = seen - there - mentions.keys()
            row[:6] = len(seen), len(wrong), bool(wrong), 1, len(there), len(there & named)
            found |= {"labelled": there, "labelled_named": there & named}
        for key, numbers in found.items():
            tally[key].update(numbers)
    per_object: dict[str, dict[str, int | float | None]] = {}
    for number, name in enumerate(names):
        if any(tally[key][number] for key in PER_OBJECT):
            each = {key: tally[key][number] for key in PER_OBJECT}
            recall = each["labelled_named"] / each["labelled"] if each["labelled"] else None
            per_object[name] = {**each, "recall": recall}
    absent = find_absent(rows.sum(0), objects)
    wanted = [name for name in scores_of(objects) if name not in absent]
    scores = object_scores(rows)
    return ObjectCounts(rows, per_object, {name: scores[name] for name in wanted}, absent)


def scores_of(objects: Objects) -> list[str]:
    """Return the names of the object scores that are computed: without labels, those of references alone."""
    return [name for name in RATIOS if objects.labels is not None or name not in OF_LABELS]


def find_absent(total: np.ndarray, objects: Objects) -> dict[str, str]:
    """Return the reason why a score cannot be computed, by name, for summed counts (10,)."""
    reasons = {
        "CHAIR-i": "no caption of a labelled image names an object",
        "CHAIR-s": "no image has labels",
        "object-recall": "no labelled image has an object",
        "objects-named": f"no image has an object that {objects.agreement} of its references name",
        "objects-invented": "no caption names an object",
    }
    scores = object_scores(total)
    return {name: reasons[name] for name in scores_of(objects) if np.isnan(scores[name])}


def open_objects(config: ObjectConfig, files: Mapping[ImageId, str], required: bool = True) -> Objects | None:
    """Read the phrases and the labels of a configuration; returns None if it wants no object scores.

    Args:
        config: the settings.
        files: file name of each image, by image id.
        required: whether labels of none of the images are an error. Otherwise there are then no scores of labels, and a
            warning.

    Raises:
        ValueError: a file has another form, the labels have an object without phrases, no image is labelled, or two
            images with labels have one file name.
        OSError: a file cannot be read.
    """
    if not config.wanted:
        return None
    coco = config.words in (None, "coco")
    vocabulary = TagVocabulary.read(COCO_WORDS if config.words in (None, "coco") else config.words)
    numbers = {name.casefold(): number for number, name in enumerate(vocabulary.names)}
    unknown = [name for name in config.leave_out if name.casefold() not in numbers]
    if unknown:
        raise SettingError(f"no object is named '{unknown[0]}', so it cannot be left out", "leave_out")
    left_out = frozenset(numbers[name.casefold()] for name in config.leave_out)
    if config.labels is None:
        return Objects(vocabulary, agreement=config.agreement, left_out=left_out)
    content = read_labels(config.labels)
    strange = [name for name in content.classes if name.casefold() not in numbers]
    if strange:
        known = "the phrases of COCO's classes" if coco else f"'{config.words}'"
        raise SettingError(f"'{config.labels}' has the class '{strange[0]}', which is not in {known}", "words")
    classes = [numbers[name.casefold()] for name in content.classes]
    labels = match_labels(content, classes, files, config.labels)
    if not labels:
        example = f", such as '{next(iter(files.values()))}'" if files else ", whose files have no names"
        fact = f"'{config.labels}' has labels of none of the images{example}"
        if required:
            raise SettingError(fact, "labels")
        return Objects(vocabulary, agreement=config.agreement, left_out=left_out, warnings=(fact,))
    labelled = frozenset(classes)
    warnings = []
    if missing := len(files) - len(labels):
        warnings.append(f"images without labels, left out of {', '.join(OF_LABELS)}: {missing}")
    if others := [name for number, name in enumerate(vocabulary.names) if number not in labelled | left_out]:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        warnings.append(f"objects without labels, left out of {', '.join(OF_LABELS)}: {len(others)} ({shown})")
    return Objects(vocabulary, labels, labelled, config.agreement, left_out, tuple(warnings))


def match_labels(
    content: ImageLabels, classes: Sequence[int], files: Mapping[ImageId, str], path: Path
) -> dict[ImageId, frozenset[int]]:
    """Find the labels of images by the names of their files.

    Args:
        content: the label file.
        classes: number of each of its classes in the vocabulary.
        files: file name of each image, by image id.
        path: the label file's path, for the error.

    Returns:
        Numbers of the objects in each labelled image.

    Raises:
        ValueError: two images with labels have one file name.
    """
    found: dict[ImageId, frozenset[int]] = {}
    owner: dict[str, ImageId] = {}
    for image_id, file in files.items():
        name = portable_name(file).rpartition("/")[2]
        if name in content.images:
            if (other := owner.setdefault(name, image_id)) != image_id:
                raise ValueError(f"the images {other!r} and {image_id!r} are both named '{name}', as one in '{path}'")
            found[image_id] = frozenset(classes[number] for number in content.images[name])
    return found
