"""What a training step learns from: cross-entropy on human captions here, rewards in `scst.py`."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from captioner.labels import next_tokens


class Objective(Protocol):
    """What a step learns from: how a batch becomes text to learn, and the loss on it."""

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """Turn a batch of the stream into what `loss` takes; its `labels` (B*K, T) say which tokens count."""

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss summed over the labelled tokens, and means over the batch to log."""


class CrossEntropy:
    """Predict each token of a human caption from the image and the tokens before it (teacher forcing)."""

    def __init__(self, label_smoothing: float):
        self.label_smoothing = label_smoothing

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """Take the batch as it is."""
        return batch

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy, smoothed, summed over tokens."""
        read, said = next_tokens(batch)
        images = {name: batch[name] for name in ("pixel_values", "image_tokens", "grid") if name in batch}
        logits = model(**images, **read).logits.float()  # (N, V)
        return F.cross_entropy(logits, said, label_smoothing=self.label_smoothing, reduction="sum"), {}
