"""What LookupViT saves over a plain ViT of the same width, depth and heads: FLOPs and speed, in one run.

    python benchmarks/encoder.py [--sizes 224 448] [--grids 3 5 7 10] [--batch 32] [--repeats 5] [--device cpu]

One GFLOP is 10^9 multiplications and additions, counted by torch for one image through the whole encoder, patch
embedding included. Every model is timed in turn, `repeats` times over, and its median taken, so that a change of the
machine's speed falls on all alike.
"""

import platform
from dataclasses import dataclass
from functools import partial
from statistics import median

import timm
import torch
import tyro
from timing import time_in_turn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import captioner.encoders  # noqa: F401 - registers LookupViT with timm
from captioner.grids import Grid, write_grid


@dataclass
class Settings:
    """Settings of the run."""

    sizes: tuple[int, ...] = (224, 448)
    """Sides of the image in pixels."""
    grids: tuple[int, ...] = (3, 5, 7, 10)
    """Compressed grids."""
    batch: int = 32
    """Images per forward."""
    repeats: int = 5
    """Timed rounds."""
    device: str = "cpu"
    """Where to run."""
    scale: str = "small"
    """Variant: tiny, small, base or large."""


def build(settings: Settings, size: int) -> dict[str, tuple[nn.Module, tuple[Grid, ...]]]:
    """Build the models of one image size, by name, each with the arguments of its forward beside the pixels."""
    name = f"{settings.scale}_patch16_224"
    models = {f"ViT-{settings.scale}": (timm.create_model(f"vit_{name}", num_classes=0, img_size=size), ())}
    for absorb, form in ((False, "direct"), (True, "absorbed"), (None, "as picked")):
        model = timm.create_model(f"lookupvit_{name}", num_classes=0, img_size=size, absorb=absorb)
        for grid in settings.grids:
            models[f"LookupViT-{settings.scale} {write_grid((grid, grid))} {form}"] = (model, ((grid, grid),))
    return {key: (model.to(settings.device).eval(), args) for key, (model, args) in models.items()}


def measure(settings: Settings, size: int) -> None:
    """Print the table of one image size."""
    models = build(settings, size)
    one = torch.randn(1, 3, size, size, device=settings.device)
    pixels = torch.randn(settings.batch, 3, size, size, device=settings.device)
    flops = {}
    for key, (model, args) in models.items():
        # torch counts no FLOPs of the fused attention of CPUs
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.forward_features(one, *args)
        flops[key] = counter.get_total_flops() / 1e9
    runs = {key: partial(model.forward_features, pixels, *args) for key, (model, args) in models.items()}
    seconds = time_in_turn(runs, settings.repeats, settings.device)
    baseline = next(iter(models))
    base_seconds = median(seconds[baseline])
    print(f"\n{size} px{'':<28}{'M params':>9}{'GFLOPs':>9}{'of ViT':>8}{'images/s':>10}{'speed-up':>10}")
    for key, (model, _) in models.items():
        params = sum(p.numel() for p in model.parameters()) / 1e6
        taken = median(seconds[key])
        print(
            f"{key:<34}{params:>9.1f}{flops[key]:>9.2f}{flops[key] / flops[baseline]:>8.2f}"
            f"{settings.batch / taken:>10.1f}{base_seconds / taken:>9.2f}x"
        )


@torch.inference_mode()
def main() -> None:
    """Measure every size."""
    settings = tyro.cli(Settings, description=__doc__)
    threads = torch.get_num_threads()
    machine = f"{settings.device}, {platform.machine()}, {threads} threads"
    print(f"torch {torch.__version__}, {machine}, batch {settings.batch}")
    for size in settings.sizes:
        measure(settings, size)


if __name__ == "__main__":
    main()
