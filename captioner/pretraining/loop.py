"""Encoder pretraining: from class labels, from teachers that see the same view, and from the words of captions.

Images are decoded once (image_store.py); views are cut on the device (views.py); the teachers' outputs for a view stay
on disk where views repeat (targets.py); batches.py joins all that; heads and losses are in student.py.
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
from captioner.encoders import TokenEncoder, create_encoder, encoder_config
from captioner.encoders.from_vit import create_timm, init_from_vit
from captioner.encoders.lookupvit import LookupViT
from captioner.encoders.registry import has_weights, loading_options
from captioner.encoders.stems import NetworkStem, init_stem
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.pretraining.batches import Batches
from captioner.pretraining.config import PretrainConfig
from captioner.pretraining.probes import open_images, probe_encoder
from captioner.pretraining.student import Student
from captioner.pretraining.teachers import Teacher, TimmTeacher, create_teacher
from captioner.runs.checkpoint import check_finite, not_finite, resume, save_checkpoint
from captioner.runs.config import save_config
from captioner.runs.files import files_whole, share_weights
from captioner.runs.interruption import Interruption
from captioner.runs.log import RunLog
from captioner.runs.processes import pick_precision, start_processes
from captioner.runs.schedule import learning_rates

CHECK_EVERY, SLOW = 10, 0.5
"""Steps between two checks of the clock and of signals, as a check waits for the device; and the seconds of a step
above which every step checks."""

FIXED = (
    *("encoder", "encoder_options", "train_stem", "optimizer", "seed", "ema", "grids", "image_size", "early_size"),
    *("early_share", "late_size", "views", "min_crop", "captions_repeat", "mixup", "cutmix"),
    *("label_weight", "label_smoothing", "word_weight", "words_from"),
)
"""Settings that a resumed run cannot change, besides images and teachers."""


def pretrain(config: PretrainConfig) -> Path:
    """Run the pretraining job and return the folder of the exported encoder.

    Raises:
        ValueError: no data, unknown names, a teacher that does not fit, a checkpoint or the results of another run in
            the output folder, or a loss that is not finite.
        OSError: the disk is full; earlier checkpoints are as they were.
        SystemExit: a signal stopped the run (SIGTERM, SIGINT), which has saved; the code is 128 + the signal.
    """
    with Interruption() as interruption:
        return run(config, interruption)


def run(config: PretrainConfig, interruption: Interruption) -> Path:
    """Set up, then train: take a step, save when due, at the end export and probe; see `pretrain`."""
    if not config.images and config.captions is None:
        raise SettingError("there is nothing to train on", "images", "captions")
    accelerator = start_processes(
        DistributedDataParallelKwargs(find_unused_parameters=config.train_stem > 0),
        mixed_precision=pick_precision(config.mixed_precision),
    )
    per_step, checkpoints = config.batch_size * accelerator.num_processes, config.output / "checkpoints"
    set_seed(config.seed)
    with interruption.at_once():  # decoding may take hours
        teachers = [create_teacher(teacher).to(accelerator.device) for teacher in config.teachers]
        encoder = create_encoder(config.encoder, **config.encoder_options)
        stem = begin(encoder, config, teachers)
        if stem is None and config.train_stem:
            raise SettingError(
                f"train_stem is set, but the stem of '{config.encoder}' is no timm network", "train_stem"
            )
        patch = check_grids(config, encoder)
        if config.probe_train:
            with accelerator.main_process_first():  # the others find them decoded
                open_images(config)
        batches = Batches(config, accelerator, teachers)
    words = batches.words.prior if batches.words else None
    student = Student(encoder, config, batches.shapes, len(batches.store.classes), words)
    if config.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for each grid and size
        student.look = torch.compile(student.look)

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
    saved = began = checked = time.monotonic()
    checked_step, next_check = step, step + 1
    while step < config.steps:
        batch = batches.batch(step * per_step + accelerator.process_index * config.batch_size)
        size = config.early_size if step < config.early_share * config.steps else config.student_size
        pixels = batch.pop("pixels")
        if size != pixels.shape[-1]:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        if stem is not None:
            stem.requires_grad_(step >= config.steps * (1 - config.train_stem))
        with accelerator.autocast():
            losses = student(pixels, pick_grid(config, step, size // patch), **batch)
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
            over = config.max_minutes is not None and now - began > 60 * config.max_minutes
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
        accelerator.print(f"stopped at step {step} of {config.steps}, saved in '{checkpoints}'; run again to go on")
        accelerator.end_training()
        if signal:
            raise SystemExit(128 + signal)
        return config.output
    final, head = ema.module if ema else learned
    if accelerator.is_main_process:
        options = encoder_config(config.encoder, encoder)["kwargs"] | config.encoder_options
        rebuilt = {key: value for key, value in options.items() if key not in loading_options(options)}
        export_encoder(final, rebuilt, config.student_size, config.output)
    if config.probe_train and accelerator.is_main_process:
        classes = batches.store.classes if config.label_weight > 0 else ()
        for record in probe_encoder(final, config, accelerator.device, head, classes):
            log.write({"step": step, **record})
    accelerator.wait_for_everyone()
    accelerator.print(f"encoder in '{config.output}'; to train a captioner on it, name it local-dir:{config.output}")
    accelerator.end_training()
    return config.output


def begin(encoder: TokenEncoder, config: PretrainConfig, teachers: list[Teacher]) -> nn.Module | None:
    """Give the encoder the weights it is to start from: a ViT's, or those of the network that its stem is cut from.

    Returns:
        That network's stages, if the stem is one.

    Raises:
        ValueError: they cannot be had, or they do not fit.
    """
    stem = getattr(encoder, "patch_embed", None)
    if not isinstance(stem, NetworkStem):
        if config.init_from is not None:
            init_from_vit(encoder, config.init_from)
        return None
    if config.init_from is not None:
        network = create_timm("network", config.init_from, pretrained=True)
        init_stem(stem, network, encoder.default_cfg, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    elif not has_weights(config.encoder):
        named = [teacher for teacher in teachers if isinstance(teacher, TimmTeacher) and teacher.fits(stem)]
        if not named:
            raise ValueError(
                f"the stem needs weights of a '{stem.name}' to start from: give --init-from, or a teacher that is one, "
                f"of RGB input and with the stem's options {stem.options}, or other --encoder-options (without a stem, "
                "LookupViT has the paper's linear patches)"
            )
        init_stem(stem, named[0].model, encoder.default_cfg, named[0].mean, named[0].std)
    return stem.backbone.requires_grad_(config.train_stem > 0)


def check_grids(config: PretrainConfig, encoder: TokenEncoder) -> int:
    """Return the patch side in pixels of a LookupViT; 1 for an encoder that does not choose a grid.

    Raises:
        ValueError: a compressed grid is larger than the lookup grid, or than what a probe can pool; or the encoder does
            not take views of the sizes asked for.
    """
    if not isinstance(encoder, LookupViT):
        try_views(config, encoder)
        return 1
    patch = encoder.patch_embed.feat_ratio()
    try_views(config, encoder, (1, 1))
    if max(config.grids) > config.student_size // patch:
        side = config.student_size // patch
        raise ValueError(
            f"grid {max(config.grids)} is larger than the lookup grid {side}x{side} of "
            f"{config.student_size} px views; lower --grids or raise --late-size"
        )
    return patch


@torch.no_grad()
def try_views(config: PretrainConfig, encoder: TokenEncoder, grid: Grid | None = None) -> None:
    """Encode an empty view of each size, as the run and its probe will.

    Args:
        grid: a compressed grid that every size allows; `None` where the encoder has no choice.

    Raises:
        ValueError: the encoder cannot.
    """
    encoder.eval()
    for size in {config.student_size, config.early_size if config.early_share else config.student_size}:
        try:
            encoder.forward_tokens(torch.zeros(1, 3, size, size), grid)
        except (AssertionError, RuntimeError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(
                f"'{config.encoder}' does not take views of {size} px ({why}); "
                "change --late-size or --early-size, or give --encoder-options such as img_size"
            ) from None
    if config.probe_train:
        try:
            encoder.forward_tokens(torch.zeros(1, 3, *(config.student_size,) * 2), (max(config.grids),) * 2)
        except ValueError as error:
            raise ValueError(f"the probe cannot be made: {error}; lower --grids or raise --late-size") from None


def pick_grid(config: PretrainConfig, step: int, largest: int) -> int:
    """Draw the compressed grid of a step, the same in every process; small views bound it by their patches."""
    return min(draw_grid(config.grids, config.seed, step), largest)


def export_encoder(encoder: TokenEncoder, options: dict, size: int, folder: Path) -> None:
    """Write the encoder as timm reads it, for images of `size` px: `create_encoder("local-dir:FOLDER")`.

    Raises:
        OSError: the disk is full or not writable; an encoder that was there is as it was.
    """
    encoder.timm_model.pretrained_cfg["input_size"] = (3, size, size)
    settings = {"model_config": {"num_classes": 0}, "model_args": options, "safe_serialization": True}
    with files_whole(folder, "the encoder") as temporary:
        save_for_hf(encoder.timm_model, temporary, **settings)
        share_weights(temporary)
