"""A metric object with `update` and `compute` as in torchmetrics, for batches on many processes."""

import sys
from collections.abc import Hashable, Sequence
from typing import Any

from captioner.metrics.scores import Scores, python_id, score


class CaptionMetric:
    """Collects the captions of all processes and scores them together.

    ```python
    metric = CaptionMetric()
    for batch in loader:
        metric.update(batch["image_id"], model_captions, batch["captions"])
    scores = metric.compute()
    ```

    An image that is added twice counts once: samplers repeat images to fill the last batch. Images are scored in the
    order of their ids, so that the number of processes does not change the scores.

    Args:
        metrics: as for `score`. METEOR is not a default here, because each process would start Java.
        **options: further options of `score`.
    """

    def __init__(self, metrics: Sequence[str] = ("BLEU", "ROUGE-L", "CIDEr"), **options: Any):
        self.metrics = tuple(metrics)
        self.options = options
        self.reset()

    def reset(self) -> None:
        """Drop all captions collected so far."""
        self._rows: dict[Hashable, tuple[str, str | list[str]]] = {}

    def update(
        self, image_ids: Sequence[Hashable], predictions: Sequence[str], references: Sequence[str | Sequence[str]]
    ) -> None:
        """Add a batch of this process.

        Args:
            image_ids: B ids; tensors of one number count as that number.
            predictions: B captions.
            references: the references of each.

        Raises:
            ValueError: the lists differ in length.
        """
        if not len(image_ids) == len(predictions) == len(references):
            found = f"{len(image_ids)} image ids, {len(predictions)} predictions, {len(references)} lists of references"
            raise ValueError(f"{found}; give one of each for each image")
        for image_id, prediction, others in zip(image_ids, predictions, references, strict=True):
            self._rows.setdefault(
                python_id(image_id), (prediction, others if isinstance(others, str) else list(others))
            )

    def compute(self) -> Scores:
        """Score the captions of all processes. Every process must call this and gets the same result.

        Raises:
            ValueError: there are no captions, or `score` refuses them.
        """
        rows: dict[Hashable, tuple[str, str | list[str]]] = {}
        for part in _gather(self._rows):
            for image_id, row in part.items():
                rows.setdefault(image_id, row)
        if not rows:
            raise ValueError("nothing to score; call update first")
        image_ids = sorted(rows, key=lambda image_id: (type(image_id).__name__, image_id))
        predictions = {image_id: rows[image_id][0] for image_id in image_ids}
        references = {image_id: rows[image_id][1] for image_id in image_ids}
        return score(predictions, references, metrics=self.metrics, **self.options)


def _gather(rows: dict) -> list[dict]:
    """Return the rows of every process, in the order of ranks."""
    distributed = sys.modules.get("torch.distributed")  # not imported means no process group, and imports stay light
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return [rows]
    parts: list[dict] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(parts, rows)
    return parts
