"""What ToSA saves over the ViT of the same weights, by the ratio of tokens that attend: FLOPs and speed, in one run.

    python benchmarks/tosa.py [--ratios 0.3 0.5 0.7 0.9] [--sizes 224 384] [--scale small] [--batch 16] [--repeats 5]

One GFLOP is 10^9 multiplications and additions, counted by torch for one image through the whole encoder, patch
embedding and selectors included. Every model is timed in turn, `repeats` times, and its median taken, so that a
change of the machine's speed falls on all alike. Weights are random: they change neither FLOPs nor time.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import timm
import torch
import tyro
from timing import time_in_turn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import captioner.encoders  # noqa: F401 - registers ToSA with timm


@dataclass
class Settings:
    """Settings of the run."""

    ratios: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Shares of the tokens that run through a selective layer."""
    sizes: tuple[int, ...] = (224, 384)
    """Sides of the image in pixels."""
    scale: str = "small"
    """Variant: tiny or small."""
    batch: int = 16
    """Images per forward."""
    repeats: int = 5
    """Times that each model is timed."""
    device: str = "cpu"
    """Where to run."""


def count_flops(encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> float:
    """Count the GFLOPs of a forward; torch counts none in the fused attention of CPUs, so the plain one runs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encode(pixels)
    return counter.get_total_flops() / 1e9


def measure(settings: Settings, size: int) -> None:
    """Print the table of one image size."""
    options = {"num_classes": 0, "img_size": size}
    vit = timm.create_model(f"vit_{settings.scale}_patch16_224", **options).to(settings.device).eval()
    tosa = timm.create_model(f"tosa_{settings.scale}_patch16_224", **options).to(settings.device).eval()
    forwards = {f"ViT-{settings.scale}": vit.forward_features}
    forwards |= {f"ToSA r = {ratio}": partial(tosa.forward_tokens, ratio=ratio) for ratio in (*settings.ratios, 1.0)}
    pixels = torch.randn(settings.batch, 3, size, size, device=settings.device)
    flops = {key: count_flops(encode, pixels[:1]) for key, encode in forwards.items()}
    runs = {key: partial(encode, pixels) for key, encode in forwards.items()}
    seconds = time_in_turn(runs, settings.repeats, settings.device)
    base = next(iter(forwards))
    print(f"\n{size} px{'':<12}{'GFLOPs':>9}{'of ViT':>8}{'images/s':>10}{'speed-up':>10}")
    for key in forwards:
        taken = median(seconds[key])
        print(
            f"{key:<18}{flops[key]:>9.2f}{flops[key] / flops[base]:>8.2f}"
            f"{settings.batch / taken:>10.1f}{median(seconds[base]) / taken:>9.2f}x"
        )


@torch.inference_mode()
def main() -> None:
    """Measure every size."""
    settings = tyro.cli(Settings, description=__doc__)
    machine = f"{settings.device}, {platform.machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}, batch {settings.batch}")
    for size in settings.sizes:
        measure(settings, size)


if __name__ == "__main__":
    main()
