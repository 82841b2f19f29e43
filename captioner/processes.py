"""Starting the processes of a job, and what its loading processes do with signals."""

import os
import signal
import threading
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another: the main one reads data and writes models alone."""


def start_processes(*handlers: KwargsHandler, **settings) -> Accelerator:
    """Return the accelerator of a job, whose processes wait for one another for `PATIENCE`.

    Args:
        handlers: further handlers of accelerate, such as `DistributedDataParallelKwargs`.
        settings: arguments of `Accelerator`.
    """
    return Accelerator(**settings, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), *handlers])


def leave_signals_to_main(worker: int) -> None:
    """Have a loading process (`worker_init_fn` of a `DataLoader`) go on when its whole group is told to stop.

    `timeout`, Slurm, accelerate's launcher and Ctrl-C signal every process; a loader that died of it would take the
    main process with it before that has saved. SIGTERM of the main process itself is obeyed. Without `sigwaitinfo`
    (macOS), which tells who sent a signal, only Ctrl-C is left to the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=await_main, args=(os.getppid(),), daemon=True).start()


def await_main(main: int) -> None:
    """End this process when the process `main` sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
