"""What people said of images, as targets: words of captions, or labels of classes.

Letters: n images of the store, B views, F features, V targets (words or classes).
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from captioner.data.label_files import ImageLabels
from captioner.pretraining.regression import TeacherRegression
from captioner.runs.digests import digest_bytes

logger = logging.getLogger(__name__)

Examples = Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class DescribedImages:
    """Targets of the images that were described, and of the others where teachers predict them.

    Args:
        names: names of the V targets.
        rows: images that were described, as rows of the store (m,), each once.
        targets: their targets in [0, 1] (m, V): the share of captions with each word, or 1 for each class.
        size: images of the store n.

    Attributes:
        regression: predicts the targets of any view from the teachers' outputs, where it was fitted.
    """

    def __init__(self, names: Sequence[str], rows: np.ndarray, targets: np.ndarray, size: int):
        self.names, self.rows = list(names), rows
        self.targets = torch.from_numpy(targets)
        self.place = torch.full((size,), -1, dtype=torch.long)  # of an image among the targets; -1 without
        self.place[torch.from_numpy(rows)] = torch.arange(len(rows))
        self.regression: TeacherRegression | None = None
        self.digest = digest_bytes(targets.tobytes() + rows.tobytes())

    def to(self, device: torch.device) -> "DescribedImages":
        """Move to a device."""
        self.targets, self.place = self.targets.to(device), self.place.to(device)
        if self.regression is not None:
            self.regression.to(device)
        return self

    @property
    def prior(self) -> np.ndarray:
        """Mean of each target, (V,)."""
        return self.targets.mean(0).cpu().numpy()

    def fit(self, examples: Examples, features: int, sum_processes: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Fit the regression from teachers on views of the described images; see `TeacherRegression`.

        Returns:
            The share of the targets' variance that it predicts for images that it was not fitted on.
        """
        self.regression = TeacherRegression(examples, features, len(self.names), sum_processes)
        self.regression.to(self.targets.device)
        return self.regression.explained

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the targets that people gave images (B,): (B, V), NaN for an image that was not described."""
        place = self.place[rows]
        return self.targets[place.clamp(min=0)].masked_fill((place < 0)[:, None], float("nan"))

    def expected(self, rows: torch.Tensor, features: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the targets of views: as the regression predicts them where it was fitted, else as people gave them.

        Args:
            rows: image of each view, (B,).
            features: returns the features of the views (B, F), if they are needed.
        """
        if self.regression is None:
            return self.of(rows)
        return self.regression.predict(rows, features(), self.place[rows] >= 0)


def label_images(labels: ImageLabels, names: Sequence[str], usable: np.ndarray) -> DescribedImages:
    """Give the images of a store the labels of a label file, by the names of their files.

    Args:
        labels: the label file's content.
        names: name of each image's file (n,), empty where it has none.
        usable: which images could be opened (n,).

    Raises:
        ValueError: no image has a label, or two images have one name.
    """
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if name in labels.images and usable[row]:
            if name in seen:
                raise ValueError(f"two images are named '{name}', so that a label file cannot tell them apart")
            seen[name] = row
    if not seen:
        raise ValueError(f"none of the {len(labels.images)} labelled images is among the images")
    if missing := len(labels.images) - len(seen):
        logger.warning("%d of %d labelled images are not among the images", missing, len(labels.images))
    targets = np.zeros((len(seen), len(labels.classes)), np.float32)
    for place, name in enumerate(seen):
        targets[place, labels.images[name]] = 1
    return DescribedImages(labels.classes, np.array(list(seen.values())), targets, len(names))
