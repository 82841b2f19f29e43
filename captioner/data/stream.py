"""An endless, seeded stream of images, in which an item depends only on its position.

Item i is the same in every process and every run. So processes share the positions, and a resumed run starts at another
position.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from captioner.grids import Grid
from captioner.images import ImageError
from captioner.runs.processes import leave_signals_to_main

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 20
"""Number of unusable images in a row after which the data are refused."""


def draw_grid(grids: Sequence[T], seed: int, step: int) -> T:
    """Draw the compressed grid of an optimiser step, which is the same in every process."""
    return grids[int(np.random.default_rng((seed, step)).integers(len(grids)))]


class SeededStream(Dataset):
    """Base class of endless streams: each epoch has `size` images in a new seeded order.

    A subclass implements `load(number, i)`: `number` is the number of the image, and the position i seeds its random
    choices. For an image that cannot be opened, a warning comes once, and the next image is used instead.

    Args:
        size: images in an epoch.
        seed: seed of everything random.
        grids: compressed grids, of which each optimiser step draws one; without any, the encoder's own.
        per_step: positions of an optimiser step, over all processes.
    """

    def __init__(self, size: int, seed: int, grids: Sequence[Grid] = (), per_step: int = 1):
        self.size, self.seed, self.grids, self.per_step = size, seed, grids, per_step
        self.broken: set[int] = set()

    def load(self, number: int, i: int) -> dict[str, Any]:
        """Return the item made of image `number` at position i."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it must implement load")

    def __len__(self) -> int:
        return 2**40

    @lru_cache(maxsize=2)  # noqa: B019 - a stream lives as long as the run
    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the images in an epoch, (size,)."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.size)

    def choose(self, i: int, attempt: int) -> int:
        """Return the number of the image for position i, after `attempt` images there could not be opened."""
        epoch, place = divmod(i, self.size)
        return int(self.order(epoch)[(place + attempt) % self.size])

    def __getitem__(self, i: int) -> dict[str, Any]:
        for attempt in range(PATIENCE):
            number = self.choose(i, attempt)
            try:
                return self.load(number, i) | {"place": i}
            except ImageError as error:
                last = error
                if number not in self.broken:
                    self.broken.add(number)
                    logger.warning("skipped: %s (%d so far)", error, len(self.broken))
        raise ValueError(f"{PATIENCE} images in a row cannot be used; the last: {last}")

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        """Return the items of a batch."""
        return [self[i] for i in positions]

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch items; where a subclass does not say how, each of their values is stacked."""
        return default_collate(items)

    def grid(self, items: list[dict]) -> Grid | None:
        """Return the grid of the step that a batch of items belongs to."""
        return draw_grid(self.grids, self.seed, items[0]["place"] // self.per_step) if self.grids else None

    def generator(self, i: int) -> np.random.Generator:
        """Return the generator of random numbers of position i."""
        return np.random.default_rng((self.seed, 1, i))

    def loader(
        self, start: int, stop: int, batch_size: int, workers: int, collate_fn: Callable | None = None
    ) -> DataLoader:
        """Load the items from position `start` to `stop` in batches; read them through `raise_errors`."""
        return DataLoader(
            Positions(self, range(start, stop)),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=partial(collate_items, collate_fn or default_collate),
            drop_last=True,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_main,
            generator=torch.Generator(),  # else it draws from torch's own, and a resumed run would draw more
        )


class Positions(Dataset):
    """Some positions of a stream. If data cannot be used, the error takes the place of the batch.

    An error that is raised in a loading process would reach the user as the text of a traceback, without its type.
    """

    def __init__(self, stream: SeededStream, positions: range):
        self.stream, self.positions = stream, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]] | ValueError:
        try:
            return self.stream.__getitems__([self.positions[place] for place in places])
        except ValueError as error:
            return error


def collate_items(collate: Callable, items: list[dict[str, Any]] | ValueError) -> Any:
    """Batch the items of `Positions`; an error is returned unchanged."""
    return items if isinstance(items, ValueError) else collate(items)


def raise_errors(batches: Iterable[T | ValueError]) -> Iterator[T]:
    """Yield the batches of a stream's loader, and raise an error that takes the place of one.

    Raises:
        ValueError: the data cannot be used.
    """
    for batch in batches:
        if isinstance(batch, ValueError):
            raise batch
        yield batch
