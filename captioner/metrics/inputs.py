"""Check the captions that are scored: one prediction for each image, references for each, and all of them text."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from captioner.errors import SettingError

Predictions = Mapping[Any, str] | Iterable[Mapping]
References = Mapping[Any, Sequence[str]]


def one_each(predictions: Predictions) -> Mapping[Hashable, str]:
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


def common_ids(captions: Mapping, references: References, partial: bool) -> tuple[list[Any], dict[str, int]]:
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


def check_text(captions: Mapping, references: References, image_ids: list[Any], allow_empty: bool) -> None:
    """Refuse predictions and references that are no text, or empty where that is not allowed.

    Raises:
        ValueError: there are such captions; the message names the first images.
    """
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
