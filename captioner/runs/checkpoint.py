"""Checkpoints that are complete or absent, and resuming from the newest complete one.

A checkpoint is a directory `step_00001200`. It contains the files of `accelerate` (model, optimiser, scaler, random
state of each process) and `progress.json` (step, best score, number of processes, and the size and digest of every
other file). It is written under a temporary name, synced to disk, then renamed.

The model is in safetensors. Optimiser and random state are torch files, read with `weights_only`: they hold tensors,
numbers and containers, and no code. A checkpoint that holds anything else is refused.
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

from captioner.errors import SettingError, first_line
from captioner.runs.digests import digest_file
from captioner.runs.files import folder_whole, part_of, recover_folder, replace_folder

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, progress: dict, newest: int = 2) -> Path:
    """Write the checkpoint of a step and delete old ones; every process calls this.

    Args:
        accelerator: accelerator that prepared the model and the optimiser.
        folder: directory of the checkpoints of this run, on a disk that every process reads.
        step: number of steps done.
        progress: further state of the loop, in types that JSON can hold.
        newest: number of newest checkpoints that are not deleted.

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
    """Remove or finish checkpoints that a killed process left incomplete."""
    for left in folder.glob(".step_*"):
        recover_folder(folder / left.name.removeprefix(".").partition(".")[0])
        shutil.rmtree(left, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob(f"step_{'[0-9]' * 8}") if path.is_dir())


def find_damage(path: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None if they are as they were written."""
    try:
        listed = json.loads((path / PROGRESS).read_text())["files"]
        files = [(name, int(size), str(digest)) for name, (size, digest) in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{PROGRESS} cannot be read ({type(error).__name__})"
    for name, size, digest in files:
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
    """List the results of an earlier run that a new run would replace.

    A run creates the folder of its checkpoints before its first step. If that folder is empty, the run was stopped
    before its first checkpoint, and `auto` may replace its log.

    Args:
        folder: directory of the checkpoints.
        model: path of the model that a run writes.
        log: path of the log that a run writes.
        choice: see `resume`.
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
        accelerator: accelerator that prepared the model and the optimiser.
        folder: directory of the checkpoints of this run; it is created if the run starts from step 0.
        choice: `auto` takes the newest complete checkpoint, if there is any; `never` starts from step 0; anything else
            is the directory of one checkpoint.
        settings: settings that must equal those in the checkpoint.
        model: path of the model that the run writes.
        log: path of the log that the run writes.
        strict: see `load_checkpoint`.

    Returns:
        The progress in the checkpoint; None if the run starts from step 0.

    Raises:
        ValueError: all checkpoints are damaged, or one has other settings; or the run would replace the model, the log
            or the checkpoints of an earlier run without continuing it.
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
        if accelerator.is_main_process:  # otherwise these would be the newest checkpoints at the next start
            for newer in [other for other in found if other.name > path.name]:
                replace_folder(newer, newer.with_name(f"unused_{newer.name}"))
        accelerator.wait_for_everyone()
        return progress
    if candidates:
        raise SettingError(f"every checkpoint in '{folder}' is damaged; delete that folder to start again", "output")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    return None


def load_checkpoint(accelerator: Accelerator, path: Path, settings: dict, strict: bool = True) -> dict:
    """Restore a checkpoint in every process and return its progress.

    Args:
        accelerator: accelerator that prepared the model and the optimiser.
        path: directory of the checkpoint.
        settings: settings that must equal those in the checkpoint. Earlier versions of this package computed those with
            `digest` in their names in another way; if a checkpoint lacks them, a warning names them.
        strict: whether every weight of the model must be in the checkpoint; frozen weights are not.

    Raises:
        ValueError: the checkpoint comes from another number of processes, other settings or another model, or holds
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
        logger.warning("'%s' is of an earlier version, so these settings are not compared: %s", path, ", ".join(absent))
    for name, value in json.loads(json.dumps(settings, default=str)).items():
        if name not in absent and saved.get(name) != value:
            meaning = ", because the contents differ" if "digest" in name else ""
            raise SettingError(
                f"'{path}' was saved with {name} {saved.get(name)!r}, this run has {value!r}{meaning}; "
                "a resumed run must have the settings of its checkpoint",
                "output",
            )
    try:
        for custom in path.glob("custom_checkpoint_*.pkl"):  # accelerate would unpickle these files
            torch.load(custom, weights_only=True)
        load(path / f"random_states_{accelerator.process_index}.pkl")  # accelerate ignores a missing or broken file
        accelerator.load_state(str(path), strict=strict)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"'{path}' does not fit this model: {first_line(error)}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"'{path}' holds more than tensors, refused: {first_line(error)}") from None
    return progress


def leave_frozen_out(models: list[nn.Module], weights: list[dict], folder: str) -> None:
    """Remove frozen weights, and second names of tied weights, from a checkpoint; a hook of accelerate.

    Args:
        models: the prepared models.
        weights: state dict of each model, changed in place.
        folder: directory of the checkpoint, unused.
    """
    for model, state in zip(models, weights, strict=False):  # for sharded models, accelerate passes no weights
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
    """Refuse weights that are not finite, because a checkpoint of them would replace a good one.

    Raises:
        ValueError: a trained weight is infinite or not a number.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise not_finite(f"the weight '{name}' is not finite", step, checkpoints)


def not_finite(what: str, step: int, checkpoints: Path) -> SettingError:
    """Return the error of a run with infinite numbers or NaN; it says how to continue."""
    return SettingError(
        f"{what} at step {step}; with a lower learning rate, the run continues from the last checkpoint in "
        f"'{checkpoints}'",
        "learning_rate",
    )
