"""What an encoder's tokens are worth and what they cost: the same decoder recipe on each, scored on the test split.

    python benchmarks/comparison.py --root flickr8k --lookupvit runs/lookupvit --vit runs/vit --output results

Both encoders are exported by `captioner pretrain`, ideally by the same recipe. For the ViT, and for LookupViT at each
grid from its one set of weights: pictures are encoded once into a token cache, the decoder recipe is trained on it, the
test split is captioned and scored. What is done already is not done again, so a run that was cut goes on. Writes
`comparison.json`, `comparison.md` and `comparison.svg`.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from captioner import recipes
from captioner.encoders import TokenEncoder, create_encoder
from captioner.evaluation import evaluate
from captioner.metrics import confidence
from captioner.report.tradeoff import Point, draw_tradeoff
from captioner.training.cache import fill_cache
from captioner.training.config import CacheConfig, DataConfig, EncoderConfig, EvaluateConfig, TrainConfig, parse_grid
from captioner.training.decoder import train

SCORES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


@dataclass
class Settings:
    """Settings of the run."""

    root: str
    """Captioned images with the splits train, val and test."""
    lookupvit: Path
    """Folder of the exported LookupViT."""
    vit: Path | None = None
    """Folder of the exported ViT; `None` leaves the control out."""
    output: Path = Path("results")
    """Folder of the table and the plot."""
    work: Path = Path("runs/comparison")
    """Folder of caches, decoders and captions."""
    recipe: str = "flickr8k"
    """Decoder recipe."""
    epochs: float | None = None
    """Epochs in place of the recipe's."""
    image_size: int | None = None
    """Side of the picture in pixels; `None` for the encoder's own."""
    grids: tuple[str, ...] = ("3x3", "5x5", "7x7", "10x10")
    """Compressed grids of LookupViT."""
    views: int = 4
    """Views of each training picture in the cache."""
    batch: int = 32
    """Pictures per forward when encoders are timed."""


@dataclass
class Row:
    """A line of the table."""

    encoder: str
    grid: str
    gflops: float
    images_per_s: float
    tokens: int
    bytes: int
    scores: dict[str, float]
    cider_low: float
    cider_high: float


def measure(settings: Settings, name: str, folder: Path, grid: str | None) -> Row:
    """Train and score one encoder at one grid."""
    work = settings.work / f"{name}_{grid or 'all'}"
    done = work / "row.json"
    if done.is_file():
        return Row(**json.loads(done.read_text()))
    data = DataConfig(root=settings.root)
    encoder = EncoderConfig(encoder=f"local-dir:{folder}", grid=grid, image_size=settings.image_size)
    cached = {"output": work / "tokens", "data": data, "model": encoder}
    fill_cache(CacheConfig(**cached, splits=("train",), views=settings.views))
    config: TrainConfig = recipes.TRAIN[settings.recipe]()
    data = replace(data, tokens=work / "tokens")
    model = replace(config.model, **asdict(encoder))
    config = replace(config, output=work / "run", data=data, model=model, epochs=settings.epochs or config.epochs)
    best = train(config)
    scores = evaluate(EvaluateConfig(model=str(best), data=DataConfig(root=settings.root), output=work / "test"))
    interval = confidence(scores)["CIDEr"]
    gflops, speed, tokens = cost(create_encoder(f"local-dir:{folder}").eval(), grid, settings)
    width = create_encoder(f"local-dir:{folder}").embed_dim
    kept = {key: scores[key] for key in SCORES if key in scores.corpus}
    row = Row(name, grid or "all", gflops, speed, tokens, 2 * tokens * width, kept, interval.low, interval.high)
    done.write_text(json.dumps(asdict(row), indent=1))
    return row


@torch.inference_mode()
def cost(encoder: TokenEncoder, grid: str | None, settings: Settings) -> tuple[float, float, int]:
    """Return GFLOPs for one picture, pictures a second in batches, and tokens per picture."""
    side = settings.image_size or encoder.default_cfg["input_size"][-1]
    wanted, pixels = parse_grid(grid), torch.randn(settings.batch, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        tokens = encoder.encode(pixels[:1], wanted)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        encoder.encode(pixels, wanted)
        seconds.append(time.perf_counter() - start)
    return counter.get_total_flops() / 1e9, settings.batch / median(seconds[1:]), tokens.shape[1]


def write_table(rows: list[Row], settings: Settings) -> None:
    """Write the table as JSON and Markdown, and the plot of CIDEr over GFLOPs."""
    settings.output.mkdir(parents=True, exist_ok=True)
    content = {"settings": asdict(settings), "rows": [asdict(row) for row in rows]}
    (settings.output / "comparison.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    names = [name for name in SCORES if name in rows[0].scores]
    head = ["encoder", "grid", "GFLOPs", "images/s", "tokens", "KB/image", *names, "CIDEr, 95% interval"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row.encoder, row.grid, f"{row.gflops:.3f}", f"{row.images_per_s:.0f}", str(row.tokens)]
        cells += [f"{row.bytes / 1000:.1f}", *(f"{row.scores[name]:.3f}" for name in names)]
        lines.append("| " + " | ".join([*cells, f"{row.cider_low:.3f} to {row.cider_high:.3f}"]) + " |")
    (settings.output / "comparison.md").write_text("\n".join(lines) + "\n")
    points = [
        Point(row.encoder, row.grid, row.gflops, row.scores["CIDEr"], row.cider_low, row.cider_high) for row in rows
    ]
    plot = draw_tradeoff(points, "encoder GFLOPs per picture", "CIDEr, test split")
    (settings.output / "comparison.svg").write_text(plot)
    print("\n".join(lines))


def main() -> None:
    """Measure every encoder and grid."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = [measure(settings, "ViT", settings.vit, None)] if settings.vit else []
    rows += [measure(settings, "LookupViT", settings.lookupvit, grid) for grid in settings.grids]
    write_table(rows, settings)


if __name__ == "__main__":
    main()
