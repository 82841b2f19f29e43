"""The stages of training: what each trains on, what it learns from, and by what its best model is chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from torch import nn

from captioner.data.batches import open_sets
from captioner.data.stream import SeededStream
from captioner.data.token_cache import open_cache
from captioner.grids import Grid
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.runs.digests import digest_json
from captioner.training.build import tag_vocabulary
from captioner.training.config import TrainConfig
from captioner.training.data import HeldOut, TextData, TrainingData
from captioner.training.objectives import BlankImage, CrossEntropy, Objective
from captioner.training.scst import SelfCritical, silence_dropout
from captioner.training.text import TagWords, TextStream
from captioner.training.validation import Validation, ValidationSet, validate, validate_text


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    size: int
    """Items of an epoch: images or sentences."""
    stream: SeededStream
    """The endless stream of them."""
    objective: Objective
    """What a step learns from."""
    settings: dict
    """Settings that a resumed run cannot change."""
    validate: Callable[[nn.Module], Validation]
    """Measures a prepared model; every process calls it."""
    unit: str = "images"
    """What an item is called."""
    measure: str = "CIDEr"
    """The value of a validation's record that the best model is chosen by."""

    def better(self, record: dict[str, float], best: float | None) -> bool:
        """Return whether a validation is better than the best one before."""
        value = record[self.measure]
        return best is None or (value < best if self.measure.startswith("loss") else value > best)


def open_stage(
    config: TrainConfig,
    accelerator: Accelerator,
    data: TrainingData,
    held_out: Sequence[HeldOut],
    model: CaptionerModel,
    processor: CaptionerProcessor,
    grids: Sequence[Grid],
    per_step: int,
) -> Stage:
    """Open the stage of a run.

    Args:
        config: the run.
        accelerator: its accelerator.
        data: the training split.
        held_out: the validation split of each data set.
        model: the model, not prepared yet.
        processor: its processor.
        grids: compressed grids of which training steps draw one; none for the model's own alone.
        per_step: items of an optimiser step, over all processes.

    Raises:
        ValueError: a token cache does not fit the model or the data.
    """
    if isinstance(data, TextData):
        return text_stage(config, accelerator, data, held_out, model, processor, grids, per_step)
    caches = [open_cache(folder, model, processor, grids=grids) for folder in config.data.tokens]
    images = open_sets({part.number: part.table for part in held_out}, processor, caches, required=False)
    sets = [ValidationSet(part.name, part.table, own) for part, own in zip(held_out, images, strict=True)]
    objective: Objective = CrossEntropy(config.label_smoothing)
    captions_per_image = config.data.captions_per_image
    if config.stage == "scst":
        silence_dropout(model.decoder)
        objective = SelfCritical(accelerator, processor, data.references, config.scst, config.max_new_tokens)
        captions_per_image = 1  # the model samples the captions that it learns from
    stream = data.stream(processor, captions_per_image, config.seed, caches, grids, per_step)

    def check(prepared: nn.Module) -> Validation:
        return validate(accelerator, prepared, processor, sets, config)

    return Stage(len(data), stream, objective, data.settings(), check)


def text_stage(
    config: TrainConfig,
    accelerator: Accelerator,
    data: TextData,
    held_out: Sequence[HeldOut],
    model: CaptionerModel,
    processor: CaptionerProcessor,
    grids: Sequence[Grid],
    per_step: int,
) -> Stage:
    """Open stage text, which trains the decoder alone; see `open_stage`.

    The projector is frozen, because a blank image teaches it nothing.
    """
    model.projector.requires_grad_(False)
    vocabulary = tag_vocabulary(config, model)
    tags = TagWords(vocabulary, processor, config.inputs)
    blank = BlankImage(model, processor.image["input_size"], grids)
    stream = TextStream(data.sentences, processor, tags, config.seed, grids, per_step)
    sets = [ValidationSet(part.name, part.table) for part in held_out]
    settings = data.settings()
    if vocabulary is not None:
        settings["tags digest"] = digest_json(vocabulary.to_dict())
        settings["inputs.tag_dropout"] = config.inputs.tag_dropout
        settings["inputs.single_tag_dropout"] = config.inputs.single_tag_dropout
    check = partial(validate_text, accelerator, processor=processor, sets=sets, tags=tags, blank=blank, config=config)
    objective = CrossEntropy(config.label_smoothing, blank)
    return Stage(len(data), stream, objective, settings, check, unit="sentences", measure="loss_val")
