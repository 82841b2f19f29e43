"""Objectives of a training step: cross-entropy on human captions here, rewards in `scst.py`.

Letters: B images, N texts about them, M image tokens, D encoder width, T text tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from captioner.data.encoding import token_shapes
from captioner.grids import Grid
from captioner.labels import split_targets, token_loss
from captioner.modeling import CaptionerModel
from captioner.training.inputs import PairedInputs
from captioner.training.wrapped import call_method


class Objective(Protocol):
    """An objective of training: it turns a batch into labelled texts, and computes the loss on them."""

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """Turn a batch of the stream into one for `loss`; its `labels` (B*K, T) mark the tokens that are learned."""

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss, summed over the learned tokens, and means over the batch for the log."""


class BlankImage:
    """The image tokens of a text without an image: zeros, as many as an image has at a grid.

    Args:
        model: the captioner.
        input_size: channels, height and width of its images, in pixels.
        grids: further grids than the model's own.
    """

    def __init__(self, model: CaptionerModel, input_size: Sequence[int], grids: Sequence[Grid] = ()):
        named = {str(grid): grid or model.config.grid for grid in (None, *grids)}
        self.shapes = token_shapes(model.encoder, input_size, named)

    def tokens(self, grid: Grid | None, device: torch.device) -> torch.Tensor:
        """Return the tokens (1, M, D) at a grid, `None` for the model's own."""
        return torch.zeros(1, *self.shapes[str(grid)], device=device)


class CrossEntropy:
    """Predict each token of a human text from the image, if there is one, and the tokens before it (teacher forcing).

    Args:
        label_smoothing: share of the probability that is spread over the vocabulary.
        blank: the image tokens of batches without images. All texts of a batch share them.
        inputs: adds tags and sentences to batches of images, and takes images away; `None` leaves batches unchanged.
    """

    def __init__(self, label_smoothing: float, blank: BlankImage | None = None, inputs: PairedInputs | None = None):
        self.label_smoothing, self.blank, self.inputs = label_smoothing, blank, inputs

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """Return the batch as the decoder reads it; one without images has the blank image for all its texts."""
        if self.inputs is not None:
            return self.inputs.prepare(model, batch)
        if self.blank is None or "pixel_values" in batch or "image_tokens" in batch:
            return batch
        device = batch["input_ids"].device
        owners = torch.zeros(len(batch["input_ids"]), dtype=torch.long, device=device)
        return batch | {"image_tokens": self.blank.tokens(batch.get("grid"), device), "owners": owners}

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the cross-entropy, smoothed and summed over the learned tokens."""
        inputs, targets = split_targets(batch)
        images = {name: batch[name] for name in ("pixel_values", "image_tokens", "grid", "owners") if name in batch}
        logits = call_method(model, "logits_at", **images, **inputs)  # (N, V)
        return token_loss(logits, targets, self.label_smoothing), {}
