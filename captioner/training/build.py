"""The model to train: built from an encoder and a decoder, or loaded as a trained captioner."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from captioner.configuration import CaptionerConfig
from captioner.data.encoding import token_shapes
from captioner.data.fingerprint import compare_sources, encoder_fingerprint
from captioner.encoders import TokenEncoder, describe_encoder, frozen_encoder
from captioner.errors import SettingError
from captioner.fusion import FUSIONS
from captioner.generation import check_room
from captioner.grids import Grid, parse_grid, write_grid
from captioner.inference import Captioner, load
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor, image_settings, train_tokenizer
from captioner.tag_head import DESCRIPTION, TagConfig, TagHead, load_head, read_description
from captioner.tags import TagVocabulary
from captioner.training.config import SCRATCH, ModelConfig, TrainConfig
from captioner.training.decoders import (
    check_positions,
    copy_captioner,
    copy_weights,
    decoder_of,
    hub_decoder,
    new_decoder,
    same_encoder,
)
from captioner.training.lora import tune
from captioner.transformers_versions import checkpoint_activations

TEXT_TAGS = "text_tags"
"""Entry of a captioner's configuration with the vocabulary of stage text, if it had no head."""


def starting_point(config: TrainConfig, captions: Callable[[], list[str]]) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Build or load the model and processor of a run, choose the trained weights, and set how the model generates.

    Args:
        config: the run; `init_from` and `stage` decide whether the model is built or loaded.
        captions: returns the captions on which the tokenizer of a decoder from scratch is trained.

    Raises:
        ValueError: an encoder, decoder or captioner cannot be found, or parts do not fit together.
        SettingError: the decoder has no room for captions of `max_new_tokens`, or stage text had other settings.
    """
    source = config.init_from
    if source is None and config.stage == "scst":
        source = str(config.output / "best")
        if not Path(source).is_dir():
            raise SettingError(
                f"stage scst starts from a trained captioner, and there is none at '{source}'; train stage xe first",
                "output",
                "init_from",
            )
    if source is None:
        settings = config.model
        if (text := text_stage_of(config)) is not None:
            settings = replace(settings, decoder=str(text))
        if config.stage == "text" and settings.tags is not None and not settings.tags.is_dir():
            settings = replace(settings, tags=None)  # a vocabulary, which needs no head
        model, processor = build_captioner(settings, captions() if settings.decoder is None else [])
    else:
        loaded = load(source, "cpu")
        model, processor = loaded.model, loaded.processor
    tune(model, config.model)
    if config.gradient_checkpointing:
        checkpoint_activations(model.decoder)
    model.generation_config = GenerationConfig(
        bos_token_id=processor.start_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    prefix_tokens = count_tokens(model.encoder, model.config.grid, processor.image["input_size"])
    prompt_tokens = len(processor.prompt_ids()) + (0 if model.tags is None else model.tags.most_words())
    check_room(model.fusion, prefix_tokens, prompt_tokens, config.max_new_tokens)  # so that no epoch is trained in vain
    return model, processor


def text_stage_of(config: TrainConfig) -> Path | None:
    """Return the model of stage text whose decoder stage xe starts with; `None` if there is none.

    Raises:
        SettingError: stage text had another decoder than this run, or another vocabulary of tags.
    """
    folder = config.output / "text"
    if config.stage != "xe" or config.init_from is not None or not (folder / "best").is_dir():
        return None
    try:
        found = json.loads((folder / "run_config.json").read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"'{folder}' holds a model of stage text and no run_config.json of it") from None
    for name in ("decoder", "fusion", *SCRATCH):
        if found.get(name) != (value := getattr(config.model, name)):
            raise SettingError(
                f"stage text in '{folder}' had {name} {found.get(name)}, and this run has {value}; a stage that "
                "continues it must have the same",
                *(name, "output"),
            )
    return folder / "best"


def tag_vocabulary(config: TrainConfig, model: CaptionerModel) -> TagVocabulary | None:
    """Return the vocabulary of object tags of a run, if it has one.

    Raises:
        ValueError: its file cannot be used.
        OSError: its file cannot be read.
    """
    if model.tags is not None:
        return model.tags.vocabulary
    return None if config.model.tags is None else read_vocabulary(config.model.tags)


def read_vocabulary(path: Path) -> TagVocabulary:
    """Read a vocabulary of tags from a file, or from the folder of a trained tag head.

    Raises:
        ValueError: the file cannot be used.
        OSError: the file cannot be read.
    """
    return TagVocabulary.read(path / DESCRIPTION if path.is_dir() else path)


def training_grids(config: TrainConfig, model: CaptionerModel, processor: CaptionerProcessor) -> list[Grid]:
    """Return the compressed grids from which training steps draw; none for the model's own grid alone.

    Raises:
        SettingError: the model's own grid is not among them, a grid is larger than the encoder's map, or its tokens and
            the text are more than the decoder has room for.
    """
    grids = [parse_grid(grid) for grid in config.grids]
    own = model.config.grid or model.encoder.grid
    if grids and own not in grids:
        found = "a token for every cell of its map" if own is None else f"the grid {write_grid(own)}"
        raise SettingError(
            f"validation takes the model's own grid, {found}, which is none of the grids to train at, "
            f"{', '.join(map(write_grid, grids))}",
            *("grid", "grids"),
        )
    shapes = token_shapes(model.encoder, processor.image["input_size"], dict(zip(config.grids, grids, strict=True)))
    room = getattr(model.config.text_config, "max_position_embeddings", None)
    for name, (tokens, _) in shapes.items():
        needed = model.fusion.positions(tokens, processor.max_length)
        if room is not None and needed > room:
            raise SettingError(
                f"the decoder has room for {room} tokens; those of the grid {name} and text need {needed}",
                *("grids", "max_length"),
            )
    return grids


def count_tokens(encoder: TokenEncoder, grid: Grid | None, input_size: Sequence[int]) -> int:
    """Count the tokens of an image of the size that the run takes, which may be another than the encoder's own.

    Raises:
        ValueError: the encoder does not take images of this size, or the grid is larger than its map.
    """
    return token_shapes(encoder, input_size, {"own": grid})["own"][0]


def build_captioner(config: ModelConfig, captions: list[str]) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Build a captioner.

    Args:
        config: the encoder, the decoder and how they are joined.
        captions: captions on which the tokenizer of a decoder from scratch is trained.

    Raises:
        ValueError: an encoder or decoder cannot be found, or they do not fit together.
    """
    trained: Captioner | None = None
    encoder, grid = frozen_encoder(config.encoder), parse_grid(config.grid)
    image = image_settings(encoder.default_cfg, config.image_size, config.crop_mode)
    tokens = count_tokens(encoder, grid, image["input_size"])
    positions = FUSIONS[config.fusion].positions(tokens, config.max_length)
    tokenizer: PreTrainedTokenizerBase
    text_config: PretrainedConfig
    if config.decoder is None:
        if config.tune != "full":
            raise SettingError("a decoder from scratch has to be trained whole", "tune", "decoder")
        tokenizer = train_tokenizer(captions, config.vocab_size)
        text_config = new_decoder(config, tokenizer, positions=max(512, positions))
    elif (trained := decoder_of(config)) is not None:
        tokenizer, text_config = trained.processor.tokenizer, trained.model.config.text_config
        check_positions(config.decoder, text_config, positions)
    else:
        tokenizer, text_config = hub_decoder(config.decoder, positions)
    processor = CaptionerProcessor(tokenizer, image=image, prompt=config.prompt, max_length=config.max_length)
    if len(processor.prompt_ids()) >= config.max_length - 1:
        raise SettingError(f"the prompt leaves no room for captions of {config.max_length} tokens", "max_length")
    model_config = CaptionerConfig(
        encoder_config=describe_encoder(config.encoder),
        text_config=text_config,
        fusion=config.fusion,
        grid=grid,
        blind=config.blind,
    )
    head = None
    if config.tags is not None:
        head, tags = tag_head(config.tags, encoder, encoder_fingerprint(encoder, model_config.encoder_config, image))
        tags = replace(tags, tokens=tuple(map(tuple, processor.tag_ids(tags.vocabulary.names))))
        model_config.tags = tags.to_dict()
        if trained is not None:
            check_learned(trained.model, tags.vocabulary, config)
    elif trained is not None and trained.model.tag_head is not None and same_encoder(trained.model, encoder):
        head, model_config.tags = trained.model.tag_head, trained.model.config.tags
    model = CaptionerModel(model_config)
    model.encoder.load_state_dict(encoder.state_dict())
    if head is not None and model.tag_head is not None:
        model.tag_head.load_state_dict(head.state_dict())
    if trained is not None:
        copy_captioner(trained.model, model)
    elif config.decoder is not None:
        copy_weights(config.decoder, model.decoder)
    return model, processor


def check_learned(trained: CaptionerModel, vocabulary: TagVocabulary, config: ModelConfig) -> None:
    """Refuse tags that a decoder has not read in stage text.

    Args:
        trained: the captioner whose decoder is taken.
        vocabulary: the tags of the new captioner.
        config: the new captioner.

    Raises:
        SettingError: the message names the first such tag.
    """
    learned = learned_vocabulary(trained)
    if learned is None:
        return
    names = {name.casefold() for name in learned.names}
    if unknown := [name for name in vocabulary.names if name.casefold() not in names]:
        raise SettingError(
            f"the tag head '{config.tags}' has {len(unknown)} tags that the decoder of '{config.decoder}' has not "
            f"learned, such as '{unknown[0]}'",
            *("tags", "decoder"),
        )


def learned_vocabulary(model: CaptionerModel) -> TagVocabulary | None:
    """Return the tags whose words the decoder of a captioner has learned to read, if there are any."""
    if model.tags is not None:
        return model.tags.vocabulary
    found = getattr(model.config, TEXT_TAGS, None)
    return None if found is None else TagVocabulary.from_dict(found)


def tag_head(folder: Path, encoder: TokenEncoder, source: dict) -> tuple[TagHead, TagConfig]:
    """Load a trained tag head for an encoder.

    Args:
        folder: its folder.
        encoder: the encoder.
        source: the encoder's `encoder_fingerprint`.

    Raises:
        SettingError: there is no head, or it was trained on another encoder.
        ValueError: its files are damaged.
    """
    head, config = load_head(folder, encoder.embed_dim, encoder.num_prefix_tokens)
    if difference := compare_sources(read_description(folder)["source"], source):
        raise SettingError(
            f"the tag head '{folder}' comes from {difference}; this model needs a head of its own", "tags"
        )
    return head, config


def trainable_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
