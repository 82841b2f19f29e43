"""Decoder training by cross-entropy (teacher forcing) on a frozen encoder.

Letters: B images, K captions of each, T text tokens.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device, set_seed
from timm.optim import create_optimizer_v2
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    get_cosine_schedule_with_warmup,
)

from captioner.data.collate import CaptionStream, PictureRows, Pictures, open_pictures
from captioner.data.token_cache import open_cache
from captioner.encoders import create_encoder, encoder_config
from captioner.evaluation import caption_split, read_split, score_results
from captioner.modeling import IGNORED, CaptionerConfig, CaptionerModel, caption_loss
from captioner.processing import CaptionerProcessor, image_settings, train_tokenizer
from captioner.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from captioner.training.config import ModelConfig, TrainConfig, parse_grid, save_config

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def build_captioner(config: ModelConfig, captions: list[str]) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Build the model and processor to train; a decoder from scratch takes its tokenizer from `captions`.

    Raises:
        ValueError: an encoder or decoder that cannot be had, or that do not fit together.
    """
    encoder = create_encoder(config.encoder)
    if config.decoder is None:
        tokenizer = train_tokenizer(captions, config.vocab_size)
        text_config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=512,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own gelu_new, in one operation
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.decoder)
            text_config = AutoConfig.from_pretrained(config.decoder)
        except (OSError, ValueError) as error:
            raise ValueError(f"no decoder at '{config.decoder}': {str(error).splitlines()[0]}") from None
    image = image_settings(encoder.default_cfg, config.image_size, config.crop_mode)
    processor = CaptionerProcessor(tokenizer, image=image, prompt=config.prompt, max_length=config.max_length)
    model_config = CaptionerConfig(
        encoder_config=encoder_config(config.encoder, encoder),
        text_config=text_config,
        fusion=config.fusion,
        grid=parse_grid(config.grid),
        blind=config.blind,
    )
    model = CaptionerModel(model_config)
    model.encoder.load_state_dict(encoder.state_dict())
    if config.decoder is not None:
        pretrained = AutoModelForCausalLM.from_pretrained(config.decoder, config=text_config, dtype=torch.float32)
        model.decoder.load_state_dict(pretrained.state_dict())
    model.decoder.requires_grad_(not config.freeze_decoder)
    return model, processor


def train(config: TrainConfig) -> Path:
    """Run the training job and return the folder of the best model.

    Raises:
        ValueError: no data, names that cannot be had, a token cache of another encoder, or a loss that is not finite.
    """
    accelerator = Accelerator(
        mixed_precision=pick_precision(config.mixed_precision),
        log_with=list(config.trackers) or None,
        project_dir=config.output,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    set_seed(config.seed)
    with accelerator.main_process_first():  # the others find the table cached
        table = read_split(config.data, config.data.train_split)
        held_out = read_split(config.data, config.data.val_split)
    if config.evaluate_images is not None:
        held_out = held_out.select(range(min(config.evaluate_images, len(held_out))))
    model, processor = build_captioner(config.model, [c for group in table["captions"] for c in group])
    model.generation_config = GenerationConfig(
        bos_token_id=processor.start_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    cache = open_cache(config.data.tokens, model, processor)
    pictures = open_pictures(table, processor, cache)
    held_out_pictures = open_pictures(held_out, processor, cache, required=False)
    if config.gradient_checkpointing:
        model.decoder.gradient_checkpointing_enable()
    if accelerator.is_main_process:
        save_config(config, config.output)
    if config.trackers:
        accelerator.init_trackers("captioner", {"config": json.dumps(dataclasses.asdict(config), default=str)})

    per_step = config.batch_size * config.accumulation * accelerator.num_processes
    steps_per_epoch = max(1, len(table) // per_step)
    total = math.ceil(config.epochs * steps_per_epoch)
    evaluate_steps = max(1, round(config.evaluate_every * steps_per_epoch))
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )  # timm leaves parameters without gradient out
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * total), total)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    accelerator.register_save_state_pre_hook(leave_encoder_out)

    progress = {"best": -math.inf, "stale": 0}
    step, checkpoints = 0, config.output / "checkpoints"
    if config.resume and (found := list_checkpoints(checkpoints)):
        progress = load_checkpoint(accelerator, found[-1], strict=False)
        step = progress["step"]
        accelerator.print(f"resumed from {found[-1]}")
    stream = CaptionStream(table, processor, config.data.captions_per_image, config.seed, pictures)
    workers = pictures.workers(config.data.workers)
    loader = stream.loader(step * per_step, total * per_step, config.batch_size, workers, collate_fn=stream.collate)
    batches = iter(accelerator.prepare(loader))

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accelerator.print(
        f"{len(table)} training and {len(held_out)} validation images, {trainable / 1e6:.1f}M trainable parameters, "
        f"{total} steps of {per_step} images"
    )
    saved = time.monotonic()
    losses: list[float] = []
    bar = tqdm(total=total, initial=step, disable=not accelerator.is_main_process or None, desc="training")
    while step < total and (config.patience is None or progress["stale"] < config.patience):
        losses.append(train_step(accelerator, wrapped, batches, config))
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss is {losses[-1]} at step {step}; lower --learning-rate and run again, which resumes "
                f"from the last checkpoint in '{checkpoints}'"
            )
        accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % config.log_every == 0:
            record = {"step": step, "loss": sum(losses) / len(losses), "learning_rate": schedule.get_last_lr()[0]}
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            log(accelerator, config.output, record)
            losses.clear()
        evaluated = step % evaluate_steps == 0 or step == total
        if evaluated:
            record = validate(accelerator, wrapped, processor, held_out, held_out_pictures, config)
            log(accelerator, config.output, {"step": step, **record})
            progress["stale"] += 1
            if record["CIDEr"] > progress["best"]:
                progress |= {"best": record["CIDEr"], "stale": 0}
                save_model(accelerator, model, processor, config)
        if evaluated or time.monotonic() - saved > 60 * config.save_minutes:
            save_checkpoint(accelerator, checkpoints, step, progress)
            saved = time.monotonic()
    accelerator.print(f"best validation CIDEr {progress['best']:.4f}, model in {config.output / 'best'}")
    accelerator.end_training()
    return config.output / "best"


def train_step(accelerator: Accelerator, model: nn.Module, batches: Iterator[dict], config: TrainConfig) -> float:
    """Accumulate the gradient of one optimiser step; returns its loss per token, over all processes.

    Each token of the step weighs the same, however the captions fell into forwards and processes.
    """
    group = [next(batches) for _ in range(config.accumulation)]
    tokens = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in group)
    tokens = accelerator.reduce(tokens, "sum").clamp(min=1)
    total = torch.zeros((), device=accelerator.device)
    model.train()
    for number, batch in enumerate(group):
        last = number == len(group) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                labels, _ = batch.pop("labels"), batch.pop("rows")
                loss = caption_loss(model(**batch).logits, labels, config.label_smoothing) / tokens
            accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        total += loss.detach()
    return accelerator.reduce(total, "sum").item()


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    processor: CaptionerProcessor,
    table: "datasets.Dataset",
    pictures: Pictures,
    config: TrainConfig,
) -> dict:
    """Caption the validation images and score them: CIDEr, BLEU-4, and three captions to look at."""
    results = caption_split(
        accelerator,
        accelerator.unwrap_model(model),
        processor,
        table,
        batch_size=config.batch_size,
        workers=config.data.workers,
        pictures=pictures,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    scores = score_results(results, table, metrics=("BLEU", "CIDEr"))
    samples = [result["caption"] for result in results[:3]]
    return {
        "loss_val": validation_loss(accelerator, model, processor, table, pictures, config),
        **{name: scores[name] for name in ("CIDEr", "BLEU-4")},
        "samples": samples,
    }


def validation_loss(
    accelerator: Accelerator,
    model: nn.Module,
    processor: CaptionerProcessor,
    table: "datasets.Dataset",
    pictures: Pictures,
    config: TrainConfig,
) -> float:
    """Return the cross-entropy per token of the validation captions, not smoothed, each image's first K of them."""
    size, count = config.batch_size, config.data.captions_per_image
    sums = torch.zeros(2, device=accelerator.device)
    model.eval()
    rows = PictureRows(pictures)
    for start in range(accelerator.process_index * size, len(table), accelerator.num_processes * size):
        opened = [rows[row] for row in range(start, min(start + size, len(table)))]
        good = [(row, picture) for row, picture in opened if not isinstance(picture, str)]
        if not good:
            continue
        groups = table[[row for row, _ in good]]["captions"]
        captions = [group[k % len(group)] for group in groups for k in range(count)]
        batch = pictures.batch([picture for _, picture in good]) | processor.text(captions)
        batch = send_to_device(batch, accelerator.device)
        labels = batch.pop("labels")
        with accelerator.autocast():
            logits = accelerator.unwrap_model(model)(**batch).logits
        sums += torch.stack([caption_loss(logits, labels), (labels[:, 1:] != IGNORED).sum()])
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    return total / max(tokens, 1)


def pick_precision(wanted: str) -> str:
    """Resolve `auto`: bf16 on GPUs that have it, else none."""
    if wanted != "auto":
        return wanted
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def leave_encoder_out(models: list[nn.Module], weights: list[dict], folder: str) -> None:
    """Drop the frozen encoder from a checkpoint: it never changes."""
    for state in weights:
        for key in [key for key in state if key.removeprefix("module.").startswith("encoder.")]:
            del state[key]


def save_model(
    accelerator: Accelerator, model: CaptionerModel, processor: CaptionerProcessor, config: TrainConfig
) -> None:
    """Write a model and its processor to `output/best`, whole or not at all: under a temporary name first."""
    folder = config.output / "best"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        dtype = getattr(torch, config.save_dtype)
        cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
        state = {k: cast.setdefault(v.data_ptr(), v.to(dtype)) for k, v in model.state_dict().items()}
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=state)
        processor.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    accelerator.wait_for_everyone()


def log(accelerator: Accelerator, folder: Path, record: dict) -> None:
    """Print a record, append it to `log.jsonl`, and send its numbers to the trackers."""
    step = record["step"]
    record = {key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()}
    if accelerator.is_main_process:
        tqdm.write("  ".join(f"{key} {value}" for key, value in record.items()))
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    accelerator.log({key: value for key, value in record.items() if isinstance(value, float)}, step=step)
