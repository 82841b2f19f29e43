"""Starting the processes of a job, and what its loading processes do with signals."""

import multiprocessing
import os
import signal
import threading
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another, as the main process alone reads data and writes models."""


def start_processes(*handlers: KwargsHandler, **settings) -> Accelerator:
    """Return the accelerator of a job, whose processes wait for one another for `PATIENCE`.

    Args:
        handlers: further handlers of accelerate, such as `DistributedDataParallelKwargs`.
        settings: arguments of `Accelerator`.
    """
    return Accelerator(**settings, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), *handlers])


def leave_signals_to_main(worker: int) -> None:
    """Have a loading process (`worker_init_fn` of a `DataLoader`) ignore signals to its whole process group.

    `timeout`, Slurm, accelerate's launcher and Ctrl-C signal every process. A loader that died of it would end the main
    process before it has saved. A SIGTERM from the main process itself ends the loader. Without `sigtimedwait` (macOS),
    which gives the sender of a signal, only Ctrl-C is ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=await_main, daemon=True).start()


def await_main() -> None:
    """End this process when the main one sends SIGTERM, or is gone."""
    main = multiprocessing.parent_process()
    while main is not None and main.is_alive():
        sent = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if sent is not None and sent.si_pid == main.pid:
            break
    os._exit(0)


def pick_precision(name: str) -> str:
    """Resolve `auto`: bf16 on GPUs that have it, else `no`; other names stay."""
    if name != "auto":
        return name
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
