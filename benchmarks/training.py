"""Decoder training: from the token cache, encoding online, and by transformers' own means, in one run.

    python benchmarks/training.py --root flickr8k [--fusion cross_attention] [--mixed-precision bf16] [--batch 32]

All train the same decoder from scratch (GPT-2's architecture, width, depth, vocabulary) on a frozen encoder of ViT-S
size at 224 px, in one precision, on the same images and captions, opened by the same code in the training process:

- ours: `captioner train`'s own stream and step, with LookupViT-S at 5x5; K captions of an image share its encoding.
- the peer: `VisionEncoderDecoderModel` (`ViTModel`, frozen, and `GPT2LMHeadModel` with cross-attention) under
  `Trainer`, fed pairs of an image and a caption, as its documentation does.

Encoders have random weights: speed does not depend on them. Rounds go through all variants in turn, so that a change
of the machine's mood falls on all alike; a variant's figure is the median over all its steps but the first of each
round. Before the rounds, ours from the cache and online are checked to have the same loss.
"""

import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import DatasetDict
from torch.utils.data import Dataset
from transformers import (
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from captioner.commands.cache import CacheConfig, fill_cache
from captioner.data.batches import CaptionStream, open_images
from captioner.data.config import DataConfig
from captioner.data.readers import read_captions
from captioner.data.token_cache import open_cache
from captioner.recipes import flickr8k
from captioner.training.build import build_captioner
from captioner.training.config import TrainConfig
from captioner.training.loop import create_optimizer, train_step
from captioner.training.objectives import CrossEntropy


@dataclass
class Settings:
    """Settings of the run."""

    root: str
    """Captioned images; their `train` split is used."""
    images: int = 256
    """Images used, again and again; only they are cached."""
    batch: int = 128
    """Images per step; with one caption each, near the 160 captions of a step of the recipe `flickr8k`."""
    captions: tuple[int, ...] = (1, 5)
    """Captions K of an image in one step of ours; the peer has 1."""
    steps: int = 4
    """Timed steps in a round."""
    rounds: int = 3
    """Times that every variant runs."""
    device: str = "cpu"
    """Where to run: cpu or cuda."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of every forward, the peer's too."""
    fusion: Literal["prefix", "cross_attention"] = "prefix"
    """How our decoder takes the image tokens; the peer's has cross-attention."""


class Ours:
    """`captioner train`'s stream and step, without its validation and checkpoints."""

    def __init__(self, config: TrainConfig, captions: list[str], accelerator: Accelerator):
        set_seed(config.seed)
        self.config, self.accelerator = config, accelerator
        table = read_captions(config.data.root[0], "train")
        model, self.processor = build_captioner(config.model, captions)
        cache = open_cache(next(iter(config.data.tokens), None), model, self.processor)
        found = open_images(table, self.processor, cache)
        stream = CaptionStream(table, self.processor, config.data.captions_per_image, config.seed, found)
        optimizer = create_optimizer(model, config)
        self.table, self.captioner = table, model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        loader = stream.loader(0, 2**20, config.batch_size, 0, collate_fn=stream.collate)
        self.batches = iter(accelerator.prepare(loader))
        self.captions = config.batch_size * config.data.captions_per_image

    def step(self) -> float:
        """Train one step; returns its loss."""
        objective = CrossEntropy(self.config.label_smoothing)
        loss = train_step(self.accelerator, self.model, self.batches, objective, self.config)["loss"]
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def times(self, steps: int) -> Iterator[float]:
        """Yield the seconds of each of so many steps."""
        for _ in range(steps):
            start = time.perf_counter()
            self.step()  # it ends by reading the loss, which waits for the device
            yield time.perf_counter() - start


class Pairs(Dataset):
    """Images of a table, each with one caption: `pixel_values` (3, H, W) and `labels`, as the peer takes them."""

    def __init__(self, ours: Ours):
        self.ours = ours

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, i: int) -> dict:
        row = self.ours.table[i % len(self.ours.table)]
        caption = row["captions"][i // len(self.ours.table) % len(row["captions"])]
        return {"pixel_values": self.ours.processor.pixels(row["image"]), "caption": caption}

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """Batch B pairs into `pixel_values` (B, 3, H, W) and `labels` (B, T)."""
        text = self.ours.processor.text([item["caption"] for item in items])
        labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), "labels": labels}


class Clock(TrainerCallback):
    """Notes when each optimiser step ends."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class Peer:
    """transformers' `VisionEncoderDecoderModel` under `Trainer`, with the decoder of `ours`."""

    def __init__(self, ours: Ours, settings: Settings):
        vit = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
        text = type(ours.captioner.config.text_config)(**ours.captioner.config.text_config.to_dict())
        text.add_cross_attention, text.is_decoder = True, True
        encoder = ViTModel(vit, add_pooling_layer=False).requires_grad_(False)
        self.model = VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(text))
        self.model.config.decoder_start_token_id = ours.processor.start_token_id
        self.model.config.pad_token_id = ours.processor.tokenizer.pad_token_id
        self.data, self.settings, self.config = Pairs(ours), settings, ours.config
        self.captions = settings.batch

    def times(self, steps: int) -> Iterator[float]:
        """Yield the seconds of each of so many steps."""
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                per_device_train_batch_size=self.settings.batch,
                max_steps=steps + 1,
                learning_rate=self.config.learning_rate,
                weight_decay=self.config.weight_decay,
                max_grad_norm=self.config.clip,
                use_cpu=self.settings.device == "cpu",
                bf16=self.settings.mixed_precision == "bf16",
                remove_unused_columns=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
            )
            trainer = Trainer(self.model, args, train_dataset=self.data, data_collator=self.data.collate)
            trainer.add_callback(clock)
            trainer.train()
        yield from (end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False))


def build(settings: Settings, folder: Path) -> dict[str, Ours | Peer]:
    """Build the variants, by name, over one set of images and one cache of them."""
    table = read_captions(settings.root, "train")
    captions = [caption for group in table["captions"] for caption in group]
    DatasetDict({"train": table.select(range(settings.images))}).save_to_disk(folder / "images")
    data = DataConfig(root=(str(folder / "images"),), workers=0)
    options = {"splits": ("train",), "mixed_precision": settings.mixed_precision}
    fill_cache(CacheConfig(output=folder / "tokens", data=data, **options))
    accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision=settings.mixed_precision)
    recipe = flickr8k()
    model = replace(recipe.model, grid="5x5", image_size=224, fusion=settings.fusion)
    recipe = replace(recipe, batch_size=settings.batch, model=model)
    variants: dict[str, Ours | Peer] = {}
    for count in settings.captions:
        for name, tokens in (("online", ()), ("from the cache", (folder / "tokens",))):
            config = replace(recipe, data=replace(data, captions_per_image=count, tokens=tokens))
            label = f"ours, {name}, {count} caption{'s' * (count > 1)} an image"
            variants[label] = Ours(config, captions, accelerator)
    first = next(iter(variants.values()))
    variants["transformers' Trainer, 1 caption an image"] = Peer(first, settings)
    return variants


def main() -> None:
    """Measure every variant and print one table."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        variants = build(settings, Path(folder))
        losses = [variant.step() for variant in variants.values() if isinstance(variant, Ours)]  # warms up, too
        for online, cached in zip(losses[::2], losses[1::2], strict=True):
            assert abs(online - cached) < 0.02 * online, f"losses differ: {online} online, {cached} from the cache"
        taken: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(settings.rounds):
            for name, variant in variants.items():
                taken[name] += list(variant.times(settings.steps + 1))[1:]
    rates = {name: variants[name].captions / median(times) for name, times in taken.items()}
    peer = rates[list(rates)[-1]]
    precision = "float32" if settings.mixed_precision == "no" else settings.mixed_precision
    machine = f"{settings.device}, {platform.machine()}, {torch.get_num_threads()} threads, {precision}"
    print(f"\ntorch {torch.__version__}, {machine}, {settings.batch} images a step, encoders frozen")
    print(f"\n{'':<48}{'M trained':>10}{'captions/s':>12}{'of the peer':>12}{'of online':>11}")
    for name, rate in rates.items():
        online = rates.get(name.replace("from the cache", "online")) if "cache" in name else None
        model = variants[name].captioner if isinstance(variants[name], Ours) else variants[name].model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        print(f"{name:<48}{trained:>10.1f}{rate:>12.1f}{rate / peer:>11.2f}x", end="")
        print(f"{rate / online:>10.2f}x" if online else "")


if __name__ == "__main__":
    main()
