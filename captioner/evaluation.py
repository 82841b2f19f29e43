"""Caption a split on all processes, write the captions, and score them."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader

from captioner.data.batches import ImageRows, Images, open_images
from captioner.grids import Grid
from captioner.image_tags import TagChoice
from captioner.metrics import Scores, score
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.runs.files import open_whole
from captioner.runs.processes import leave_signals_to_main
from captioner.runs.progress import progress_bar

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
    images: Images | None = None,
    tags: TagChoice | None = None,
    show_tags: bool = False,
    **generation: Any,
) -> list[dict]:
    """Caption every image of a table once; the processes share the images.

    The batches, and therefore the captions, are the same for any number of processes. An image that cannot be opened
    gets an empty caption, which scores zero, and a warning.

    Args:
        accelerator: accelerator of the processes.
        model: the captioner model.
        processor: its processor.
        table: the images.
        batch_size: images per batch.
        grid: compressed grid of the image tokens; `None` for the model's own. Cached tokens have their own.
        workers: number of processes that load images.
        images: source of the table's images; `None` for their files.
        tags: which object tags of an image the model reads; `None` for those that it predicts.
        show_tags: whether a result has the tags of its image.
        generation: settings of transformers' `generate`.

    Returns:
        COCO results in the order of the table, `[{"image_id": ..., "caption": ...}, ...]`; the same in every process.
        The result of an image that cannot be opened also has an `error`.
    """
    rows = range(len(table))
    batches = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    images = images or open_images(table, processor)
    loader = DataLoader(
        ImageRows(images),
        batch_sampler=mine,
        num_workers=images.workers(workers),
        collate_fn=list,
        worker_init_fn=leave_signals_to_main,
    )
    model.eval()
    done: list[tuple[int, dict]] = []
    hidden = not accelerator.is_main_process
    for batch in progress_bar(loader, desc="captioning", unit="batch", disable=hidden, leave=False):
        good = [(row, opened) for row, opened in batch if not isinstance(opened, str)]
        for row, error in batch:
            if isinstance(error, str):
                logger.warning("no caption for image %s: %s", table[row]["image_id"], error)
                done.append((row, {"caption": "", "error": error}))
        if good:
            inputs = send_to_device(images.batch([opened for _, opened in good]), accelerator.device)
            tokens = model.read_image(inputs.get("pixel_values"), inputs.get("image_tokens"), grid)
            chosen, shown = (tags or TagChoice()).choose(model, tokens)
            prompts: dict[str, Any] = processor.prompts(len(good), accelerator.device)
            sequences = model.generate(image_tokens=tokens, tags=chosen, **prompts, **generation)
            for (row, _), text, own in zip(good, processor.captions(sequences), shown, strict=True):
                done.append((row, {"caption": text} | ({"tags": [asdict(tag) for tag in own]} if show_tags else {})))
    found = dict(gather_object(done))
    ids = table["image_id"]
    return [{"image_id": ids[row], **found[row]} for row in rows]


def score_results(results: list[dict], table: "datasets.Dataset", **options: Any) -> Scores:
    """Score COCO results against the captions of their table.

    Args:
        results: the results, as `caption_split` returns them.
        table: the caption table.
        options: options of `captioner.metrics.score`.
    """
    references = dict(zip(table["image_id"], table["captions"], strict=True))
    scores = score(results, references, allow_empty=True, **options)
    if failed := count_failed(results):
        scores.warnings.append(f"images that cannot be opened, scored with an empty caption: {failed}")
    return scores


def count_failed(results: Sequence[dict]) -> int:
    """Count the results whose image could not be opened."""
    return sum("error" in row for row in results)


def write_results(results: Sequence[dict], path: Path) -> Path:
    """Write COCO results as JSON, completely or not at all; returns the path."""
    with open_whole(path) as file:
        json.dump(list(results), file, ensure_ascii=False, indent=0)
    return path
