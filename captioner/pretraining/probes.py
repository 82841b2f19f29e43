"""Probes of frozen tokens at each grid: a linear classifier and nearest neighbours, on labelled images.

Letters: n images, D token width, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from captioner.encoders import TokenEncoder
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.pretraining.config import PretrainConfig
from captioner.pretraining.image_store import ImageStore, open_source, store_images
from captioner.pretraining.views import cut_views, whole_views

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Number of neighbours and temperature of the nearest-neighbour vote (Wu et al., CVPR 2018), as in DINO."""


def open_images(config: PretrainConfig) -> list[ImageStore]:
    """Open the images on which the probe is fitted, and those on which it is measured.

    Images that no run has decoded yet are decoded.

    Raises:
        SettingError: a set has no classes, or the images to measure on have a class that the others lack.
        OSError: there are no such images, or the disk is full.
    """
    assert config.probe_train is not None, "the run has a probe"
    assert config.probe_val is not None, "PretrainConfig refuses one without the other"
    folder = config.store or config.output / "store"
    stores = [
        store_images([open_source(name)], config.store_size, folder / part, config.workers)
        for part, name in (("probe_train", config.probe_train), ("probe_val", config.probe_val))
    ]
    if not all(store.classes for store in stores) or set(stores[1].classes) - set(stores[0].classes):
        raise SettingError(
            "the probe's images have no classes, or those to validate it on have others", "probe_train", "probe_val"
        )
    return stores


def probe_encoder(
    encoder: TokenEncoder,
    config: PretrainConfig,
    device: torch.device,
    head: nn.Linear | None = None,
    classes: Sequence[str] = (),
) -> list[dict]:
    """Probe an encoder at each grid of the run; only one process calls this.

    Args:
        encoder: the encoder.
        config: the run, with the grids and the images of the probe.
        device: device of the encoder.
        head: the classifier (D -> K) that was trained with the encoder on class labels.
        classes: names of its K classes. The head is measured if the validation images have no other classes.

    Returns:
        A record for each grid: `grid`, `probe_top1` of the linear probe, `knn_top1` of nearest neighbours, and
        `label_top1` of the head. The accuracies are shares of the validation images.

    Raises:
        SettingError: see `open_images`, or a grid is larger than the encoder's map.
    """
    stores = open_images(config)
    rows = [pick_rows(store, count) for store, count in zip(stores, (config.probe_images, None), strict=True)]
    labels = [numbers_of(store, r, stores[0].classes).to(device) for store, r in zip(stores, rows, strict=True)]
    head_labels = None
    if head is not None and set(stores[1].classes) <= set(classes):
        head_labels = numbers_of(stores[1], rows[1], classes).to(device)
    encoder.eval()
    records = []
    for grid in sorted(set(config.grids)):
        train, val = (
            pooled_features(encoder, store, r, (grid, grid), config.student_size, device)
            for store, r in zip(stores, rows, strict=True)
        )
        record = {"grid": grid}
        if head is not None and head_labels is not None:
            with torch.no_grad():
                guess = head(val[:, : head.in_features]).argmax(1)
            record["label_top1"] = (guess == head_labels).float().mean().item()
        mean, std = train.mean(0), train.std(0) + 1e-6
        train, val = (train - mean) / std, (val - mean) / std
        logits = fit_linear(train, labels[0], len(stores[0].classes))(val)
        top1 = (logits.argmax(1) == labels[1]).float().mean().item()
        knn = (vote(train, labels[0], val, len(stores[0].classes)) == labels[1]).float().mean().item()
        records.append({**record, "probe_top1": top1, "knn_top1": knn})
    return records


def numbers_of(store: ImageStore, rows: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
    """Return the class of each row (n,), as its number in a list of classes."""
    return torch.tensor([classes.index(name) for name in store.classes])[store.labels[rows]]


def pick_rows(store: ImageStore, count: int | None) -> torch.Tensor:
    """Return up to `count` usable, labelled rows (n,), spread evenly over the store; all of them for `None`."""
    rows = np.flatnonzero(store.usable & (store.labels.numpy() >= 0))
    if count is not None and count < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    return torch.from_numpy(rows)


@torch.no_grad()
def pooled_features(
    encoder: TokenEncoder, store: ImageStore, rows: torch.Tensor, grid: Grid, size: int, device: torch.device
) -> torch.Tensor:
    """Encode whole images at a grid; returns the class token and the mean of the grid's tokens, (n, 2 D).

    For an encoder without a class token, returns the mean alone, (n, D).
    """
    mean, std = (torch.tensor(encoder.default_cfg[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    features = []
    for part in rows.split(256):
        pixels = cut_views(store.batch(part, device), whole_views(len(part)), size)
        maps = encoder.forward_maps((pixels - mean) / std, grid)
        parts = [maps.summary, maps.tokens.flatten(1, 2).float().mean(1)] if encoder.has_class_token else [maps.summary]
        features.append(torch.cat(parts, 1).float())
    return torch.cat(features)


def fit_linear(features: torch.Tensor, labels: torch.Tensor, classes: int, decay: float = 1e-3) -> nn.Linear:
    """Fit a multinomial logistic regression to features (n, 2 D) and their classes (n,), by L-BFGS."""
    layer = nn.Linear(features.shape[1], classes).to(features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(features), labels) + decay * layer.weight.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return layer.requires_grad_(False)


def vote(train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, classes: int) -> torch.Tensor:
    """Classify queries by the votes of their nearest neighbours, weighted by similarity; returns classes (n,)."""
    train, queries = F.normalize(train), F.normalize(queries)
    near, index = (queries @ train.mT).topk(min(NEIGHBOURS, len(train)))
    votes = torch.zeros(len(queries), classes, device=train.device)
    votes.scatter_add_(1, labels[index], (near / TEMPERATURE).exp())
    return votes.argmax(1)
