"""Validation during training: caption the held-out images, score them, and measure the loss on their captions."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from captioner.data.batches import ImageRows, Images
from captioner.evaluation import caption_split, score_results
from captioner.labels import split_targets, token_loss
from captioner.processing import CaptionerProcessor
from captioner.training.config import TrainConfig

if TYPE_CHECKING:
    import datasets


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    processor: CaptionerProcessor,
    table: "datasets.Dataset",
    images: Images,
    config: TrainConfig,
) -> tuple[dict, list[dict]]:
    """Caption the validation images and score the captions; every process returns the same.

    Returns:
        The record (`loss_val`, `CIDEr`, `BLEU-4`), and the captions as COCO results in the order of the table.
    """
    results = caption_split(
        accelerator,
        accelerator.unwrap_model(model),
        processor,
        table,
        batch_size=config.batch_size,
        workers=config.data.workers,
        images=images,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    scores = score_results(results, table, metrics=("BLEU", "CIDEr"))
    loss = validation_loss(accelerator, model, processor, table, images, config)
    return {"loss_val": loss, **{name: scores[name] for name in ("CIDEr", "BLEU-4")}}, results


def validation_loss(
    accelerator: Accelerator,
    model: nn.Module,
    processor: CaptionerProcessor,
    table: "datasets.Dataset",
    images: Images,
    config: TrainConfig,
) -> float:
    """Return the cross-entropy per token, without smoothing, on the first K captions of each validation image."""
    size, count = config.batch_size, config.data.captions_per_image
    sums = torch.zeros(2, device=accelerator.device)
    model.eval()
    rows = ImageRows(images)
    for start in range(accelerator.process_index * size, len(table), accelerator.num_processes * size):
        opened: list[tuple[int, Any]] = [rows[row] for row in range(start, min(start + size, len(table)))]
        good = [(row, image) for row, image in opened if not isinstance(image, str)]
        if not good:
            continue
        groups = table[[row for row, _ in good]]["captions"]
        captions = [group[k % len(group)] for group in groups for k in range(count)]
        batch = images.batch([image for _, image in good]), processor.text(captions)
        image_inputs, text = send_to_device(batch, accelerator.device)
        text_inputs, targets = split_targets(text)
        with accelerator.autocast():
            logits = accelerator.unwrap_model(model).logits_at(**image_inputs, **text_inputs)  # (N, V)
        sums[0] += token_loss(logits, targets)
        sums[1] += len(targets)
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    return total / max(tokens, 1)
