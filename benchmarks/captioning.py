"""Measure encoding and generation of the shipped captioner beside the plain ways, in one process, turn by turn.

    python benchmarks/captioning.py --images photos/*.jpg --threads 1 2

- encoding: the encoder as it is trained, and the form that a captioner uses on a CPU (`optimize_for_inference`);
- generation: transformers' `generate`, and our search with the same decoder, which gives the same tokens.

Other programs slow both sides, so the ratios count, and of the times the least.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import tyro
from timing import time_in_turn

import captioner
from captioner.generation import call


@dataclass
class Settings:
    """What is measured."""

    model: str = "shipped"
    """Captioner: `shipped`, a folder or a hub id."""
    images: tuple[str, ...] = ()
    """Images to caption, the first of them make the batch; noise if there are too few."""
    batch: int = 16
    """Images per batch."""
    threads: tuple[int, ...] = (1,)
    """Numbers of threads, one table for each."""
    repeats: int = 15
    """Turns."""


def measure(ways: Mapping[str, Callable[[], object]], settings: Settings) -> None:
    """Print a line for each way: milliseconds an image, and how many times as fast as the first."""
    seconds = time_in_turn(ways, settings.repeats)
    times = {name: [1000 * each / settings.batch for each in taken] for name, taken in seconds.items()}
    base = next(iter(times.values()))
    for name, taken in times.items():
        ratio = median(a / b for a, b in zip(base, taken, strict=True))
        print(f"{name:<34}{min(taken):>8.2f}{median(taken):>8.2f}{ratio:>8.2f}x{min(base) / min(taken):>8.2f}x")


def by_transformers(way: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Generate by transformers' loop."""
    supports, call.supports_search = call.supports_search, lambda fusion: False
    try:
        return way()
    finally:
        call.supports_search = supports


@torch.inference_mode()
def main() -> None:
    """Measure every number of threads."""
    settings = tyro.cli(Settings, description=__doc__)
    loaded = captioner.load(settings.model, "cpu")
    model, encoder = loaded.model, loaded.model.encoder
    pixels = torch.randn(settings.batch, *loaded.processor.image["input_size"])
    if len(settings.images) >= settings.batch:
        pixels = torch.stack([loaded.processor.pixels(image) for image in settings.images[: settings.batch]])
    prompts: dict[str, Any] = {**loaded.processor.prompts(settings.batch)}
    tokens = model.encode(pixels)
    forms = {"encoder": encoder} | {
        f"encoder for inference, {dtype}": encoder.optimize_for_inference(dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    for threads in settings.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} threads, batch {settings.batch}")
        print(f"{'ms per image: least, median':>50}{'speed-up: median, of the least':>34}")
        measure({name: partial(form.encode, pixels) for name, form in forms.items()}, settings)
        for beams in (1, 3, 5):

            def ours(beams: int = beams) -> torch.Tensor:
                return model.generate(image_tokens=tokens, num_beams=beams, **prompts)

            assert torch.equal(ours(), by_transformers(ours)), "the tokens differ"
            ways: dict[str, Callable[[], object]] = {
                f"transformers, {beams} beams": partial(by_transformers, ours),
                f"our search, {beams} beams": ours,
            }
            measure(ways, settings)


if __name__ == "__main__":
    main()
