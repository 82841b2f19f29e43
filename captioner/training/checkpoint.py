"""Checkpoints that are whole or not there: written under a temporary name, then renamed.

A checkpoint is a directory `step_00001200` holding what `accelerate` saves (model, optimiser, scheduler, scaler, random
state of every process) and `progress.json` (position in the data, best score, number of processes).
"""

import json
import logging
import shutil
from pathlib import Path

from accelerate import Accelerator

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, progress: dict, keep: int = 2) -> Path:
    """Write the checkpoint of a step and drop all but the newest `keep`; every process calls this.

    Args:
        folder: directory that holds the checkpoints of this run.
        progress: JSON-able state of the loop beyond what accelerate saves.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        content = {"step": step, "processes": accelerator.num_processes, **progress}
        (temporary / PROGRESS).write_text(json.dumps(content, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{PROGRESS}"))


def load_checkpoint(accelerator: Accelerator, path: Path, strict: bool = True) -> dict:
    """Restore a checkpoint in every process and return its progress.

    Args:
        strict: whether every weight of the model must be in the checkpoint; a frozen encoder's are not.

    Raises:
        ValueError: it was saved by another number of processes, or for another model.
    """
    progress = json.loads((path / PROGRESS).read_text())
    if progress["processes"] != accelerator.num_processes:
        raise ValueError(
            f"'{path}' was saved by {progress['processes']} processes, this run has {accelerator.num_processes}; "
            f"launch with --num_processes {progress['processes']}"
        )
    try:
        accelerator.load_state(str(path), strict=strict)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"'{path}' does not fit this model: {str(error).splitlines()[0]}") from None
    return progress
