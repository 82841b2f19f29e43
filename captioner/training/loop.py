"""Decoder training on a frozen encoder: one loop for all stages (`stages.py`).

Letters: B images, K captions of each, T text tokens.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from torch import nn

from captioner.data.fingerprint import encoder_fingerprint
from captioner.data.stream import raise_errors
from captioner.labels import count_targets
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.report.curves import write_curves
from captioner.report.samples import write_samples
from captioner.runs.checkpoint import check_finite, leave_frozen_out, not_finite, resume, save_checkpoint
from captioner.runs.config import save_config
from captioner.runs.digests import digest_json, digest_tensors
from captioner.runs.files import check_folder, recover_folder
from captioner.runs.interruption import Interruption
from captioner.runs.log import RunLog, check_trackers
from captioner.runs.processes import pick_precision, start_processes
from captioner.runs.schedule import learning_rates
from captioner.runs.sharding import check_sharding, whole_weights
from captioner.training.build import starting_point, text_stage_of, trainable_parameters, training_grids
from captioner.training.config import TrainConfig
from captioner.training.data import open_data
from captioner.training.objectives import Objective
from captioner.training.saving import save_best
from captioner.training.stages import open_stage

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Path:
    """Run the training job and return the folder of the best model.

    Raises:
        ValueError: there are no data, an encoder or decoder cannot be loaded, the token cache is of another encoder,
            the output folder holds the results of another run, or the loss is not finite.
        OSError: the disk is full; earlier checkpoints and the best model are unchanged.
        SystemExit: a signal (SIGTERM, SIGINT) stopped the run, which saved a checkpoint; the code is 128 + the signal.
    """
    with Interruption() as interruption:
        return run(config, interruption)


def run(config: TrainConfig, interruption: Interruption) -> Path:
    """Set up the run, then train. Each turn of the loop validates when due, takes a step, and saves when due.

    For errors see `train`.
    """
    check_trackers(config.trackers)
    check_folder(config.folder)
    folder, checkpoints = config.folder, config.folder / "checkpoints"
    accelerator = start_processes(
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        mixed_precision=pick_precision(config.mixed_precision),
        log_with=list(config.trackers) or None,
        project_dir=folder,
    )
    check_sharding(accelerator, unsharded="encoder|tag_head")
    set_seed(config.seed)
    with accelerator.main_process_first():  # the other processes then find the table cached
        data, held_out = open_data(config)
        if accelerator.is_main_process:
            recover_folder(config.output / "best")
            recover_folder(folder / "best")
    model, processor = starting_point(config, data.captions)
    grids = training_grids(config, model, processor)
    per_step = config.batch_size * config.accumulation * accelerator.num_processes
    stage = open_stage(config, accelerator, data, held_out, model, processor, grids, per_step)

    steps_per_epoch = max(1, stage.size // per_step)
    total = math.ceil(config.epochs * steps_per_epoch)
    evaluate_steps = max(1, round(config.evaluate_every * steps_per_epoch))
    optimizer = create_optimizer(model, config)
    trainable, parts = trainable_parameters(model), part_digests(model, processor)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_save_state_pre_hook(leave_frozen_out)
    set_seed(config.seed, device_specific=True)  # dropout and samples differ between processes

    log = RunLog(accelerator, folder, total, config.log_every, counted="tokens")
    settings = fixed_settings(config, per_step) | parts | stage.settings
    progress: dict[str, Any] = {"step": 0, "evaluated": None, "best": None, "stale": 0}
    best = folder / "best"
    resumed = resume(accelerator, checkpoints, config.resume, settings, model=best, log=log.path, strict=False)
    if resumed is not None:
        progress = {key: resumed[key] for key in progress}
        log.load_state(resumed["log"], progress["step"])
    else:
        log.start_over()
        if config.init_from is None and config.stage != "scst" and text_stage_of(config) is None:
            progress["evaluated"] = 0  # a decoder without training has nothing to validate
    schedule = learning_rates(optimizer.optimizer, config.learning_rate, config.warmup, progress["step"], total)
    if accelerator.is_main_process:
        save_config(config, folder)
    if config.trackers:
        accelerator.init_trackers("captioner", {"config": json.dumps(dataclasses.asdict(config), default=str)})
    start = progress["step"] * per_step
    stream = stage.stream
    loader = stream.loader(start, total * per_step, config.batch_size, config.data.workers, stream.collate)
    batches = raise_errors(accelerator.prepare(loader))
    held_out_images = sum(len(part.table) for part in held_out)
    accelerator.print(
        f"{stage.size} training {stage.unit} and {held_out_images} validation images, "
        f"{trainable / 1e6:.1f}M trainable parameters, {total} steps of {per_step} {stage.unit}"
    )
    if per_step > stage.size:
        accelerator.print(
            f"a step takes more {stage.unit} than there are: an epoch is then one step, and draws each of them "
            f"{per_step / stage.size:.3g} times"
        )

    def save() -> None:
        check_finite(model, progress["step"], checkpoints)
        content = {**progress, "settings": settings, "log": log.state()}
        save_checkpoint(accelerator, checkpoints, progress["step"], content, config.keep_checkpoints)

    saved = time.monotonic()
    while True:
        step = progress["step"]
        if (step % evaluate_steps == 0 or step >= total) and progress["evaluated"] != step:
            save()
            with interruption.at_once(), whole_weights(model):
                record, captions = stage.validate(model)
            progress |= {"evaluated": step, "stale": progress["stale"] + 1}
            if stage.better(record, progress["best"]):
                progress |= {"best": record[stage.measure], "stale": 0}
                save_best(accelerator, model, processor, best, config.save_dtype)
            log.show(**{stage.measure: f"{record[stage.measure]:.3f}"})
            samples = [result["caption"] for _, results in captions for result in results[:3]]
            record = {"step": step, **record} | ({"samples": samples} if samples else {})
            log.write(record)
            if accelerator.is_main_process and captions:
                pages = [(part.name, part.table, results) for part, results in captions]
                write_samples(accelerator, pages, record, folder / "samples")
            if accelerator.is_main_process:
                write_curves(log.records(), folder / "curves.svg")
            save()
            saved = time.monotonic()
        if step >= total or (config.patience is not None and progress["stale"] >= config.patience):
            break

        measured = train_step(accelerator, model, batches, stage.objective, config)
        if not math.isfinite(measured["loss"]):
            raise not_finite(f"the loss is {measured['loss']}", step, checkpoints)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        rate = float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress["step"] = step = step + 1
        log.step(step, measured, rate)

        due = time.monotonic() - saved > 60 * config.save_minutes
        stop, (due,) = interruption.agree(accelerator, accelerator.is_main_process and due)
        if stop or due or (config.save_steps is not None and step % config.save_steps == 0):
            save()
            saved = time.monotonic()
        if stop:
            log.close()
            accelerator.print(f"stopped at step {step} of {total}, saved in '{checkpoints}'; run it again to continue")
            accelerator.end_training()
            raise SystemExit(128 + stop)
    log.close()
    if step < total:
        accelerator.print(
            f"stopped at step {step} of {total}: {config.patience} validations without a better {stage.measure}"
        )
    accelerator.print(f"best validation {stage.measure} {progress['best']:.4f}, model in {best}")
    accelerator.end_training()
    return best


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters: timm leaves out those without gradient."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "betas": (0.9, 0.98), "fused": True}
    return create_optimizer_v2(model, opt="adamw", **options)


def train_step(
    accelerator: Accelerator, model: nn.Module, batches: Iterator[dict], objective: Objective, config: TrainConfig
) -> dict[str, float]:
    """Accumulate the gradient of one optimiser step, in which every token has the same weight.

    The gradient does not depend on how the captions are split into forwards and processes.

    Args:
        accelerator: accelerator that prepared the model.
        model: the prepared model.
        batches: the batches; a step takes `accumulation` of them.
        objective: what the step learns from.
        config: the run.

    Returns:
        Over all processes: the `loss` per token, the number of `tokens` that were learned, and the objective's means.
    """
    model.train()
    group = [objective.prepare(model, next(batches)) for _ in range(config.accumulation)]
    tokens = sum(count_targets(batch["labels"]) for batch in group)
    tokens = accelerator.reduce(tokens, "sum").clamp(min=1)
    totals: dict[str, torch.Tensor | float] = {"loss": torch.zeros((), device=accelerator.device)}
    for number, batch in enumerate(group):
        last = number == len(group) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss, means = objective.loss(model, batch)
                loss = loss / tokens
            accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        totals["loss"] += loss.detach()
        for name, mean in means.items():
            totals[name] = totals.get(name, 0.0) + mean / (len(group) * accelerator.num_processes)
    values = torch.tensor([float(value) for value in totals.values()], device=accelerator.device)
    summed = dict(zip(totals, accelerator.reduce(values, "sum").tolist(), strict=True))
    return {**summed, "tokens": tokens.item()}


def part_digests(model: CaptionerModel, processor: CaptionerProcessor) -> dict[str, str]:
    """Return digests of the parts of a run that no checkpoint holds: frozen weights, preprocessing, tokenizer."""
    frozen = {name: value for name, value in model.decoder.named_parameters() if not value.requires_grad}
    return {
        "encoder digest": digest_json(encoder_fingerprint(model.encoder, model.config.encoder_config, processor.image)),
        "frozen decoder digest": digest_tensors(frozen),
        "tokenizer digest": digest_json(processor.tokenizer.get_vocab()),
    } | ({} if model.tag_head is None else {"tag head digest": digest_tensors(model.tag_head.state_dict())})


def fixed_settings(config: TrainConfig, per_step: int) -> dict:
    """Return the settings that a resumed run cannot change: those of the model and of the order of the data."""
    model = {f"model.{key}": value for key, value in dataclasses.asdict(config.model).items()}
    del model["model.tags"]  # a digest stands for the tag head, whose folder may have another name by now
    rewards = {f"scst.{key}": value for key, value in dataclasses.asdict(config.scst).items()}
    later = ("meteor_weight", "object_weight", "objects", "xe_weight")  # None where an earlier version lacks them
    rewards |= {f"scst.{name}": getattr(config.scst, name) or None for name in later}
    settings = {"stage": config.stage, "init_from": config.init_from, "seed": config.seed, **model}
    settings["grids"] = " ".join(config.grids) or None
    return {**settings, **(rewards if config.stage == "scst" else {}), "images per step": per_step}
