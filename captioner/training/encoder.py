"""Encoder pretraining: a student learns what a teacher sees, and the words people use, from the same random view.

Letters: B batch, g compressed grid side, D student width, C teacher channels, K teacher classes, V caption words.
"""

import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from captioner.data.captions import read_captions
from captioner.data.views import CaptionWords, ViewStream, list_images
from captioner.encoders import TokenEncoder, create_encoder
from captioner.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from captioner.training.config import save_config
from captioner.training.encoder_config import PretrainConfig
from captioner.training.teachers import Teacher

logger = logging.getLogger(__name__)


class Distiller(nn.Module):
    """The student with the heads it learns through; the heads are thrown away afterwards.

    The class token predicts the teacher's class probabilities, its pooled feature and the caption words; each
    compressed token predicts the teacher's feature map at its place. Teacher features are standardised per channel by
    running statistics, so that every channel counts alike.
    """

    def __init__(self, encoder: TokenEncoder, teacher: Teacher, word_prior: np.ndarray | None = None):
        super().__init__()
        self.encoder, self.config = encoder, teacher.config
        dim, channels = encoder.embed_dim, teacher.channels
        cfg = encoder.default_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1))
        self.grid_norm = nn.BatchNorm2d(channels, affine=False, momentum=0.02)
        self.pooled_norm = nn.BatchNorm1d(channels, affine=False, momentum=0.02)
        self.grid_head = nn.Linear(dim, channels)
        self.pooled_head = nn.Linear(dim, channels)
        self.logit_head = nn.Linear(dim, teacher.config.num_classes)
        self.word_head = None
        if word_prior is not None:
            self.word_head = nn.Linear(dim, len(word_prior))
            prior = torch.from_numpy(word_prior).clamp(1e-4, 1 - 1e-4)
            self.word_head.bias.data.copy_(torch.logit(prior))

    def forward(
        self, pixels: torch.Tensor, grid: int, targets: dict[str, torch.Tensor], words: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Compare the student on views (B, 3, S, S) in [0, 1] with the teacher's outputs.

        Args:
            grid: side g of the compressed grid.
            targets: what `Teacher.forward` returned for the same views.
            words: share of captions with each word (B, V); rows of NaN have no captions.

        Returns:
            The losses, unweighted, as scalars: `grid`, `pooled`, `logits` and, with words, `words`.
        """
        tokens = self.encoder.forward_tokens((pixels - self.mean) / self.std, (grid, grid))  # (B, 1+g*g, D)
        summary, places = tokens[:, 0], tokens[:, 1:]
        wanted = self.grid_norm(targets["grid"].float())  # (B, C, h, w)
        wanted = resize_map(wanted, grid).flatten(2).mT  # (B, g*g, C)
        losses = {
            "grid": F.smooth_l1_loss(self.grid_head(places).float(), wanted),
            "pooled": F.smooth_l1_loss(self.pooled_head(summary).float(), self.pooled_norm(targets["pooled"].float())),
            "logits": self.divergence(self.logit_head(summary).float(), targets["logits"].float()),
        }
        if self.word_head is not None:
            known = ~words[:, 0].isnan()
            loss = F.binary_cross_entropy_with_logits(
                self.word_head(summary).float(), words.nan_to_num(), weight=known[:, None].float(), reduction="sum"
            )
            losses["words"] = loss / known.sum().clamp(min=1)
        return losses

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence of softened class distributions, both given as logits (B, K)."""
        t = self.config.temperature
        return (
            F.kl_div((student / t).log_softmax(-1), (teacher / t).log_softmax(-1), None, None, "batchmean", True) * t**2
        )


def resize_map(feature_map: torch.Tensor, grid: int) -> torch.Tensor:
    """Bring a map (B, C, h, w) to (B, C, g, g): averaged when it shrinks, bilinear when it grows."""
    if grid <= min(feature_map.shape[-2:]):
        return F.adaptive_avg_pool2d(feature_map, grid)
    return F.interpolate(feature_map, size=(grid, grid), mode="bilinear")


def pretrain(config: PretrainConfig) -> Path:
    """Run the pretraining job and return the folder of the exported encoder.

    Raises:
        ValueError: no data, unknown names, a teacher that does not fit, or a loss that is not finite.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    per_step = config.batch_size * accelerator.num_processes
    stream, words = open_data(config, per_step)
    teacher = Teacher(config.teacher).to(accelerator.device)
    encoder = create_encoder(config.encoder, **config.encoder_options)
    if accelerator.is_main_process:
        save_config(config, config.output)

    distiller = Distiller(encoder, teacher, words.prior if words else None)
    optimizer = create_optimizer_v2(distiller, opt="adamw", lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * config.steps), config.steps)
    distiller, optimizer = accelerator.prepare(distiller, optimizer)
    accelerator.register_for_checkpointing(schedule)

    step, checkpoints = 0, config.output / "checkpoints"
    if config.resume and (found := list_checkpoints(checkpoints)):
        step = load_checkpoint(accelerator, found[-1])["step"]
        accelerator.print(f"resumed from {found[-1]}")
    loader = stream.loader(step * per_step, config.steps * per_step, config.batch_size, config.workers)
    loader = accelerator.prepare(loader)
    weights = {
        "grid": config.teacher.grid_weight,
        "pooled": config.teacher.pooled_weight,
        "logits": config.teacher.logit_weight,
        "words": config.word_weight,
    }
    word_targets = torch.from_numpy(words.targets) if words else None

    distiller.train()
    start = saved = time.monotonic()
    history: list[dict[str, float]] = []
    for batch in loader:
        grid = int(np.random.default_rng((config.seed, step)).choice(config.grids))  # the same in every process
        pixels = batch["pixels"].float() / 255
        targets = teacher(pixels)
        with accelerator.autocast():
            losses = distiller(pixels, grid, targets, select_words(word_targets, batch["row"]))
        loss = sum(weights[name] * value for name, value in losses.items())
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower --learning-rate and run again to resume")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(distiller.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1

        history.append({name: value.item() for name, value in losses.items()})
        now = time.monotonic()
        if step % config.log_every == 0 or step == config.steps:
            means = {name: round(float(np.mean([h[name] for h in history])), 4) for name in history[0]}
            rate = len(history) * per_step / max(now - start, 1e-9)
            log(accelerator, config.output, {"step": step, **means, "images_per_s": round(rate, 1)})
            history, start = [], now
        stop = config.max_minutes is not None and now - saved > 60 * config.max_minutes
        if stop or step == config.steps or now - saved > 60 * config.save_minutes:
            save_checkpoint(accelerator, checkpoints, step, {})
            saved = now
    if accelerator.is_main_process:
        export_encoder(accelerator.unwrap_model(distiller).encoder, config.encoder_options, config.output)
    accelerator.end_training()
    return config.output


def open_data(config: PretrainConfig, per_step: int) -> tuple[ViewStream, CaptionWords | None]:
    """Open all image sources as one stream of views, `per_step` of them a step, and the words of the captioned ones."""
    sources, words, rows = [], None, 0
    if config.captions is not None:
        table = read_captions(config.captions, config.captions_split)
        words, rows = CaptionWords(table["captions"][:], config.num_words), len(table)
        sources.append([image for _ in range(config.captions_repeat) for image in table["image"][:]])
    sources += [list_images(source) for source in config.images]
    if not sources:
        raise ValueError(
            "nothing to train on: name folders or parquet files with --images, or captions with --captions"
        )
    early = int(config.early_share * config.steps) * per_step
    sizes = {"size": config.image_size, "early_size": config.early_size, "early_items": early}
    return ViewStream(sources, min_crop=config.min_crop, seed=config.seed, rows=rows, **sizes), words


def select_words(targets: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Pick the word targets (B, V) of a batch; NaN where a picture has no captions."""
    if targets is None:
        return None
    picked = targets[rows.cpu().clamp(min=0)].to(rows.device)
    return picked.masked_fill((rows < 0)[:, None], float("nan"))


def log(accelerator: Accelerator, folder: Path, record: dict) -> None:
    """Print a record and append it to `log.jsonl`."""
    if accelerator.is_main_process:
        print("  ".join(f"{key} {value}" for key, value in record.items()), flush=True)
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def export_encoder(encoder: TokenEncoder, options: dict, folder: Path) -> None:
    """Write the encoder as timm reads it: `create_encoder("local-dir:FOLDER", pretrained=True)`."""
    save_for_hf(encoder, folder, model_config={"num_classes": 0}, model_args=options, safe_serialization=True)
