"""A ridge regression from teachers' outputs to what people said of images: words of captions, labels of classes.

An encoder soon memorises the words and labels of a few thousand images, which does not help with other images. The
regression avoids this. It is a fixed function of the view, and also gives targets for images that nobody described. The
targets of an image that was described are predicted by a fit on *other* images (cross-fitting).

Letters: B views, F features, V targets: words or classes.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from captioner.pretraining.targets import Targets

FOLDS = 5
"""Parts of the described images; the targets of each part are predicted by a fit on the other parts."""
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties from which the best is chosen, in units of a feature's variance, for each view of the fit."""


def describe(targets: list[Targets]) -> torch.Tensor:
    """Concatenate the outputs of all teachers for views into features (B, F); the last feature is 1.

    The features of a teacher are its pooled feature, or the mean of its map, or the square roots of its class
    probabilities: the first that it has. Class maps add the maximum of each class over the cells, and the square root
    of its mean.
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
    """A ridge regression from features of views to what people said of their images, fitted in one pass.

    Args:
        examples: rows of images (B,), features of a view of each (B, F) and its targets (B, V).
        features: number of features F.
        width: number of targets V.
        sum_processes: returns the sum of a tensor over the processes, where several share the examples.
        penalties: penalties from which the best is chosen, in the units of `RIDGES`.

    Attributes:
        weights: (FOLDS + 1, F, V): the weights that predict each fold, fitted on the other folds; then their mean, for
            images without targets.
        penalty: the chosen penalty.
        explained: share of the targets' variance that is explained on images outside the fit.

    Raises:
        ValueError: there are no examples.
    """

    def __init__(
        self,
        examples: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        features: int,
        width: int,
        sum_processes: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
        penalties: Sequence[float] = RIDGES,
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
        fits = ((*fit_folds(squares, products, penalty), penalty) for penalty in penalties)
        self.weights, error, self.penalty = min(fits, key=lambda fit: fit[1])
        around_mean = spread - products.sum(0)[-1].square() / squares[:, -1, -1].sum()
        self.explained = 1 - ((spread.sum() + error) / around_mean.sum()).item()

    def to(self, device: torch.device) -> "TeacherRegression":
        """Move the weights to a device; returns self."""
        self.weights = self.weights.to(device)
        return self

    def predict(self, rows: torch.Tensor, features: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
        """Predict targets (B, V), within 0 and 1.

        Args:
            rows: image of each view, (B,).
            features: features of the views, (B, F).
            fitted: whether each image has targets, and may have been fitted on, (B,).
        """
        predicted = features.new_empty(len(rows), self.weights.shape[2])
        folds = torch.where(fitted, rows % FOLDS, FOLDS)
        for fold, weights in enumerate(self.weights):
            predicted[folds == fold] = features[folds == fold] @ weights
        return predicted.clamp(0, 1)


def fit_folds(squares: torch.Tensor, products: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    """Fit the regression once for each fold, on all other folds.

    Args:
        squares: sums of x x^T over each fold's views (FOLDS, F, F), float64. The last feature is 1; its weight gets no
            penalty.
        products: sums of x y^T (FOLDS, F, V).
        ridge: penalty in units of a feature's variance, per view.

    Returns:
        Weights (FOLDS + 1, F, V), of which the last are the mean; and the squared error on the folds outside the fits,
        minus the squared error of predicting 0.
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
