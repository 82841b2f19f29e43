"""Caption the images of many requests with one model: they wait in a bounded queue, in batches of equal options.

LitServe batches too, but owns the web server and its processes; this engine stands behind any application, such as the
API and the page of one FastAPI program.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.inference import Captioner
from captioner.search import Findings, Search

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue has not enough places for the images."""


class Closed(Exception):
    """The engine is closed and takes no more images."""


@dataclass
class Job:
    """An image that waits for its captions.

    Attributes:
        pixels: the image (3, H, W).
        key: a name for the image, on which the random numbers of sampling depend.
        search: the settings of the search.
        grid: compressed grid; `None` for the model's own.
    """

    pixels: torch.Tensor
    key: str
    search: Search
    grid: Grid | None = None
    result: "Future[Findings]" = field(default_factory=Future)

    def fits(self, other: "Job") -> bool:
        """Return whether both can be in one batch."""
        return (self.grid, self.search) == (other.grid, other.search)


class Engine:
    """A captioner with a queue; its thread takes batches from the queue until the engine is closed.

    Args:
        captioner: the captioner.
        batch_size: images per batch, at most.
        queue: images that may wait, at most.
        wait: seconds that a batch waits for more images.
        observe: called with the size of each batch.
    """

    def __init__(
        self,
        captioner: Captioner,
        batch_size: int = 16,
        queue: int = 256,
        wait: float = 0.005,
        observe: Callable[[int], object] = lambda size: None,
    ):
        self.captioner, self.batch_size, self.queue, self.wait, self.observe = (
            captioner,
            batch_size,
            queue,
            wait,
            observe,
        )
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="captioner-engine", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Number of images that wait."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether images are taken from the queue."""
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put images into the queue, all or none; the `result` of each job will hold its captions and tags.

        Raises:
            QueueFull: there are not enough places.
            Closed: the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._jobs) + len(jobs) > self.queue:
                raise QueueFull
            self._jobs.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Take no more images, finish those that wait, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._take():
            batch = [job for job in batch if job.result.set_running_or_notify_cancel()]  # cancelled: nobody waits
            if batch:
                self._run(batch)

    def _take(self) -> list[Job]:
        """Wait for images and take those that fit into one batch with the first; [] if the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return []
            first, until = self._jobs[0], time.monotonic() + self.wait
            while not self._closed and sum(map(first.fits, self._jobs)) < self.batch_size:
                if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    break
            batch: list[Job] = []
            rest: deque[Job] = deque()
            for job in self._jobs:
                (batch if job.fits(first) and len(batch) < self.batch_size else rest).append(job)
            self._jobs = rest
            return batch

    def _run(self, batch: list[Job]) -> None:
        self.observe(len(batch))
        first = batch[0]
        try:
            pixels, keys = torch.stack([job.pixels for job in batch]), [job.key for job in batch]
            found = self.captioner.search(pixels, keys, first.search, first.grid)
            assert len(found) == len(batch)
        except Exception as error:  # the thread must continue, and all who wait get the error
            if not isinstance(error, SettingError):
                logger.exception("a batch of %d images failed", len(batch))
            for job in batch:
                job.result.set_exception(error)
            return
        for job, own in zip(batch, found, strict=True):
            job.result.set_result(own)
