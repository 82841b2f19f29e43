"""Validation during training: caption the held-out images, score them, and measure the loss on their captions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from captioner.data.batches import ImageRows, Images, open_images, owners_of
from captioner.evaluation import caption_split, score_results
from captioner.labels import put_before, split_targets, token_loss
from captioner.processing import CaptionerProcessor
from captioner.training.config import TrainConfig
from captioner.training.objectives import BlankImage
from captioner.training.text import TagWords

if TYPE_CHECKING:
    import datasets


class ValidationSet(NamedTuple):
    """The validation split of one data set."""

    name: str
    table: "datasets.Dataset"
    images: Images | None = None
    """The opened images; `None` where they are not read."""


class Validation(NamedTuple):
    """The outcome of a validation."""

    record: dict[str, float]
    """The values for the log."""
    captions: list[tuple[ValidationSet, list[dict]]]
    """For each data set, its captions as COCO results in the order of its table."""


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    processor: CaptionerProcessor,
    sets: Sequence[ValidationSet],
    config: TrainConfig,
) -> Validation:
    """Caption the validation images of each data set and score the captions; every process returns the same.

    The record has `loss_val`, `CIDEr` and `BLEU-4`. Of several sets, these are the means over the sets, each with the
    same weight, and the record also has the values of each set, such as `CIDEr/coco`.
    """
    found: list[dict[str, float]] = []
    captions = []
    for part in sets:
        images = part.images or open_images(part.table, processor)
        results = caption_split(
            accelerator,
            accelerator.unwrap_model(model),
            processor,
            part.table,
            batch_size=config.batch_size,
            workers=config.data.workers,
            images=images,
            num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens,
        )
        scores = score_results(results, part.table, metrics=("BLEU", "CIDEr"))
        loss = validation_loss(accelerator, model, processor, part.table, images, config)
        found.append({"loss_val": loss, **{name: float(scores[name] or 0) for name in ("CIDEr", "BLEU-4")}})
        captions.append((part, results))
    return Validation(join_records([part.name for part in sets], found), captions)


@torch.no_grad()
def validate_text(
    accelerator: Accelerator,
    model: nn.Module,
    processor: CaptionerProcessor,
    sets: Sequence[ValidationSet],
    tags: TagWords,
    blank: BlankImage,
    config: TrainConfig,
) -> Validation:
    """Measure the loss on the captions of each data set without their images; every process returns the same.

    The record has `loss_val`, after all tags that a caption mentions, and where there are tags, `loss_val_no_tags`. For
    several sets, see `validate`.
    """
    found: list[dict[str, float]] = []
    for part in sets:
        captions = [caption for group in part.table["captions"] for caption in group]
        mentioned = [tags.tokens(tags.of(caption)) for caption in captions]
        ways = {"loss_val": mentioned}
        if any(mentioned):
            ways["loss_val_no_tags"] = [[] for _ in captions]
        losses = {
            name: text_loss(accelerator, model, processor, captions, before, blank, config.batch_size)
            for name, before in ways.items()
        }
        found.append(losses)
    return Validation(join_records([part.name for part in sets], found), [])


def text_loss(
    accelerator: Accelerator,
    model: nn.Module,
    processor: CaptionerProcessor,
    sentences: Sequence[str],
    before: Sequence[Sequence[int]],
    blank: BlankImage,
    batch_size: int,
) -> float:
    """Return the cross-entropy per token of sentences without an image, without smoothing.

    Args:
        accelerator: accelerator of the processes, which share the sentences.
        model: the prepared model.
        processor: its processor.
        sentences: the sentences.
        before: the tokens of tags before each of them.
        blank: the image tokens.
        batch_size: sentences per forward.
    """
    sums, device = torch.zeros(2, device=accelerator.device), accelerator.device
    model.eval()
    texts = processor.texts(sentences)
    order = texts.lengths.argsort(kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for numbers in batches[accelerator.process_index :: accelerator.num_processes]:
        text = put_before(texts.batch(numbers), [before[n] for n in numbers])
        inputs, targets = split_targets(send_to_device(text, device))
        with accelerator.autocast():
            logits = accelerator.unwrap_model(model).logits_at(image_tokens=blank.tokens(None, device), **inputs)
        sums[0] += token_loss(logits, targets)
        sums[1] += len(targets)
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    return total / max(tokens, 1)


def join_records(names: Sequence[str], records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means over the records of several data sets, and each value under its name and that of its set."""
    if len(records) == 1:
        return records[0]
    common = [key for key in records[0] if all(key in record for record in records)]
    joined = {key: sum(record[key] for record in records) / len(records) for key in common}
    for name, record in zip(names, records, strict=True):
        joined |= {f"{key}/{name}": value for key, value in record.items()}
    return joined


def validation_loss(
    accelerator: Accelerator,
    model: nn.Module,
    processor: CaptionerProcessor,
    table: "datasets.Dataset",
    images: Images,
    config: TrainConfig,
) -> float:
    """Return the cross-entropy per token, without smoothing, on the first `captions_per_image` captions of an image.

    The captions come after the tags of their image, if the captioner has tags.
    """
    captioner = accelerator.unwrap_model(model)
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
        groups = [group[:count] for group in groups]
        text = processor.text([caption for group in groups for caption in group])
        batch = images.batch([image for _, image in good]), text, owners_of(groups)
        image_inputs, text, owners = send_to_device(batch, accelerator.device)
        with accelerator.autocast():
            if captioner.tags is not None:
                if "image_tokens" not in image_inputs:
                    image_inputs = {"image_tokens": captioner.encode(**image_inputs)}
                words = [captioner.tags.words_of(tags) for tags in captioner.pick_tags(image_inputs["image_tokens"])]
                text = put_before(text, [words[owner] for owner in owners.tolist()])
            text_inputs, targets = split_targets(text)
            logits = captioner.logits_at(**image_inputs, owners=owners, **text_inputs)  # (N, V)
        sums[0] += token_loss(logits, targets)
        sums[1] += len(targets)
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    return total / max(tokens, 1)
