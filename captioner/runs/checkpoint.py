"""Checkpoints that are whole or not there, and resuming from the newest whole one.

A checkpoint is a directory `step_00001200` holding what `accelerate` saves (model, optimiser, scaler, random state of
every process) and `progress.json` (position in the data, best score, number of processes, and the size and digest of
every other file). It is written under a temporary name, synced to disk, then renamed.

The model is safetensors. Optimiser and random state are torch files, read with `weights_only`: tensors, numbers and
containers, never code; a checkpoint that asks for more is refused.
"""

import hashlib
import json
import logging
import pickle
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, load
from safetensors import SafetensorError
from torch import nn

from captioner.runs.files import recover_folder, replace_folder, sync

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"

TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream")
"""What the RuntimeError says in which torch wraps the failure to write a file."""


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, progress: dict, keep: int = 2) -> Path:
    """Write the checkpoint of a step and drop all but the newest `keep`; every process calls this.

    Args:
        folder: directory that holds the checkpoints of this run; seen by every process.
        progress: JSON-able state of the loop beyond what accelerate saves.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            content = {"step": step, "processes": accelerator.num_processes, "files": digests(temporary), **progress}
            (temporary / PROGRESS).write_text(json.dumps(content, indent=2))
            sync(temporary / PROGRESS)
            replace_folder(temporary, final)
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_WRITER):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(folder)
        kept = f"'{earlier[-1]}' is kept" if earlier else "there is no earlier one"
        reason = str(error).splitlines()[0]
        raise OSError(
            f"cannot write checkpoint '{final}' ({reason}); free some disk space and run again; {kept}"
        ) from error
    accelerator.wait_for_everyone()
    return final


def digests(folder: Path) -> dict[str, list]:
    """Sync every file under a folder to disk; return the size in bytes and SHA-256 of each, by relative name."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    return found


def tidy(folder: Path) -> None:
    """Undo what a kill left half done among the checkpoints of a run."""
    for left in folder.glob(".step_*"):
        if left.suffix == ".previous":
            recover_folder(folder / left.stem.removeprefix("."))
        shutil.rmtree(left, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob(f"step_{'[0-9]' * 8}") if path.is_dir())


def find_damage(path: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint; None if they are as they were written."""
    try:
        files = json.loads((path / PROGRESS).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{PROGRESS} cannot be read ({type(error).__name__})"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                return f"{name} is not what was written"
    return None


def resume(
    accelerator: Accelerator, folder: Path, choice: str = "auto", settings: dict | None = None, strict: bool = True
) -> dict | None:
    """Restore a run from its checkpoints; every process calls this.

    Args:
        folder: directory that holds the checkpoints of this run.
        choice: `auto` takes the newest checkpoint that is whole, if there is any; `never` insists on there being none;
            anything else is the directory of one checkpoint.
        settings: what must be as it was when the checkpoint was saved (its `settings`).
        strict: see `load_checkpoint`.

    Returns:
        The checkpoint's progress; None where a run begins.

    Raises:
        ValueError: checkpoints that are all damaged, of other settings, or there although `choice` is `never`.
    """
    if accelerator.is_main_process:
        tidy(folder)
    accelerator.wait_for_everyone()
    found = list_checkpoints(folder)
    if choice == "never":
        if found:
            raise ValueError(f"'{folder}' holds checkpoints, and --resume is never; name another --output or delete it")
        return None
    candidates = found[::-1]
    if choice != "auto":
        candidates = [Path(choice)]
        if not (candidates[0] / PROGRESS).is_file():
            raise ValueError(f"no checkpoint at '{choice}': name a folder such as {folder / 'step_00001000'}")
    for path in candidates:
        damage = broadcast_object_list([find_damage(path) if accelerator.is_main_process else None])[0]
        if damage is not None:
            if choice != "auto":
                raise ValueError(
                    f"the checkpoint '{path}' is damaged, {damage}; --resume auto takes the newest whole one"
                )
            logger.warning("checkpoint '%s' is damaged, %s; trying the one before", path, damage)
            continue
        progress = load_checkpoint(accelerator, path, strict, settings)
        accelerator.print(f"resumed from {path}")
        if accelerator.is_main_process:  # else the damaged or left ones would count as the newest next time
            for newer in [other for other in found if other.name > path.name]:
                replace_folder(newer, newer.with_name(f"unused_{newer.name}"))
        accelerator.wait_for_everyone()
        return progress
    if candidates:
        raise ValueError(f"every checkpoint in '{folder}' is damaged; delete that folder to start over")
    return None


def load_checkpoint(accelerator: Accelerator, path: Path, strict: bool = True, settings: dict | None = None) -> dict:
    """Restore a checkpoint in every process and return its progress.

    Args:
        strict: whether every weight of the model must be in the checkpoint; frozen ones are not.
        settings: what must equal the checkpoint's own `settings`.

    Raises:
        ValueError: it was saved by another number of processes, with other settings or for another model, or holds
            more than tensors and numbers.
    """
    progress = json.loads((path / PROGRESS).read_text())
    if progress["processes"] != accelerator.num_processes:
        raise ValueError(
            f"'{path}' was saved by {progress['processes']} processes, this run has {accelerator.num_processes}; "
            f"launch with --num_processes {progress['processes']}"
        )
    for name, wanted in json.loads(json.dumps(settings or {}, default=str)).items():
        saved = progress.get("settings", {}).get(name)
        if saved != wanted:
            raise ValueError(
                f"'{path}' was saved with {name} {saved!r}, this run has {wanted!r}; "
                "run with the settings it was saved with, or name another --output"
            )
    try:
        for custom in path.glob("custom_checkpoint_*.pkl"):  # accelerate would unpickle these
            torch.load(custom, weights_only=True)
        load(path / f"random_states_{accelerator.process_index}.pkl")  # accelerate would go on without
        accelerator.load_state(str(path), strict=strict)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"'{path}' does not fit this model: {str(error).splitlines()[0]}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"'{path}' holds more than tensors, refused: {str(error).splitlines()[0]}") from None
    return progress


def leave_frozen_out(models: list[nn.Module], weights: list[dict], folder: str) -> None:
    """Drop frozen weights, which never change, and second names of tied ones from a checkpoint: accelerate's hook."""
    for model, state in zip(models, weights, strict=False):  # sharded models hand over no weights here
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        kept: set[int] = set()
        for key in list(state):
            place = state[key].data_ptr()
            if key in frozen or key.removeprefix("module.").startswith("encoder.") or place in kept:
                del state[key]
            kept.add(place)


def check_finite(model: nn.Module, step: int, checkpoints: Path) -> None:
    """Refuse weights that are not finite: saved, they would take the place of good ones.

    Raises:
        ValueError: a trained weight is infinite or not a number.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(not_finite(f"'{name}' is not finite", step, checkpoints))


def not_finite(what: str, step: int, checkpoints: Path) -> str:
    """Say that a run went astray, and how to go on."""
    return (
        f"{what} at step {step}; lower --learning-rate and run again, which resumes "
        f"from the last checkpoint in '{checkpoints}'"
    )
