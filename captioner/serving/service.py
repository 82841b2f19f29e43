"""Caption uploads: images are opened on threads, wait for the engine, and get their captions."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

import anyio.to_thread
import torch

from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.images import ImageError
from captioner.inference import Caption, Captioner
from captioner.search import Search
from captioner.serving.answers import refuse
from captioner.serving.engine import Closed, Engine, Job, QueueFull
from captioner.serving.monitoring import Monitor
from captioner.serving.settings import Limits
from captioner.serving.uploads import Options, Upload


@dataclass
class Service:
    """Captioning of uploads within limits; all parts of the server share one.

    Attributes:
        captioner: the captioner.
        engine: its queue.
        limits: limits of requests.
        monitor: counts images.
    """

    captioner: Captioner
    engine: Engine
    limits: Limits
    monitor: Monitor

    def __post_init__(self) -> None:
        self.openers = anyio.CapacityLimiter(os.cpu_count() or 1)  # each may hold one decoded image in memory

    async def caption(self, uploads: Sequence[Upload], options: Options) -> list[Caption]:
        """Caption images, in order; one that cannot be used has its error.

        Raises:
            HTTPException: an option does not fit the model, the queue is full, or the server closes.
        """
        try:
            search, grid = options.search()
            search.resolve(self.captioner.model)
        except ValueError as error:
            raise refuse(422, str(error)) from None
        try:
            return await self.run(uploads, search, grid)
        except QueueFull:
            raise refuse(503, "too many images wait; try again") from None
        except Closed:
            raise refuse(503, "the server closes") from None
        except SettingError as error:
            raise refuse(422, str(error)) from None

    async def run(self, uploads: Sequence[Upload], search: Search, grid: Grid | None) -> list[Caption]:
        """Open images, queue them and wait for their captions."""
        results = [Caption(upload.name) for upload in uploads]
        opened = await asyncio.gather(
            *(self.open(upload, result) for upload, result in zip(uploads, results, strict=True))
        )
        jobs = {n: Job(pixels, f"#{n}", search, grid) for n, pixels in enumerate(opened) if pixels is not None}
        self.engine.submit(list(jobs.values()))
        try:
            for number, job in jobs.items():
                results[number].fill(await asyncio.wrap_future(job.result), search, logprob=True)
        finally:
            for job in jobs.values():
                job.result.cancel()  # has no effect on those that are done
        for result in results:
            self.monitor.images.labels("captioned" if result.error is None else result.reason).inc()
        return results

    async def open(self, upload: Upload, result: Caption) -> torch.Tensor | None:
        """Return the pixels (3, H, W) of an image, or write its error into the result."""

        def work() -> torch.Tensor:
            upload.check_size(self.limits.pixels)
            return self.captioner.processor.pixels({"path": upload.name, "bytes": upload.data})

        try:
            return await anyio.to_thread.run_sync(work, limiter=self.openers)
        except ImageError as error:
            result.error, result.reason = str(error), error.kind
            return None
