"""A ridge regression from teachers' outputs to what people said of images: words of captions, labels of classes.

An encoder soon knows the words and labels of a few thousand images by heart, which helps with no other image. The
regression avoids that. It is a fixed function of the view, and also holds for images that nobody described. The targets
of an image that was described are predicted by a fit on *other* images (cross-fitting).

Letters: B views, F features, V targets: words or classes.
"""

from collections.abc import Callable, Iterable

import torch

from captioner.pretraining.targets import Targets

FOLDS = 5
"""Parts of the images; the targets of each part are predicted by a fit on the others."""
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties to choose from, in units of a feature's variance, per view that is fitted on."""


def describe(targets: list[Targets]) -> torch.Tensor:
    """Join the outputs of all teachers for views into features (B, F), the last of which is 1.

    Features of a teacher are its pooled feature (else the mean of its map, else the square roots of its class
    probabilities) and, of class maps, the maximum and the square root of the mean of each class over the cells.
    """
    parts = []
    for target in targets:
        target = {name: value.float() for name, value in target.items()}
        if "pooled" in target:
            parts.append(target["pooled"])
        elif "grid" in target:
            parts.append(target["grid"].mean((2, 3)))
        elif "logits" in target:
            parts.append(target["logits"].softmax(-1).sqrt())
        if "maps" in target:
            parts += [target["maps"].amax((2, 3)), target["maps"].mean((2, 3)).clamp(min=0).sqrt()]
    return torch.cat([*parts, torch.ones_like(parts[0][:, :1])], 1)


class TeacherRegression:
    """A ridge regression from features of views to what is known about their images, fitted in one pass.

    Args:
        examples: rows of images (B,), features of a view of each (B, F) and its targets (B, V).
        features: number of features F.
        width: number of targets V.
        sum_processes: returns the sum of a tensor over the processes, where several share the examples.

    Attributes:
        weights: (FOLDS + 1, F, V): those that predict each fold, fitted on the others; and their mean, for images
            without targets.
        explained: share of the targets' variance that is predicted for images that a fit has not seen.

    Raises:
        ValueError: there are no examples.
    """

    def __init__(
        self,
        examples: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        features: int,
        width: int,
        sum_processes: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ):
        squares = torch.zeros(FOLDS, features, features, dtype=torch.float64)
        products = torch.zeros(FOLDS, features, width, dtype=torch.float64)
        spread = torch.zeros(width, dtype=torch.float64)
        for rows, x, y in examples:
            x, y = x.double(), y.double()
            spread += y.square().sum(0)
            for fold in range(FOLDS):
                mine = rows % FOLDS == fold
                squares[fold] += x[mine].T @ x[mine]
                products[fold] += x[mine].T @ y[mine]
        squares, products, spread = sum_processes(squares), sum_processes(products), sum_processes(spread)
        if not squares[:, -1, -1].sum():
            raise ValueError("no image with captions or labels can be opened, so that there is nothing to fit")
        self.weights, error = min((fit_folds(squares, products, ridge) for ridge in RIDGES), key=lambda fit: fit[1])
        around_mean = spread - products.sum(0)[-1].square() / squares[:, -1, -1].sum()
        self.explained = 1 - ((spread.sum() + error) / around_mean.sum()).item()

    def to(self, device: torch.device) -> "TeacherRegression":
        """Move to a device."""
        self.weights = self.weights.to(device)
        return self

    def predict(self, rows: torch.Tensor, features: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
        """Return the expected targets (B, V), within 0 and 1.

        Args:
            rows: image of each view, (B,).
            features: features of the views, (B, F).
            fitted: whether each image has targets, and may have been fitted on, (B,).
        """
        expected = features.new_empty(len(rows), self.weights.shape[2])
        folds = torch.where(fitted, rows % FOLDS, FOLDS)
        for fold, weights in enumerate(self.weights):
            expected[folds == fold] = features[folds == fold] @ weights
        return expected.clamp(0, 1)


def fit_folds(squares: torch.Tensor, products: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    """Fit the regression without each fold in turn.

    Args:
        squares: sums of x x^T over each fold's views (FOLDS, F, F), float64; the last feature is 1, and not penalised.
        products: sums of x y^T (FOLDS, F, V).
        ridge: penalty in units of a feature's variance, per view.

    Returns:
        Weights (FOLDS + 1, F, V), the last their mean; and the squared error on the folds left out, minus that of a
        prediction of 0.
    """
    counts, all_squares, all_products = squares[:, -1, -1], squares.sum(0), products.sum(0)
    mean = all_squares[-1] / counts.sum()
    variance = all_squares.diagonal() / counts.sum() - mean.square()
    variance[-1] = 0
    fits, error = [], 0.0
    for x, y, count in zip(squares, products, counts, strict=True):
        penalty = ridge * (counts.sum() - count) * variance + 1e-9
        weights = torch.linalg.solve(all_squares - x + penalty.diag(), all_products - y)
        error += ((weights * (x @ weights)).sum() - 2 * (weights * y).sum()).item()
        fits.append(weights)
    return torch.stack([*fits, sum(fits) / FOLDS]).float(), error
