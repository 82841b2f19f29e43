"""Start the processes of a job, and handle signals in its loading processes."""

import multiprocessing
import os
import signal
import threading
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler

PATIENCE = timedelta(hours=2)
"""Time that processes wait for each other: the main process reads data and writes models while others wait."""


def start_processes(*handlers: KwargsHandler, **settings: Any) -> Accelerator:
    """Return the accelerator of a job; its processes wait for each other up to `PATIENCE`.

    Args:
        handlers: further handlers of accelerate, such as `DistributedDataParallelKwargs`.
        settings: arguments of `Accelerator`.
    """
    return Accelerator(**settings, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), *handlers])


def leave_signals_to_main(worker: int) -> None:
    """Make a loading process ignore signals to its process group; a `worker_init_fn` of `DataLoader`.

    `timeout`, Slurm, accelerate's launcher and Ctrl-C send a signal to every process. A loading process that it killed
    would end the main process before this has saved. A SIGTERM from the main process itself ends the loading process.
    On systems without `sigtimedwait`, which names the sender of a signal (macOS), only Ctrl-C is ignored.

    Args:
        worker: number of the loading process, unused.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=await_main, daemon=True).start()


def await_main() -> None:
    """End this process when the main process sends SIGTERM or has ended."""
    main = multiprocessing.parent_process()
    while main is not None and main.is_alive():
        sent = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if sent is not None and sent.si_pid == main.pid:
            break
    os._exit(0)


def pick_precision(name: str) -> str:
    """Return the precision that `auto` stands for (bf16 on GPUs that have it, else `no`); other names are unchanged."""
    if name != "auto":
        return name
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
