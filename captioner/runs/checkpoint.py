"""Checkpoints that are whole or not there, and resuming from the newest whole one.

A checkpoint is a directory `step_00001200` holding what `accelerate` saves (model, optimiser, scaler, random state of
every process) and `progress.json` (position in the data, best score, number of processes, and the size and digest of
every other file). It is written under a temporary name, synced to disk, then renamed.

The model is safetensors. Optimiser and random state are torch files, read with `weights_only`: tensors, numbers and
containers, never code; a checkpoint that holds more is refused.
"""

import contextlib
import json
import logging
import pickle
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, load
from torch import nn

from captioner.errors import SettingError
from captioner.runs.digests import digest_file
from captioner.runs.files import folder_whole, part_of, recover_folder, replace_folder

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, progress: dict, newest: int = 2) -> Path:
    """Write the checkpoint of a step and drop all but the newest; every process calls this.

    Args:
        accelerator: holds what is saved, as it was prepared.
        folder: directory that holds the checkpoints of this run, on a disk that every process reads.
        step: number of steps done.
        progress: JSON-able state of the loop beyond what accelerate saves.
        newest: number of newest checkpoints that stay.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = folder / f"step_{step:08d}"
    earlier = list_checkpoints(folder)
    remark = f"; '{earlier[-1]}' is still there" if earlier else "; there is no earlier one"
    main = accelerator.is_main_process
    with folder_whole(final, "checkpoint", remark) if main else contextlib.nullcontext(part_of(final)) as temporary:
        accelerator.wait_for_everyone()  # until the folder is there
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if main:
            content = {"step": step, "processes": accelerator.num_processes, "files": describe_files(temporary)}
            (temporary / PROGRESS).write_text(json.dumps(content | progress, indent=2))
    if main:
        for old in list_checkpoints(folder)[:-newest]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def describe_files(folder: Path) -> dict[str, list]:
    """Return the size in bytes and the digest of every file under a folder, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, digest_file(path)] for path in files}


def tidy(folder: Path) -> None:
    """Undo what a kill left half done among the checkpoints of a run."""
    for left in folder.glob(".step_*"):
        recover_folder(folder / left.name.removeprefix(".").partition(".")[0])
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
        found = digest_file(file)
        if found != digest and len(found) == len(digest):  # captioner 0.1 wrote SHA-256, of 64 digits
            return f"{name} is not what was written"
    return None


def find_results(folder: Path, model: Path, log: Path, choice: str) -> list[str]:
    """Name what an earlier run left that a run which begins anew would replace.

    A run makes the folder of its checkpoints before its first step. Where that folder is empty, the run was stopped
    before its first checkpoint: its log is one that `auto` may begin again.

    Args:
        folder: directory of the checkpoints.
        model: the model that a run writes.
        log: the log that a run writes.
        choice: as `resume` takes it.
    """
    checkpoints = list_checkpoints(folder)
    stopped_early = choice == "auto" and folder.is_dir() and not checkpoints
    found = [f"the model '{model}'"] if model.exists() else []
    if log.exists() and log.stat().st_size and not stopped_early:
        found.append(f"the log '{log}'")
    return found + ([f"the checkpoint '{checkpoints[-1]}'"] if checkpoints else [])


def resume(
    accelerator: Accelerator,
    folder: Path,
    choice: str,
    settings: dict,
    *,
    model: Path,
    log: Path,
    strict: bool = True,
) -> dict | None:
    """Restore a run from its checkpoints; every process calls this.

    Args:
        folder: directory that holds the checkpoints of this run; made where the run begins anew.
        choice: `auto` takes the newest checkpoint that is whole, if there is any; `never` insists on beginning anew;
            anything else is the directory of one checkpoint.
        settings: what must be as it was when the checkpoint was saved (its `settings`).
        model: the model that the run writes.
        log: the log that the run writes.
        strict: see `load_checkpoint`.

    Returns:
        The checkpoint's progress; None where the run begins anew.

    Raises:
        ValueError: checkpoints that are all damaged or of other settings; a model, a log or checkpoints of an earlier
            run that this one would replace without going on from them.
    """
    if accelerator.is_main_process:
        tidy(folder)
    accelerator.wait_for_everyone()
    found = list_checkpoints(folder)
    named = Path(choice) if choice not in ("auto", "never") else None
    if named is not None and not (named / PROGRESS).is_file():
        raise SettingError(f"no checkpoint at '{named}'; it is a folder such as '{folder / 'step_00001000'}'", "resume")
    candidates = [named] if named else found[::-1] if choice == "auto" else []
    if not candidates or (named and named.resolve().parent != folder.resolve()):
        left = find_results(folder, model, log, choice) if accelerator.is_main_process else []
        if left := broadcast_object_list([left])[0]:
            raise SettingError(f"an earlier run left {' and '.join(left)}, which this run would replace", "output")
    for path in candidates:
        damage = broadcast_object_list([find_damage(path) if accelerator.is_main_process else None])[0]
        if damage is not None:
            if named:
                raise SettingError(
                    f"checkpoint '{path}' is damaged: {damage}; 'auto' takes the newest whole one", "resume"
                )
            logger.warning("checkpoint '%s' is damaged: %s; trying the one before", path, damage)
            continue
        progress = load_checkpoint(accelerator, path, settings, strict)
        accelerator.print(f"resumed from {path}")
        if accelerator.is_main_process:  # else the damaged or left ones would count as the newest next time
            for newer in [other for other in found if other.name > path.name]:
                replace_folder(newer, newer.with_name(f"unused_{newer.name}"))
        accelerator.wait_for_everyone()
        return progress
    if candidates:
        raise SettingError(f"every checkpoint in '{folder}' is damaged; delete that folder to begin anew", "output")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    return None


def load_checkpoint(accelerator: Accelerator, path: Path, settings: dict, strict: bool = True) -> dict:
    """Restore a checkpoint in every process and return its progress.

    Args:
        settings: what must equal the checkpoint's own `settings`. Those with `digest` in their names were digested
            otherwise by earlier versions of this package; where a checkpoint lacks them, a warning says so.
        strict: whether every weight of the model must be in the checkpoint; frozen ones are not.

    Raises:
        ValueError: it was saved by another number of processes, with other settings or for another model, or holds
            more than tensors and numbers.
    """
    progress = json.loads((path / PROGRESS).read_text())
    if progress["processes"] != accelerator.num_processes:
        raise ValueError(
            f"'{path}' was saved by {progress['processes']} processes, this run has {accelerator.num_processes}; "
            f"start it with {progress['processes']}"
        )
    saved = progress.get("settings", {})
    absent = [name for name in settings if "digest" in name and name not in saved]
    if absent:
        logger.warning("'%s' is of an earlier version: not compared are its %s", path, ", ".join(absent))
    for name, value in json.loads(json.dumps(settings, default=str)).items():
        if name not in absent and saved.get(name) != value:
            meaning = ", which means other contents" if "digest" in name else ""
            raise SettingError(
                f"'{path}' was saved with {name} {saved.get(name)!r}, this run has {value!r}{meaning}; "
                "a run goes on with the settings it began with",
                "output",
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
        for name, module in model.named_modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                frozen |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers()}
        places: set[int] = set()
        for key in list(state):
            place = state[key].data_ptr()
            if key in frozen or place in places:
                del state[key]
            places.add(place)


def check_finite(model: nn.Module, step: int, checkpoints: Path) -> None:
    """Refuse weights that are not finite: saved, they would take the place of good ones.

    Raises:
        ValueError: a trained weight is infinite or not a number.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise not_finite(f"the weight '{name}' is not finite", step, checkpoints)


def not_finite(what: str, step: int, checkpoints: Path) -> SettingError:
    """Return the error of a run whose numbers went out of range, which says how to go on."""
    return SettingError(
        f"{what} at step {step}; with a lower learning rate, the run goes on from the last checkpoint in "
        f"'{checkpoints}'",
        "learning_rate",
    )
