"""Encoder pretraining: from class labels, from teachers that see the same view, and from the words of captions.

Pictures are decoded once (data/pictures.py); views are cut on the device (data/views.py); what teachers say about a
view is kept where views repeat (training/targets.py); heads and losses are in training/distill.py.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data.mixup import Mixup, mixup_target
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from transformers import get_cosine_schedule_with_warmup

from captioner.data.captions import read_captions
from captioner.data.pictures import Source, open_source, store_pictures
from captioner.data.views import ViewOrder, cut_views, draw_views
from captioner.data.words import CaptionWords
from captioner.encoders import TokenEncoder, create_encoder, encoder_config
from captioner.encoders.from_vit import init_from_vit
from captioner.encoders.lookupvit import LookupViT
from captioner.training.checkpoint import check_finite, not_finite, resume, save_checkpoint
from captioner.training.config import save_config
from captioner.training.distill import Student
from captioner.training.encoder_config import PretrainConfig
from captioner.training.interruption import Interruption
from captioner.training.precision import pick_precision
from captioner.training.probe import probe_encoder
from captioner.training.run_log import RunLog
from captioner.training.targets import Targets, TargetStore
from captioner.training.teachers import create_teacher

ASK_EVERY = 10
"""Steps between two looks at the clock and for signals: asking waits for the device."""


def pretrain(config: PretrainConfig) -> Path:
    """Run the pretraining job and return the folder of the exported encoder.

    Raises:
        ValueError: no data, unknown names, a teacher that does not fit, a checkpoint of another run, or a loss that is
            not finite.
        OSError: the disk is full; earlier checkpoints are as they were.
        SystemExit: the run was told to stop (SIGTERM, SIGINT) and has saved; the code is 128 + the signal.
    """
    with Interruption() as interruption:
        return run(config, interruption)


def run(config: PretrainConfig, interruption: Interruption) -> Path:
    """Set up, then train: step, save where due, at the end export and probe; see `pretrain`."""
    accelerator = Accelerator(mixed_precision=pick_precision(config.mixed_precision))
    per_step, checkpoints = config.batch_size * accelerator.num_processes, config.output / "checkpoints"
    set_seed(config.seed)
    batches = Batches(config, accelerator)
    encoder = create_encoder(config.encoder, **config.encoder_options)
    if config.init_from is not None:
        init_from_vit(encoder, config.init_from)
    patch = check_grids(config, encoder)
    words = batches.words.prior if batches.words else None
    student = Student(encoder, config, batches.shapes, len(batches.store.classes), words)
    if config.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for each grid and size
        student.look = torch.compile(student.look)

    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer = create_optimizer_v2(student, opt=config.optimizer, **options)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * config.steps), config.steps)
    student, optimizer = accelerator.prepare(student, optimizer)
    ema = ModelEmaV3(encoder, decay=config.ema, use_warmup=True) if config.ema else None
    accelerator.register_for_checkpointing(schedule, *([ema] if ema else []))

    log = RunLog(accelerator, config.output, config.steps, config.log_every, counted="images")
    settings = {name: getattr(config, name) for name in ("encoder", "encoder_options", "seed", "views", "ema")}
    settings["images per step"] = per_step
    step = 0
    if resumed := resume(accelerator, checkpoints, config.resume, settings):
        step = resumed["step"]
        log.load_state(resumed["log"], step)
    if accelerator.is_main_process:
        save_config(config, config.output)

    student.train()
    saved = began = time.monotonic()
    while step < config.steps:
        batch = batches.batch(step * per_step + accelerator.process_index * config.batch_size)
        size = config.early_size if step < config.early_share * config.steps else config.image_size
        pixels = batch.pop("pixels")
        if size != pixels.shape[-1]:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        with accelerator.autocast():
            losses = student(pixels, pick_grid(config, step, size // patch), **batch)
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(student.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if ema:
            ema.update(encoder, step)
        measured = {name: loss.detach() for name, loss in losses.items()}
        if step % config.log_every == 0 and not torch.isfinite(measured["loss"]):
            raise ValueError(not_finite(f"the loss is {measured['loss'].item()}", step, checkpoints))
        log.step(step, {**measured, "images": per_step}, schedule.get_last_lr()[0])

        signal, over, due = None, False, False
        if step % ASK_EVERY == 0:
            now = time.monotonic()
            over = config.max_minutes is not None and now - began > 60 * config.max_minutes
            due = now - saved > 60 * config.save_minutes
            signal, over, due = interruption.agree(accelerator, over, due)
        if signal or over or due or step == config.steps:
            check_finite(student, step, checkpoints)
            save_checkpoint(accelerator, checkpoints, step, {"settings": settings, "log": log.state()})
            saved = time.monotonic()
        if signal or over:
            break
    log.close()
    if step < config.steps:
        accelerator.print(f"stopped at step {step} of {config.steps}, saved in '{checkpoints}'; run again to go on")
        accelerator.end_training()
        if signal:
            raise SystemExit(128 + signal)
        return config.output
    final = ema.module if ema else encoder
    if accelerator.is_main_process:
        rebuilt = encoder_config(config.encoder, encoder)["kwargs"] | config.encoder_options
        export_encoder(final, rebuilt, config.output)
    if config.probe_train and config.probe_val:
        for record in probe_encoder(final, config, accelerator.device):
            log.write({"step": step, **record})
    accelerator.end_training()
    return config.output


class Batches:
    """Views with everything that is known about them: teachers' outputs, class labels, caption words.

    Attributes:
        store: the pictures.
        words: caption words of the first pictures in the store, if there are captions.
        shapes: shapes of each teacher's outputs.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        folder = config.store or config.output / "store"
        sources, self.words, self.word_targets = [], None, None
        if config.captions is not None:
            table = read_captions(config.captions, config.captions_split)
            self.words = CaptionWords(table["captions"][:], config.num_words)
            self.word_targets = torch.from_numpy(self.words.targets).to(self.device)
            name = f"{config.captions} {config.captions_split}"
            sources.append(Source(name, [(image, None) for image in table["image"][:]], str(table["image_id"][:])))
        sources += [open_source(name) for name in config.images]
        if not sources:
            raise ValueError("nothing to train on: name pictures with --images, or captions with --captions")
        with accelerator.main_process_first():  # the others find them decoded
            self.store = store_pictures(sources, config.store_size, folder, config.workers).to(self.device)
        if config.label_weight > 0 and not self.store.classes:
            raise ValueError("no picture has a class: give folders per class or a `label` column, or --label-weight 0")
        repeats = [config.captions_repeat if config.captions and i == 0 else 1 for i in range(len(sources))]
        groups = [np.arange(r.start, r.stop)[self.store.usable[r.start : r.stop]] for r in self.store.ranges]
        self.order = ViewOrder(groups, repeats, config.seed, config.views)

        self.teachers = [create_teacher(teacher).to(self.device) for teacher in config.teachers]
        example = torch.zeros(2, 3, config.image_size, config.image_size, device=self.device)
        self.shapes = [{k: tuple(v.shape[1:]) for k, v in teacher(example).items()} for teacher in self.teachers]
        self.kept: list[TargetStore] = []
        if config.views is not None:
            view = (config.seed, config.image_size, config.min_crop, self.store.stamp)
            for number, teacher in enumerate(config.teachers):
                stamp = repr((view, dataclasses.replace(teacher, **dict.fromkeys(WEIGHTS, 0.0))))
                place = folder / f"teacher_{number + 1}"
                self.kept.append(TargetStore(place, stamp, len(self.store), config.views))
        kinds = len(self.store.classes)
        self.mixup = None
        if config.mixup or config.cutmix:
            options = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix}
            self.mixup = Mixup(**options, label_smoothing=config.label_smoothing, num_classes=kinds)

    def batch(self, position: int) -> dict:
        """Return the views from a position of the run on, as `Student.forward` wants them."""
        config = self.config
        rows, versions = self.order.views(position, config.batch_size)
        index = torch.from_numpy(rows)
        views = draw_views(config.seed, rows, versions, config.min_crop)
        pixels = cut_views(self.store.batch(index, self.device), views, config.image_size)
        labels = None
        if config.label_weight > 0:
            pixels, labels = self.soft_labels(pixels, self.store.labels[index].to(self.device))
        targets = [self.ask(number, pixels, rows, versions) for number in range(len(self.teachers))]
        words = None
        if self.word_targets is not None:
            rows_here = index.to(self.device)
            words = self.word_targets[rows_here.clamp(max=len(self.word_targets) - 1)]
            words = words.masked_fill((rows_here >= len(self.word_targets))[:, None], float("nan"))
        return {"pixels": pixels, "targets": targets, "labels": labels, "words": words}

    def ask(self, number: int, pixels: torch.Tensor, rows: np.ndarray, versions: np.ndarray) -> Targets:
        """Return what a teacher says about views, from disk where it has been asked before."""
        teacher = self.teachers[number]
        with self.accelerator.autocast():
            if not self.kept:
                return teacher(pixels)
            targets = self.kept[number].get(rows, versions, lambda places: teacher(pixels[places.to(pixels.device)]))
        return {name: value.to(self.device, non_blocking=True) for name, value in targets.items()}

    def soft_labels(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn class labels (B,) into probabilities (B, K), smoothed and mixed; rows without a label are zero."""
        known = labels >= 0
        labels = labels.clamp(min=0)
        if self.mixup is None:
            soft = mixup_target(labels, len(self.store.classes), 1.0, self.config.label_smoothing)
        else:
            pixels, soft = self.mixup(pixels, labels)
            known = known & known.flip(0)  # a view is mixed with its opposite in the batch
        return pixels, soft * known[:, None]


WEIGHTS = ("logit_weight", "pooled_weight", "grid_weight", "map_weight", "temperature")
"""Settings of a teacher that its outputs do not depend on."""


def check_grids(config: PretrainConfig, encoder: TokenEncoder) -> int:
    """Return the patch side in pixels of a LookupViT; 1 for an encoder that does not choose a grid.

    Raises:
        ValueError: a compressed grid is larger than the lookup grid.
    """
    if not isinstance(encoder, LookupViT):
        return 1
    patch = encoder.patch_embed.patch_size[0]
    if max(config.grids) > config.image_size // patch:
        side = config.image_size // patch
        raise ValueError(
            f"grid {max(config.grids)} is larger than the lookup grid {side}x{side} of {config.image_size} px views; "
            "lower --grids or raise --image-size"
        )
    return patch


def pick_grid(config: PretrainConfig, step: int, largest: int) -> int:
    """Draw the compressed grid of a step, the same in every process; small views bound it by their patches."""
    return min(int(np.random.default_rng((config.seed, step)).choice(config.grids)), largest)


def export_encoder(encoder: TokenEncoder, options: dict, folder: Path) -> None:
    """Write the encoder as timm reads it: `create_encoder("local-dir:FOLDER", pretrained=True)`."""
    settings = {"model_config": {"num_classes": 0}, "model_args": options, "safe_serialization": True}
    save_for_hf(encoder.timm_model, folder, **settings)
