"""The stages of training: what each trains on, what it learns from, and by what its best model is chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from torch import nn

from captioner.data.batches import open_sets
from captioner.data.sets import open_caches
from captioner.data.stream import SeededStream
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.runs.digests import digest_json
from captioner.tags import TagVocabulary
from captioner.training.build import TEXT_TAGS, read_vocabulary, tag_vocabulary
from captioner.training.config import InputConfig, TrainConfig
from captioner.training.data import HeldOut, TableData, TextData, TrainingData
from captioner.training.inputs import MixedStream, PairedInputs
from captioner.training.objectives import BlankImage, CrossEntropy, Objective
from captioner.training.scst import SelfCritical, silence_dropout
from captioner.training.text import TagWords, TextStream
from captioner.training.validation import Validation, ValidationSet, validate, validate_text

TAG_SETTINGS = ("tag_dropout", "single_tag_dropout", "tag_spread")
"""Settings of `InputConfig` that have an effect with tags."""


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    size: int
    """Items of an epoch: images or sentences."""
    stream: SeededStream | MixedStream
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
    caches = open_caches(config.data.tokens, model, processor, grids=grids)
    images = open_sets({part.number: part.table for part in held_out}, processor, caches, required=False)
    sets = [ValidationSet(part.name, part.table, own) for part, own in zip(held_out, images, strict=True)]
    tags = TagWords(tag_vocabulary(config, model), processor, config.inputs)
    inputs = None
    if tags.vocabulary is not None or config.inputs.image_dropout or data.sentences or config.scst.xe_weight:
        inputs = PairedInputs(accelerator, tags, config.inputs)
    objective: Objective = CrossEntropy(config.label_smoothing, inputs=inputs)
    captions_per_image = config.data.captions_per_image
    if config.stage == "scst":
        assert isinstance(data, TableData), "TrainConfig refuses rewards on a stream"
        silence_dropout(model.decoder)
        objects, longest = object_vocabulary(config, model), config.max_new_tokens
        objective = SelfCritical(accelerator, processor, data.references, config.scst, longest, objects, inputs)
        if not config.scst.xe_weight:
            captions_per_image = 1  # the model samples the captions that it learns from
    images_stream = data.stream(processor, captions_per_image, config.seed, caches, grids, per_step)
    stream: SeededStream | MixedStream = images_stream
    if data.sentences:
        share = config.inputs.text_share
        text = TextStream(data.sentences, processor, tags, config.seed)
        stream = MixedStream(images_stream, text, share / (1 - share) * data.drawn(captions_per_image))
    settings = data.settings() | input_settings(config.inputs, tags, data.sentences)
    check = partial(validate, accelerator, processor=processor, sets=sets, config=config)
    return Stage(len(data), stream, objective, settings, check)


def object_vocabulary(config: TrainConfig, model: CaptionerModel) -> TagVocabulary | None:
    """Return the objects of the object reward, if it has a weight.

    Raises:
        SettingError: no vocabulary is named, and the captioner has no tags.
    """
    if not config.scst.object_weight:
        return None
    if config.scst.objects is not None:
        return read_vocabulary(config.scst.objects)
    if (vocabulary := tag_vocabulary(config, model)) is None:
        raise SettingError("object_weight needs a vocabulary of objects, because the captioner has no tags", "objects")
    return vocabulary


def input_settings(config: InputConfig, tags: TagWords, sentences: Sequence[str] = ()) -> dict:
    """Return the settings of inputs that a resumed run cannot change; `None` where they have no effect."""
    settings: dict = {"inputs.image_dropout": config.image_dropout or None}
    if sentences:
        settings |= {"text digest": digest_json(list(sentences)), "inputs.text_share": config.text_share}
    if tags.vocabulary is not None:
        settings["tags digest"] = digest_json(tags.vocabulary.to_dict())
        settings |= {f"inputs.{name}": getattr(config, name) for name in TAG_SETTINGS}
    return settings


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
    tags = TagWords(tag_vocabulary(config, model), processor, config.inputs)
    if tags.vocabulary is not None and model.tags is None:
        setattr(model.config, TEXT_TAGS, tags.vocabulary.to_dict())
    blank = BlankImage(model, processor.image["input_size"], grids)
    stream = TextStream(data.sentences, processor, tags, config.seed, grids, per_step)
    sets = [ValidationSet(part.name, part.table) for part in held_out]
    settings = data.settings() | input_settings(config.inputs, tags)
    check = partial(validate_text, accelerator, processor=processor, sets=sets, tags=tags, blank=blank, config=config)
    objective = CrossEntropy(config.label_smoothing, blank)
    return Stage(len(data), stream, objective, settings, check, unit="sentences", measure="loss_val")
