"""Caption a split with every process, write the captions, then score them."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader

from captioner.data.captions import read_captions
from captioner.data.collate import PictureRows, Pictures, open_pictures
from captioner.data.token_cache import open_cache
from captioner.grids import Grid, parse_grid
from captioner.metrics import METRICS, Scores, score
from captioner.metrics.java import spice_models
from captioner.modeling import CaptionerModel
from captioner.pipeline import load
from captioner.processes import leave_signals_to_main, start_processes
from captioner.processing import CaptionerProcessor
from captioner.progress import progress_bar
from captioner.training.config import DataConfig, EvaluateConfig, config_text, save_config
from captioner.whole_files import open_whole

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def caption_split(
    accelerator: Accelerator,
    model: CaptionerModel,
    processor: CaptionerProcessor,
    table: "datasets.Dataset",
    *,
    batch_size: int = 32,
    grid: Grid | None = None,
    workers: int = 0,
    pictures: Pictures | None = None,
    **generation,
) -> list[dict]:
    """Caption every picture of a table once, shared out over the processes.

    Batches are the same whatever the number of processes, and so are the captions. A picture that cannot be opened
    gets an empty caption, which scores zero, and a warning.

    Args:
        grid: compressed grid asked of the encoder; `None` for the model's own. Cached tokens have theirs.
        workers: picture loading processes.
        pictures: where the pictures of the table come from; its files if absent.
        generation: settings of transformers' `generate`.

    Returns:
        COCO results in the order of the table, in every process: `[{"image_id": ..., "caption": ...}, ...]`.
    """
    rows = range(len(table))
    batches = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    pictures = pictures or open_pictures(table, processor)
    loader = DataLoader(
        PictureRows(pictures),
        batch_sampler=mine,
        num_workers=pictures.workers(workers),
        collate_fn=list,
        worker_init_fn=leave_signals_to_main,
    )
    start = torch.tensor([processor.prompt_ids()], device=accelerator.device)
    model.eval()
    done: list[tuple[int, str]] = []
    hidden = not accelerator.is_main_process
    for batch in progress_bar(loader, desc="captioning", unit="batch", disable=hidden, leave=False):
        good = [(row, opened) for row, opened in batch if not isinstance(opened, str)]
        for row, error in batch:
            if isinstance(error, str):
                logger.warning("no caption for image %s: %s", table[row]["image_id"], error)
                done.append((row, ""))
        if good:
            images = send_to_device(pictures.batch([opened for _, opened in good]), accelerator.device)
            sequences = model.generate(**images, input_ids=start.expand(len(good), -1), grid=grid, **generation)
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
        ValueError: no data, a folder that holds no captioner, a token cache that is not this model's, or the results
            of another evaluation in `output`.
        OSError: a file that is missing, SPICE's models among them.
    """
    if config.spice:
        spice_models(config.spice)
    accelerator = start_processes()
    check_output(config)
    table = read_split(config.data, config.split)
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    captioner = load(config.model, str(accelerator.device))
    cache = open_cache(config.data.tokens, captioner.model, captioner.processor, parse_grid(config.grid))
    results = caption_split(
        accelerator,
        captioner.model,
        captioner.processor,
        table,
        batch_size=config.batch_size,
        grid=parse_grid(config.grid),
        workers=config.data.workers,
        pictures=open_pictures(table, captioner.processor, cache),
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    scores = None
    if accelerator.is_main_process:
        save_config(replace(config, overwrite=False), config.output)
        path = write_results(results, config.output / "results.json")
        accelerator.print(f"{len(results)} captions written to {path}")
        metrics = (*METRICS, "SPICE") if config.spice else METRICS
        scores = score_results(results, table, metrics=metrics, spice_models=config.spice)
        with open_whole(config.output / "scores.json") as file:
            json.dump(scores.to_dict(), file, indent=1)
        accelerator.print(scores)
    accelerator.end_training()
    return scores


def check_output(config: EvaluateConfig) -> None:
    """Refuse to replace the results of an evaluation with other settings, unless told to.

    Raises:
        ValueError: there are such results.
    """
    saved, same = config.output / "run_config.json", replace(config, overwrite=False)
    if config.overwrite or not (config.output / "results.json").exists() or not saved.exists():
        return
    if saved.read_text() != config_text(same):
        raise ValueError(
            f"'{config.output}' holds the results of an evaluation with other settings, see '{saved}'; "
            "name another --output, or pass --overwrite"
        )


def read_split(data: DataConfig, split: str) -> "datasets.Dataset":
    """Read one split of the configured data.

    Raises:
        ValueError: no data is configured, or a stream of it.
    """
    if data.root is None:
        raise ValueError("no captions: name an annotation file, a folder or a hub id with --data.root")
    if data.streaming:
        raise ValueError("--data.streaming is for training alone; leave it out here")
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
    """Write COCO results JSON, whole or not at all."""
    with open_whole(path) as file:
        json.dump(list(results), file, ensure_ascii=False, indent=0)
    return path
