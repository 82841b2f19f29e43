"""Objectives of a training step: cross-entropy on human captions here, rewards in `scst.py`."""

from typing import Protocol

import torch
from torch import nn

from captioner.labels import split_targets, token_loss
from captioner.training.wrapped import call_method


class Objective(Protocol):
    """An objective of training: it turns a batch into labelled texts, and computes the loss on them."""

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """Turn a batch of the stream into one for `loss`; its `labels` (B*K, T) mark the tokens that are learned."""

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss, summed over the learned tokens, and means over the batch for the log."""


class CrossEntropy:
    """Predict each token of a human caption from the image and the tokens before it (teacher forcing).

    Args:
        label_smoothing: share of the probability that is spread over the vocabulary.
    """

    def __init__(self, label_smoothing: float):
        self.label_smoothing = label_smoothing

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """Return the batch unchanged."""
        return batch

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the cross-entropy, smoothed and summed over the learned tokens."""
        inputs, targets = split_targets(batch)
        images = {name: batch[name] for name in ("pixel_values", "image_tokens", "grid", "owners") if name in batch}
        logits = call_method(model, "logits_at", **images, **inputs)  # (N, V)
        return token_loss(logits, targets, self.label_smoothing), {}
