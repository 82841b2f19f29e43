"""Encoder pretraining: the student learns from class labels, from teachers that see the same view, and from captions.

Images are decoded once (`image_store.py`). Views are cut on the device (`views.py`). Where views repeat, the teachers'
outputs for them are stored on disk (`targets.py`). `batches.py` joins these; heads and losses are in `student.py`.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import set_seed
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from captioner.data.stream import draw_grid
from captioner.encoders import TokenEncoder, create_encoder, describe_encoder
from captioner.encoders.registry import has_weights
from captioner.errors import SettingError, first_line
from captioner.grids import Grid, write_grid
from captioner.pretraining.batches import Batches
from captioner.pretraining.config import PretrainConfig
from captioner.pretraining.probes import open_images, probe_encoder
from captioner.pretraining.student import Student
from captioner.pretraining.teachers import Teacher, create_teacher
from captioner.runs.checkpoint import check_finite, not_finite, resume, save_checkpoint
from captioner.runs.config import save_config
from captioner.runs.files import check_folder, files_whole, share_weights
from captioner.runs.interruption import Interruption
from captioner.runs.log import RunLog
from captioner.runs.processes import pick_precision, start_processes
from captioner.runs.schedule import learning_rates

CHECK_EVERY, SLOW = 10, 0.5
"""Steps between two checks of the clock and of signals, because a check waits for the device; and the seconds of a step
from which each step checks."""

FIXED = (
    *("encoder", "encoder_options", "train_stem", "optimizer", "seed", "ema", "grids", "image_size", "early_size"),
    *("early_share", "late_size", "views", "min_crop", "captions_repeat", "mixup", "cutmix"),
    *("label_weight", "label_smoothing", "word_weight", "words_from", "tag_weight", "tags_from"),
)
"""Settings that a resumed run cannot change, in addition to images and teachers."""


def pretrain(config: PretrainConfig) -> Path:
    """Run the pretraining job and return the folder of the exported encoder.

    Raises:
        ValueError: there are no data, a name is unknown, a teacher does not fit, the output folder holds the results of
            another run, or the loss is not finite.
        OSError: the disk is full; earlier checkpoints are unchanged.
        SystemExit: a signal (SIGTERM, SIGINT) stopped the run, which saved a checkpoint; the code is 128 + the signal.
    """
    with Interruption() as interruption:
        return run(config, interruption)


def run(config: PretrainConfig, interruption: Interruption) -> Path:
    """Set up the run, then train. Each turn of the loop is one step; checkpoints are saved when due.

    At the end, the encoder is exported and probed. For errors see `pretrain`.
    """
    if not config.images and not config.captions:
        raise SettingError("there is nothing to train on", "images", "captions")
    check_folder(config.output)
    accelerator = start_processes(
        DistributedDataParallelKwargs(find_unused_parameters=config.train_stem > 0),
        mixed_precision=pick_precision(config.mixed_precision),
    )
    per_step, checkpoints = config.batch_size * accelerator.num_processes, config.output / "checkpoints"
    set_seed(config.seed)
    with interruption.at_once():  # decoding may take hours
        teachers = [create_teacher(teacher).to(accelerator.device) for teacher in config.teachers]
        encoder = create_encoder(config.encoder, **config.encoder_options)
        part = load_initial_weights(encoder, config, teachers)
        if part is None and config.train_stem:
            raise SettingError(
                f"train_stem is set, but the stem of '{config.encoder}' is no timm network", "train_stem"
            )
        check_views(encoder, config)
        if config.probe_train:
            with accelerator.main_process_first():  # the other processes then find the images decoded
                open_images(config)
        batches = Batches(config, accelerator, teachers)
    words, tags = (described.prior if described else None for described in (batches.words, batches.tags))
    if config.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for each grid and size
    student = Student(encoder, config, batches.shapes, len(batches.store.classes), words, tags)

    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer = create_optimizer_v2(student, opt=config.optimizer, **options)
    student, optimizer = accelerator.prepare(student, optimizer)
    learned = nn.ModuleList([encoder, accelerator.unwrap_model(student).label_head or nn.Identity()])
    ema = ModelEmaV3(learned, decay=config.ema, use_warmup=True) if config.ema else None
    if ema:
        accelerator.register_for_checkpointing(ema)

    log = RunLog(accelerator, config.output, config.steps, config.log_every, counted="images")
    settings = {name: getattr(config, name) for name in FIXED} | {"images per step": per_step} | batches.settings()
    step = 0
    exported = config.output / "model.safetensors"
    if resumed := resume(accelerator, checkpoints, config.resume, settings, model=exported, log=log.path):
        step = resumed["step"]
        log.load_state(resumed["log"], step)
    else:
        log.start_over()
    schedule = learning_rates(optimizer.optimizer, config.learning_rate, config.warmup, step, config.steps)
    if accelerator.is_main_process:
        save_config(config, config.output)

    student.train()
    saved = started = checked = time.monotonic()
    checked_step, next_check = step, step + 1
    while step < config.steps:
        batch = batches.batch(step * per_step + accelerator.process_index * config.batch_size)
        size = config.early_size if step < config.early_share * config.steps else config.student_size
        pixels = batch.pop("pixels")
        if size != pixels.shape[-1]:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        if part is not None:
            part.requires_grad_(step >= config.steps * (1 - config.train_stem))
        with accelerator.autocast():
            losses = student(pixels, draw_square_grid(encoder, config, step, size), **batch)
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(student.parameters(), config.clip)
        rate = float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if ema:
            ema.update(learned, step)
        means = accelerator.reduce(torch.stack([loss.detach().float() for loss in losses.values()]), "mean")
        measured = dict(zip(losses, means, strict=True))
        if step % config.log_every == 0 and not torch.isfinite(measured["loss"]):
            raise not_finite(f"the loss is {measured['loss'].item()}", step, checkpoints)
        log.step(step, {**measured, "images": per_step}, rate)

        signal: int | None = None
        over = due = False
        if step == next_check:
            now = time.monotonic()
            over = config.max_minutes is not None and now - started > 60 * config.max_minutes
            due = now - saved > 60 * config.save_minutes
            slow = now - checked > SLOW * (step - checked_step)
            signal, (over, due, slow) = interruption.agree(accelerator, over, due, slow)
            checked, checked_step, next_check = time.monotonic(), step, step + (1 if slow else CHECK_EVERY)
        if signal or over or due or step == config.steps:
            check_finite(student, step, checkpoints)
            save_checkpoint(accelerator, checkpoints, step, {"settings": settings, "log": log.state()})
            saved = checked = time.monotonic()
        if signal or over:
            break
    log.close()
    if step < config.steps:
        accelerator.print(
            f"stopped at step {step} of {config.steps}, saved in '{checkpoints}'; run it again to continue"
        )
        accelerator.end_training()
        if signal:
            raise SystemExit(128 + signal)
        return config.output
    final, head = ema.module if ema else learned
    if accelerator.is_main_process:
        options = describe_encoder(config.encoder, **config.encoder_options)["kwargs"]
        export_encoder(final, options, config.student_size, config.output)
    if config.probe_train and accelerator.is_main_process:
        classes = batches.store.classes if config.label_weight > 0 else ()
        for record in probe_encoder(final, config, accelerator.device, head, classes):
            log.write({"step": step, **record})
    accelerator.wait_for_everyone()
    accelerator.print(f"encoder in '{config.output}'; to train a captioner on it, name it local-dir:{config.output}")
    accelerator.end_training()
    return config.output


def load_initial_weights(encoder: TokenEncoder, config: PretrainConfig, teachers: list[Teacher]) -> nn.Module | None:
    """Load the weights that the encoder starts from: those of `init_from`, or of a teacher that fits.

    Returns:
        The part of the encoder that is cut from a pretrained network, or None.

    Raises:
        ValueError: the weights cannot be loaded or do not fit.
    """
    part = encoder.pretrained_part
    if config.init_from is not None:
        encoder.init_from(config.init_from)
    elif part is not None and not has_weights(config.encoder):
        fitting = [teacher for teacher in teachers if teacher.fits(part.name, part.options)]
        if not fitting:
            raise SettingError(
                f"a part of the encoder is cut from a '{part.name}' and needs its weights to start from: no network is "
                f"named, and no teacher is this one, of RGB input and with the options {part.options}",
                *("init_from", "teachers", "encoder_options"),
            )
        encoder.init_from(fitting[0].model, fitting[0].mean, fitting[0].std)
    return part.module.requires_grad_(config.train_stem > 0) if part is not None else None


@torch.no_grad()
def check_views(encoder: TokenEncoder, config: PretrainConfig) -> None:
    """Check before the run that the encoder takes views of all sizes, and has all grids.

    Raises:
        SettingError: the encoder does not take views of a size, or a grid is larger than its map of cells.
    """
    encoder.eval()
    sizes = {config.student_size, config.early_size if config.early_share else config.student_size}
    for size in sorted(sizes):
        try:
            encoder.forward_maps(torch.zeros(1, 3, size, size), (1, 1) if encoder.chooses_grid else None)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise SettingError(
                f"'{config.encoder}' does not take views of {size} px ({first_line(error)})",
                *("late_size", "early_size", "encoder_options"),
            ) from None
    if encoder.chooses_grid or config.probe_train:
        side, size = max(config.grids), config.student_size
        largest = encoder.largest_grid((size, size))
        if side > min(largest):
            raise SettingError(
                f"grid {write_grid((side, side))} is larger than the {encoder.map_name} {write_grid(largest)} of "
                f"{size} px views",
                *("grids", "late_size"),
            )


def draw_square_grid(encoder: TokenEncoder, config: PretrainConfig, step: int, size: int) -> Grid | None:
    """Draw the compressed grid of a step, which is the same in every process.

    Args:
        encoder: the student's encoder.
        config: the run.
        step: number of the step.
        size: side of the views in pixels. Small views have a smaller map of cells, which limits the grid.

    Returns:
        The grid; `None` for an encoder that does not choose its grid.
    """
    if not encoder.chooses_grid:
        return None
    side = min(draw_grid(config.grids, config.seed, step), *encoder.largest_grid((size, size)))
    return side, side


def export_encoder(encoder: TokenEncoder, options: dict, size: int, folder: Path) -> None:
    """Write the encoder as a folder of timm, for `create_encoder("local-dir:FOLDER")`.

    Args:
        encoder: the encoder.
        options: keyword arguments that build the encoder again.
        size: side in pixels of the images that the encoder is made for.
        folder: the folder.

    Raises:
        OSError: the disk is full or not writable; an earlier encoder in the folder is unchanged.
    """
    encoder.timm_model.pretrained_cfg["input_size"] = (3, size, size)
    settings = {"model_config": {"num_classes": 0}, "model_args": options, "safe_serialization": True}
    with files_whole(folder, "the encoder") as temporary:
        save_for_hf(encoder.timm_model, temporary, **settings)
        share_weights(temporary)
