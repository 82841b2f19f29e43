"""Caption a split with every process, write the captions, then score them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from captioner.data.captions import read_captions
from captioner.encoders import Grid
from captioner.images import ImageError
from captioner.metrics import METRICS, Scores, score
from captioner.modeling import CaptionerModel
from captioner.pipeline import load
from captioner.processing import CaptionerProcessor
from captioner.training.config import DataConfig, EvaluateConfig, parse_grid, save_config

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class Pictures(Dataset):
    """The pictures of a caption table as pixels (3, H, W), or the error of one that cannot be opened."""

    def __init__(self, table: "datasets.Dataset", processor: CaptionerProcessor):
        self.table, self.processor = table, processor

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | str]:
        try:
            return row, self.processor.pixels(self.table[row]["image"])
        except ImageError as error:
            return row, str(error)


def caption_split(
    accelerator: Accelerator,
    model: CaptionerModel,
    processor: CaptionerProcessor,
    table: "datasets.Dataset",
    *,
    batch_size: int = 32,
    grid: Grid | None = None,
    workers: int = 0,
    **generation,
) -> list[dict]:
    """Caption every picture of a table once, shared out over the processes.

    Batches are the same whatever the number of processes, and so are the captions. A picture that cannot be opened
    gets an empty caption, which scores zero, and a warning.

    Returns:
        COCO results in the order of the table, in every process: `[{"image_id": ..., "caption": ...}, ...]`.
    """
    rows = range(len(table))
    batches = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    loader = DataLoader(Pictures(table, processor), batch_sampler=mine, num_workers=workers, collate_fn=list)
    start = torch.tensor([processor.prompt_ids()], device=accelerator.device)
    model.eval()
    done: list[tuple[int, str]] = []
    for batch in tqdm(loader, desc="captioning", disable=not accelerator.is_main_process or None, leave=False):
        good = [(row, pixels) for row, pixels in batch if isinstance(pixels, torch.Tensor)]
        for row, error in batch:
            if isinstance(error, str):
                logger.warning("no caption for image %s: %s", table[row]["image_id"], error)
                done.append((row, ""))
        if good:
            pixels = torch.stack([pixels for _, pixels in good]).to(accelerator.device)
            sequences = model.generate(pixels, start.expand(len(good), -1), grid=grid, **generation)
            done += [(row, text) for (row, _), text in zip(good, processor.captions(sequences), strict=True)]
    captions = dict(gather_object(done))
    ids = table["image_id"]
    return [{"image_id": ids[row], "caption": captions[row]} for row in rows]


def score_results(results: list[dict], table: "datasets.Dataset", **options) -> Scores:
    """Score COCO results against the captions of their table; see `captioner.metrics.score` for the options."""
    references = dict(zip(table["image_id"], table["captions"], strict=True))
    return score(results, references, allow_empty=True, **options)


def evaluate(config: EvaluateConfig) -> Scores | None:
    """Run the evaluation job; returns the scores in the main process, None in the others.

    Raises:
        ValueError: no data, or a folder that holds no captioner.
    """
    accelerator = Accelerator()
    table = read_split(config.data, config.split)
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    captioner = load(config.model, str(accelerator.device))
    results = caption_split(
        accelerator,
        captioner.model,
        captioner.processor,
        table,
        batch_size=config.batch_size,
        grid=parse_grid(config.grid),
        workers=config.data.workers,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    scores = None
    if accelerator.is_main_process:
        save_config(config, config.output)
        path = write_results(results, config.output / "results.json")
        accelerator.print(f"{len(results)} captions written to {path}")
        metrics = (*METRICS, "SPICE") if config.spice else METRICS
        scores = score_results(results, table, metrics=metrics, spice_models=config.spice)
        (config.output / "scores.json").write_text(json.dumps(scores.to_dict(), indent=1))
        accelerator.print(scores)
    accelerator.end_training()
    return scores


def read_split(data: DataConfig, split: str) -> "datasets.Dataset":
    """Read one split of the configured data.

    Raises:
        ValueError: no data is configured.
    """
    if data.root is None:
        raise ValueError("no captions: name an annotation file, a folder or a hub id with --data.root")
    return read_captions(
        data.root,
        split,
        images=data.images,
        restval=data.restval,
        on_bad=data.on_bad,
        image_column=data.image_column,
        caption_column=data.caption_column,
        id_column=data.id_column,
    )


def write_results(results: Sequence[dict], path: Path) -> Path:
    """Write COCO results JSON under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(list(results), ensure_ascii=False, indent=0))
    return temporary.rename(path)
