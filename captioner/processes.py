"""Starting the processes of a job."""

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
