"""Stopping a run as schedulers do: after a signal it saves at its next step, then exits as if the signal killed it."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 5.0
"""Seconds in which a repeated signal means the same."""


class Interruption:
    """While entered, SIGTERM and SIGINT are noted instead of killing the process; a later one kills it as usual.

    Later is `GRACE` seconds after the first: schedulers and launchers often pass on a signal and send one of their own,
    to each process and to its group.

    The exit code is 128 + the signal's number, which is what shells, Slurm and Kubernetes expect: 143 after SIGTERM,
    130 after SIGINT (Ctrl-C). Outside the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self):
        self.received: int | None = None
        self._since = 0.0
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._since > GRACE:
                self._restore()
                os.kill(os.getpid(), number)
            return
        self.received, self._since = number, time.monotonic()
        if self._at_once:
            raise SystemExit(128 + number)
        logger.warning("%s: saving at the next step, then stopping", signal.Signals(number).name)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this, a signal ends the process without waiting for a step: everything is already saved."""
        self._at_once = True
        if self.received is not None:
            raise SystemExit(128 + self.received)
        try:
            yield
        finally:
            self._at_once = False

    def agree(self, accelerator: Accelerator, *flags: bool) -> tuple[int | None, list[bool]]:
        """Have all processes agree on what to do next; only some of them may have received the signal.

        Args:
            flags: further facts; each is true where it is true in any process.

        Returns:
            The signal to stop for, or None; and the flags, the same in every process.
        """
        votes = [self.received == number for number in SIGNALS] + list(flags)
        counts = accelerator.reduce(torch.tensor(votes, dtype=torch.float32, device=accelerator.device), "sum").tolist()
        stop = next((number for number, count in zip(SIGNALS, counts, strict=False) if count), None)
        return stop, [count > 0 for count in counts[len(SIGNALS) :]]
