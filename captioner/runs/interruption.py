"""Stop a run on a signal, as schedulers send it: the run saves at its next step, then exits with the signal's code."""

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
"""Seconds after the first signal in which further signals change nothing."""


class Interruption:
    """A context in which SIGTERM and SIGINT do not kill the process: the first signal is stored in `received`.

    A further signal kills the process as usual if it comes more than `GRACE` seconds after the first. Before that it
    changes nothing, because schedulers and launchers often send one signal several times: to each process and to its
    group.

    The exit code is 128 + the signal's number, as shells, Slurm and Kubernetes expect: 143 after SIGTERM, 130 after
    SIGINT (Ctrl-C). Outside the main thread, where Python allows no signal handlers, signals act as usual.
    """

    def __init__(self) -> None:
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
        """Return a context in which a signal ends the process at once, because there is nothing to save."""
        self._at_once = True
        if self.received is not None:
            raise SystemExit(128 + self.received)
        try:
            yield
        finally:
            self._at_once = False

    def agree(self, accelerator: Accelerator, *flags: bool) -> tuple[int | None, list[bool]]:
        """Let all processes agree on what to do next, because only some of them may have received the signal.

        Args:
            accelerator: accelerator of the processes.
            flags: further facts to agree on.

        Returns:
            The signal to stop for, or None; and the flags, each true if it is true in any process. All processes get
            the same.
        """
        votes = [self.received == number for number in SIGNALS] + list(flags)
        counts = accelerator.reduce(torch.tensor(votes, dtype=torch.float32, device=accelerator.device), "sum").tolist()
        stop = next((number for number, count in zip(SIGNALS, counts, strict=False) if count), None)
        return stop, [count > 0 for count in counts[len(SIGNALS) :]]
