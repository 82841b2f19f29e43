"""The object tags that a captioner names in images: which of them the decoder reads, and which are shown.

Letters: B images, M image tokens, D encoder width, C tags.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch

from captioner.errors import SettingError
from captioner.modeling import CaptionerModel


@dataclass
class ImageTag:
    """A tag of an image, and its probability."""

    tag: str
    probability: float


@dataclass(frozen=True)
class TagChoice:
    """Which tags of an image the decoder reads before its caption.

    Attributes:
        tags: the largest number of predicted tags, 0 for none; or names of tags, the same for every image; `None` for
            the model's own number.
        min_tag: least probability of a predicted tag; `None` for the model's own.
    """

    tags: int | tuple[str, ...] | None = None
    min_tag: float | None = None

    def check(self, model: CaptionerModel) -> list[int]:
        """Return the numbers of the tags that are named; none if tags are predicted.

        Raises:
            SettingError: the model has no tags, or no tag of a name.
        """
        names = self.tags if isinstance(self.tags, tuple) else ()
        if model.tags is None:
            if self.tags or self.min_tag is not None:
                raise SettingError("this captioner has no tags", *(["tags"] if self.tags else []), "min_tag")
            return []
        numbers = {name.casefold(): n for n, name in enumerate(model.tags.vocabulary.names)}
        if unknown := [name for name in names if name.casefold() not in numbers]:
            raise SettingError(f"this captioner has no tag '{unknown[0]}'", "tags")
        return [numbers[name.casefold()] for name in names]

    def choose(self, model: CaptionerModel, image_tokens: torch.Tensor) -> tuple[list[list[int]], list[list[ImageTag]]]:
        """Choose the tags of encoded images (B, M, D).

        Returns:
            For each image the numbers of the tags that the decoder reads, and the tags to show: the same ones, or those
            that are predicted where the decoder reads none.
        """
        named = self.check(model)
        if model.tags is None or model.config.blind:
            return [named for _ in image_tokens], [[] for _ in image_tokens]
        probabilities = model.predict_tags(image_tokens)  # (B, C)
        most = self.tags if isinstance(self.tags, int) else None
        shown = model.tags.pick(probabilities, self.min_tag, most or None)
        if isinstance(self.tags, tuple):
            shown = [named for _ in image_tokens]
        names = model.tags.vocabulary.names
        tags = [
            [ImageTag(names[number], round(float(row[number]), 4)) for number in numbers]
            for row, numbers in zip(probabilities.cpu(), shown, strict=True)
        ]
        return ([[] for _ in image_tokens] if self.tags == 0 else shown), tags

    def describe(self, model: CaptionerModel) -> dict[str, Any]:
        """Return all that the tags depend on beside the model, as values of types of JSON."""
        if model.tags is None:
            return {}
        tags = list(self.tags) if isinstance(self.tags, tuple) else self.tags
        own = model.tags
        return {
            "tags": own.max_tags if tags is None else tags,
            "min_tag": own.min_tag if self.min_tag is None else self.min_tag,
        }


def make_choice(tags: int | Sequence[str] | None = None, min_tag: float | None = None) -> TagChoice:
    """Check the options that choose tags.

    Raises:
        SettingError: an option has a wrong value.
    """
    if min_tag is not None and (math.isnan(min_tag) or not 0 <= min_tag <= 1):
        raise SettingError(f"min_tag is a probability between 0 and 1, not {min_tag}", "min_tag")
    if tags is None:
        return TagChoice(None, min_tag)
    if isinstance(tags, str):
        raise SettingError(f"tags are a number, or a list of names such as ['{tags}'], not a text", "tags")
    if isinstance(tags, Sequence):
        return TagChoice(tuple(map(str, tags)) or 0, min_tag)
    try:
        count = -1 if isinstance(tags, bool) else index(tags)
    except TypeError:
        count = -1
    if count < 0:
        raise SettingError(f"tags must be a whole number of at least 0, not {tags!r}", "tags")
    return TagChoice(count, min_tag)
