"""Timing of several runs in turn, so that a change of the machine's speed falls on all alike."""

import time
from collections.abc import Callable, Mapping

import torch


def time_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Time each run `repeats` times, one after the other, after one run of each that is not timed.

    Returns:
        The seconds of each run, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds
