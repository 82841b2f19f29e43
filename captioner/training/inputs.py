"""What the decoder reads in paired training: image tokens or none, object tags or none, and sentences without images.

Letters: B images, N texts, M image tokens, D encoder width, T text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from captioner.data.stream import SeededStream
from captioner.labels import IGNORED, put_before
from captioner.modeling import CaptionerModel
from captioner.training.config import InputConfig
from captioner.training.text import TagWords, TextStream

TEXT = ("input_ids", "attention_mask", "labels")
"""Names of the tensors of labelled texts (N, T)."""


class ReadImages(NamedTuple):
    """What the decoder reads of B images."""

    image_tokens: torch.Tensor
    """Image tokens (B + 1, M, D), of which the last are those of a blank image."""
    owners: torch.Tensor
    """The number in them of what is read for each image (B,): its own, or that of the blank image."""
    tags: list[list[int]]
    """Numbers of the tags of each image that are read."""


class PairedInputs:
    """Adds tags to the captions of a batch, takes images away from some, and adds sentences.

    The tags of an image are those that the captioner's head predicts. They are predicted in each batch, which takes
    less than a thousandth of a step, and so fit the grid and the view of the image. What is left out is drawn by the
    generator of torch, whose state is in checkpoints.

    Args:
        accelerator: accelerator of the run.
        tags: the tags, and which are left out.
        config: the shares of what is left out.
    """

    def __init__(self, accelerator: Accelerator, tags: TagWords, config: InputConfig):
        self.accelerator, self.tags, self.config = accelerator, tags, config

    @staticmethod
    def generator() -> np.random.Generator:
        """Return a generator of random numbers that torch's generator seeds."""
        return np.random.default_rng(int(torch.randint(2**62, ())))

    def image_tokens(self, captioner: CaptionerModel, batch: dict) -> torch.Tensor:
        """Return the image tokens (B, M, D) of a batch, which are encoded if it has pixels."""
        if (tokens := batch.get("image_tokens")) is not None:
            return tokens
        with torch.no_grad(), self.accelerator.autocast():
            return captioner.encode(batch["pixel_values"], batch.get("grid"))

    def pick_tags(
        self, captioner: CaptionerModel, image_tokens: torch.Tensor, random: np.random.Generator
    ) -> list[list[int]]:
        """Return the tags of each image, above a threshold that is drawn around the captioner's own for the batch."""
        if captioner.tags is None:
            return [[] for _ in image_tokens]
        spread = self.config.tag_spread
        least = min(max(captioner.tags.min_tag + random.uniform(-spread, spread), 0.0), 1.0)
        with torch.no_grad():
            return captioner.pick_tags(image_tokens, min_tag=least)

    def read_images(self, captioner: CaptionerModel, tokens: torch.Tensor) -> "ReadImages":
        """Return what the decoder reads of each of B images whose tokens are (B, M, D), to write captions of them."""
        random = self.generator()
        tags = [self.tags.drop(found, random) for found in self.pick_tags(captioner, tokens, random)]
        owners = torch.arange(len(tokens), device=tokens.device)
        dropped = torch.from_numpy(random.random(len(tokens)) < self.config.image_dropout)
        return ReadImages(with_blank(tokens), owners.masked_fill(dropped.to(owners.device), len(tokens)), tags)

    def prepare(self, model: nn.Module, batch: dict, random: np.random.Generator | None = None) -> dict:
        """Turn a batch of captions of images into what the decoder reads.

        Args:
            model: the prepared model.
            batch: images, texts with their `owners`, and `sentences`, if there are any.
            random: generator of what is left out; `None` for a new one.

        Returns:
            `image_tokens` (B + 1, M, D), of which the last are those of a blank image; the texts (N, T); and their
            `owners` (N,).
        """
        captioner = self.accelerator.unwrap_model(model)
        random = random or self.generator()
        tokens, owners = self.image_tokens(captioner, batch), batch["owners"]
        tags = self.pick_tags(captioner, tokens, random)
        before = [self.tags.tokens(self.tags.drop(tags[owner], random)) for owner in owners.tolist()]
        text = put_before({name: batch[name] for name in TEXT}, before)
        dropped = random.random(len(owners)) < self.config.image_dropout
        owners = owners.masked_fill(torch.from_numpy(dropped).to(owners.device), len(tokens))
        if "sentences" in batch:
            text = join_texts(text, batch["sentences"])
            owners = torch.cat([owners, owners.new_full((len(batch["sentences"]["labels"]),), len(tokens))])
        return {"image_tokens": with_blank(tokens), "owners": owners, **text}


def with_blank(tokens: torch.Tensor) -> torch.Tensor:
    """Append the tokens of a blank image, which are zeros, to image tokens (B, M, D)."""
    return torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])


def join_texts(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join two batches of labelled texts into one, padded on the right to the longest."""
    length = max(one["labels"].shape[1], other["labels"].shape[1])
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.cat([F.pad(part[name], (0, length - part[name].shape[1]), value=value) for part in (one, other)])
        for name, value in fill.items()
    }


class MixedStream:
    """A stream of captioned images to which sentences are added, each batch in proportion to its images.

    Args:
        images: the stream of images.
        text: the stream of sentences.
        per_image: sentences for each image, on average. The position of an image decides which they are.
    """

    def __init__(self, images: SeededStream, text: TextStream, per_image: float):
        self.images, self.text, self.per_image = images, text, per_image

    def loader(
        self, start: int, stop: int, batch_size: int, workers: int, collate_fn: Callable | None = None
    ) -> DataLoader:
        """Load the images from position `start` to `stop` in batches, with their sentences."""
        return self.images.loader(start, stop, batch_size, workers, collate_fn)

    def collate(self, items: list[dict]) -> dict[str, Any]:
        """Batch B images, see `CaptionStream.collate`; the texts of the `sentences`, if any, are a dictionary of it."""
        batch: dict[str, Any] = self.images.collate(items)
        places = [n for item in items for n in self.places(item["place"])]
        return batch | ({"sentences": self.text.collate([self.text[n] for n in places])} if places else {})

    def places(self, i: int) -> Sequence[int]:
        """Return the positions of the sentences that are added to the image at position i."""
        return range(int(i * self.per_image), int((i + 1) * self.per_image))
