"""What an encoder's tokens are worth and what they cost: the same decoder recipe on each, scored on the test split.

    python benchmarks/comparison.py --root flickr8k --lookupvit runs/lookupvit --vit runs/vit --output docs/results

Both encoders are exported by `captioner pretrain`, ideally by the same recipe. For each, images are encoded once into
a token cache and a decoder is trained on it: on all tokens of the ViT; on LookupViT's at a grid drawn for each step.
Then the test split is captioned and scored, with LookupViT at each of its grids, from one set of weights of encoder and
decoder alike. What is done already is not done again, so a run that was cut goes on. Writes `comparison.json`,
`comparison.md` and `comparison.svg`.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, mode
from typing import Literal

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from captioner import recipes
from captioner.commands.cache import CacheConfig, fill_cache
from captioner.commands.evaluate import EvaluateConfig, evaluate
from captioner.data.config import DataConfig
from captioner.encoders import create_encoder
from captioner.grids import parse_grid, write_grid
from captioner.metrics import confidence
from captioner.pretraining.config import PretrainConfig
from captioner.pretraining.probes import probe_encoder
from captioner.report.tradeoff import Point, draw_tradeoff
from captioner.runs.files import open_whole
from captioner.training.config import EncoderConfig, TrainConfig
from captioner.training.loop import train

SCORES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


@dataclass
class Settings:
    """Settings of the run."""

    root: str
    """Captioned images with the splits train, val and the one to score on."""
    lookupvit: Path
    """Folder of the exported LookupViT."""
    vit: Path | None = None
    """Folder of the exported ViT; `None` leaves the control out."""
    output: Path = Path("docs/results")
    """Folder of the table and the plot."""
    work: Path = Path("runs/comparison")
    """Folder of caches, decoders and captions."""
    recipe: str = "flickr8k"
    """Decoder recipe."""
    epochs: float | None = None
    """Epochs in place of the recipe's."""
    evaluate_images: int | None = None
    """Validation images that choose the best decoder; `None` for the recipe's."""
    split: str = "test"
    """Split to score on."""
    image_size: int | None = None
    """Side of the image in pixels; `None` for the encoder's own."""
    grids: tuple[str, ...] = ("3x3", "5x5", "5x5", "5x5", "7x7", "10x10")
    """Compressed grids of LookupViT: each step of its decoder draws one, each is a line of the table; the most frequent
    is validated at, and so chooses the best decoder."""
    views: int = 4
    """Views of each training image in the cache."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision in which images are encoded for the cache and decoders are trained."""
    probe_train: str | None = None
    """Labelled images for a linear probe of every encoder and grid (see `captioner pretrain --help`)."""
    probe_val: str | None = None
    """Labelled images on which the probe is scored."""
    batch: int = 32
    """Images per forward when encoders are timed."""

    def __post_init__(self):
        if not self.grids:
            raise ValueError("name at least one of --grids")
        self.grids = tuple(write_grid(parse_grid(grid)) for grid in self.grids)


@dataclass
class Row:
    """A line of the table."""

    encoder: str
    grid: str
    folder: str
    scores: dict[str, float]
    cider_low: float
    cider_high: float
    probe: float | None
    gflops: float = 0.0
    images_per_s: float = 0.0
    tokens: int = 0
    bytes: int = 0


def measure(settings: Settings, name: str, folder: Path, grids: tuple[str, ...] = ()) -> list[Row]:
    """Train a decoder on one encoder and score it at each grid, or read what a run before found."""
    work = settings.work / name
    done, made_by = work / "rows.json", {"folder": str(folder), "grids": list(grids), **decided_by(settings)}
    if done.is_file():
        found = json.loads(done.read_text())
        if found["made_by"] != made_by:
            raise ValueError(f"'{done}' was made with other settings, {found['made_by']}; name another --work")
        return [Row(**row) for row in found["rows"]]
    config: TrainConfig = recipes.TRAIN[settings.recipe]()
    encoder = EncoderConfig(encoder=f"local-dir:{folder}", image_size=settings.image_size)
    data = DataConfig(root=(settings.root,))
    fill_cache(
        CacheConfig(
            output=work / "tokens",
            data=data,
            model=encoder,
            splits=tuple(dict.fromkeys([data.train_split, data.val_split, settings.split])),
            grids=tuple(dict.fromkeys(grids)),
            views=settings.views,
            mixed_precision=settings.mixed_precision,
        )
    )
    data = replace(data, tokens=(work / "tokens",))
    best = train(
        replace(
            config,
            output=work / "run",
            data=data,
            model=replace(config.model, **asdict(encoder), grid=mode(grids) if grids else None),
            grids=grids,
            epochs=settings.epochs or config.epochs,
            evaluate_images=settings.evaluate_images or config.evaluate_images,
            mixed_precision=settings.mixed_precision,
        )
    )
    probes = probe(settings, folder, grids)
    rows = []
    for grid in sorted(set(grids), key=parse_grid) or [None]:
        output = work / f"{settings.split}_{grid or 'all'}"
        scores = evaluate(EvaluateConfig(str(best), data, settings.split, output, grid=grid))
        interval = confidence(scores)["CIDEr"]
        kept = {key: scores[key] for key in SCORES if scores.corpus.get(key) is not None}  # METEOR needs Java
        rows.append(Row(name, grid or "all", str(folder), kept, interval.low, interval.high, probes.get(grid)))
    with open_whole(done) as file:
        json.dump({"made_by": made_by, "rows": [asdict(row) for row in rows]}, file, indent=1)
    return rows


def decided_by(settings: Settings) -> dict:
    """Return the settings that decide a line's scores."""
    names = ("root", "recipe", "epochs", "evaluate_images", "split", "image_size", "views", "mixed_precision")
    return {name: getattr(settings, name) for name in (*names, "probe_train", "probe_val")}


def probe(settings: Settings, folder: Path, grids: tuple[str, ...]) -> dict[str | None, float]:
    """Classify images by a linear layer on the frozen tokens (`captioner.pretraining.probes`), for each square grid."""
    if settings.probe_train is None or settings.probe_val is None:
        return {}
    encoder = create_encoder(f"local-dir:{folder}")
    side = settings.image_size or encoder.default_cfg["input_size"][-1]
    square = {parse_grid(grid)[0]: grid for grid in grids if len(set(parse_grid(grid))) == 1}
    sides = square if grids else {side // 16: None}  # a ViT is probed on its own grid
    config = PretrainConfig(
        grids=tuple(sides),
        image_size=side,
        store=settings.work / "images",
        store_size=64,
        probe_train=settings.probe_train,
        probe_val=settings.probe_val,
    )
    found = probe_encoder(encoder.freeze(), config, torch.device("cpu"))
    return {sides[record["grid"]]: record["probe_top1"] for record in found}


@torch.inference_mode()
def measure_costs(rows: list[Row], settings: Settings) -> None:
    """Fill in GFLOPs for one image, tokens, bytes and images a second; rounds go through all rows in turn."""
    encoders = [create_encoder(f"local-dir:{row.folder}").freeze() for row in rows]
    side = settings.image_size or encoders[0].default_cfg["input_size"][-1]
    pixels, seconds = torch.randn(settings.batch, 3, side, side), [[] for _ in rows]
    for turn in range(7):
        for row, encoder, taken in zip(rows, encoders, seconds, strict=True):
            grid = None if row.grid == "all" else parse_grid(row.grid)
            if turn == 0:
                # torch counts no FLOPs of the fused attention of CPUs
                with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                    row.tokens = encoder.encode(pixels[:1], grid).shape[1]
                row.gflops, row.bytes = counter.get_total_flops() / 1e9, 2 * row.tokens * encoder.embed_dim
            start = time.perf_counter()
            encoder.encode(pixels, grid)
            taken.append(time.perf_counter() - start)
    for row, taken in zip(rows, seconds, strict=True):
        row.images_per_s = settings.batch / median(taken[1:])


def write_table(rows: list[Row], settings: Settings) -> None:
    """Write the table as JSON and Markdown, and the plot of CIDEr over GFLOPs."""
    settings.output.mkdir(parents=True, exist_ok=True)
    made_by = decided_by(settings) | {"grids": settings.grids}
    made_by = {key: Path(v).name if isinstance(v, str) else v for key, v in made_by.items()}  # not where they lay
    content = {"settings": made_by, "rows": [asdict(row) | {"folder": Path(row.folder).name} for row in rows]}
    (settings.output / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
    names = [name for name in SCORES if name in rows[0].scores]
    head = ["encoder", "grid", "GFLOPs", "images/s", "tokens", "KB/image", "probe", *names, "CIDEr, 95% interval"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row.encoder, row.grid, f"{row.gflops:.3f}", f"{row.images_per_s:.0f}", str(row.tokens)]
        cells += [f"{row.bytes / 1000:.1f}", "-" if row.probe is None else f"{row.probe:.3f}"]
        cells += [*(f"{row.scores[name]:.3f}" for name in names)]
        lines.append("| " + " | ".join([*cells, f"{row.cider_low:.3f} to {row.cider_high:.3f}"]) + " |")
    (settings.output / "comparison.md").write_text("\n".join(lines) + "\n")
    points = [
        Point(row.encoder, row.grid, row.gflops, row.scores["CIDEr"], row.cider_low, row.cider_high) for row in rows
    ]
    plot = draw_tradeoff(points, "encoder GFLOPs per image", f"CIDEr, {settings.split} split")
    (settings.output / "comparison.svg").write_text(plot, encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    """Measure every encoder and grid."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = measure(settings, "ViT", settings.vit) if settings.vit else []
    rows += measure(settings, "LookupViT", settings.lookupvit, settings.grids)
    measure_costs(rows, settings)
    write_table(rows, settings)


if __name__ == "__main__":
    main()
