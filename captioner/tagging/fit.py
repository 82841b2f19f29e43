"""Train a tag head and calibrate it.

An image is pooled into one feature for each view and grid, once; so training takes seconds.

Letters: n images, B images of a batch, V views and grids of each, F features, K tags.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from captioner.grids import Grid
from captioner.runs.progress import progress_bar
from captioner.tag_head import TagHead
from captioner.tagging.config import TagsConfig
from captioner.tagging.data import TokenReader

POOLED = 256
"""Images that are pooled at a time."""
WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
TIED = 3.0
"""Pull of each tag's calibration towards that of all tags, in units of the loss of an image."""


@dataclass(frozen=True)
class Targets:
    """What is known of images: for each tag its expected value in [0, 1], and the weight of that knowledge.

    Attributes:
        values: (n, K).
        weights: (n, K); 0 where nothing is known.
    """

    values: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, labels: np.ndarray, mentions: np.ndarray, mention_weight: float) -> "Targets":
        """Join labels and mentions (n, K), which are NaN where they are unknown. Where both are known, both count."""
        weights = np.stack([~np.isnan(labels), mention_weight * ~np.isnan(mentions)]).astype(np.float32)
        values = (weights * np.nan_to_num(np.stack([labels, mentions]))).sum(0)
        total = weights.sum(0)
        return cls(torch.from_numpy(values / np.maximum(total, 1e-6)), torch.from_numpy(total))

    def expected(self) -> np.ndarray:
        """Return the expected values (n, K), NaN where nothing is known."""
        return np.where(self.weights.numpy() > 0, self.values.numpy(), np.nan)

    @property
    def known(self) -> np.ndarray:
        """The images of which something is known, as rows."""
        return np.flatnonzero(self.weights.sum(1).numpy() > 0)

    def loss(self, logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Return the binary cross-entropy of logits (B, K) for rows (B,), summed over tags, mean over images."""
        values, weights = (part[rows].to(logits.device) for part in (self.values, self.weights))
        return (weights * F.binary_cross_entropy_with_logits(logits, values, reduction="none")).sum(1).mean()


@torch.no_grad()
def pool_images(
    head: TagHead, tokens: TokenReader, rows: np.ndarray, view: int, grid: Grid | None, device: torch.device
) -> torch.Tensor:
    """Pool a view of images (n,) into features (n, F), in half precision on the CPU."""
    parts = []
    for some in np.array_split(rows, math.ceil(len(rows) / POOLED)):
        batch = tokens.batch(some, np.full(len(some), view), grid)
        parts.append(head.pool(batch.to(device)).half().cpu())
    return torch.cat(parts)


def fit_head(
    head: TagHead,
    features: torch.Tensor,
    targets: Targets,
    train: np.ndarray,
    whole: torch.Tensor,
    val: np.ndarray,
    config: TagsConfig,
    device: torch.device,
) -> list[dict]:
    """Train a head in place; it is then as it was after its best epoch, and not calibrated.

    Args:
        head: the head, on the device.
        features: pooled features of each training image, in several views and grids (n, V, F).
        targets: targets of all images.
        train: the training images, as rows of the targets (n,).
        whole: pooled features of the images that choose the best epoch (m, F).
        val: these images, as rows of the targets (m,).
        config: the settings.
        device: where the head is trained.

    Returns:
        A record of each epoch: `epoch`, `loss`, `val_loss`.
    """
    generator = np.random.default_rng(config.seed)
    standardise(head, features)
    start_at_prior(head, targets, train)
    optimizer = make_optimizer(head, config)
    per_epoch = math.ceil(len(train) / config.batch_size)
    total = config.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * total + 1), (total - step) / total)
    )
    best, least, epochs = copy.deepcopy(head.state_dict()), math.inf, []
    bar = progress_bar(total=total, unit="step", desc="tag head")
    for epoch in range(1, config.epochs + 1):
        head.train()
        losses = []
        for some in np.array_split(generator.permutation(len(train)), per_epoch):
            views = generator.integers(features.shape[1], size=len(some))
            loss = targets.loss(head.classify(features[some, views].float().to(device)), train[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
        val_loss = targets.loss(predict_logits(head, whole, device), val).item()
        if val_loss < least:
            best, least = copy.deepcopy(head.state_dict()), val_loss
        epochs.append({"epoch": epoch, "loss": round(float(np.mean(losses)), 4), "val_loss": round(val_loss, 4)})
        bar.set_postfix(loss=f"{losses[-1]:.2f}", val_loss=f"{val_loss:.2f}")
    bar.close()
    head.load_state_dict(best)
    head.eval()
    return epochs


def standardise(head: TagHead, features: torch.Tensor) -> None:
    """Set the mean and the standard deviation of the features (n, V, F) in a head."""
    first = features[:, 0].float()
    head.mean.copy_(first.mean(0))
    head.std.copy_(first.std(0, correction=0) + 1e-3)


def start_at_prior(head: TagHead, targets: Targets, train: np.ndarray) -> None:
    """Set the last layer so that the head predicts each tag's mean target for every image."""
    weights = targets.weights[train]
    known = weights.sum(0)
    mean = ((targets.values[train] * weights).sum(0) + 0.1) / (known + 1)
    nn.init.zeros_(head.fc2.weight)
    with torch.no_grad():
        head.fc2.bias.copy_(mean.logit())


def make_optimizer(head: TagHead, config: TagsConfig) -> torch.optim.Optimizer:
    """Return AdamW, with weight decay for matrices alone."""
    matrices = [p for p in head.parameters() if p.ndim > 1]
    vectors = [p for p in head.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


@torch.no_grad()
def predict_logits(head: TagHead, features: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the logits (n, K) of pooled features (n, F), before calibration, on the CPU."""
    head.eval()
    return torch.cat([head.classify(part.float().to(device)).cpu() for part in features.split(POOLED)])


def calibrate(logits: torch.Tensor, targets: Targets, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a scale and a shift of each tag's logits, so that the probabilities are right on average (Platt, 1999).

    A tag with few images is drawn towards the scale and the shift that are best for all tags.

    Args:
        logits: (n, K).
        targets: the targets.
        rows: the images of the logits, as rows of the targets (n,).

    Returns:
        Scale and shift, each (K,).
    """
    logits = logits.double()
    values, weights = (part[rows].double() for part in (targets.values, targets.weights))
    shared = torch.zeros(2, dtype=torch.double, requires_grad=True)
    own = torch.zeros(2, logits.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([shared, own], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scale, shift = scale_and_shift(shared, own)
        loss = F.binary_cross_entropy_with_logits(logits * scale + shift, values, weights, reduction="sum")
        loss = loss + TIED * own.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scale, shift = scale_and_shift(shared, own)
    return scale.detach().float(), shift.detach().float()


def scale_and_shift(shared: torch.Tensor, own: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return scale and shift (K,) of parameters that all tags share (2,) and of each tag's own (2, K)."""
    both = shared[:, None] + own
    return both[0].exp(), both[1]
