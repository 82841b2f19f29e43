"""The model to train: built from an encoder and a decoder, or loaded as a trained captioner."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from captioner.configuration import CaptionerConfig
from captioner.data.encoding import token_shapes
from captioner.encoders import TokenEncoder, describe_encoder, frozen_encoder
from captioner.errors import SettingError, first_line
from captioner.fusion import FUSIONS
from captioner.generation import check_room
from captioner.grids import Grid, parse_grid, write_grid
from captioner.hub import hub_options
from captioner.inference import Captioner, load
from captioner.loading import check_complete
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor, image_settings, train_tokenizer
from captioner.runs.digests import digest_tensors
from captioner.tag_head import DESCRIPTION
from captioner.tags import TagVocabulary
from captioner.training.config import SCRATCH, ModelConfig, TrainConfig
from captioner.training.lora import tune
from captioner.transformers_versions import LOADING_ERRORS, checkpoint_activations


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
    prompt_tokens = len(processor.prompt_ids())
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
    model = CaptionerModel(model_config)
    model.encoder.load_state_dict(encoder.state_dict())
    if trained is not None:
        copy_captioner(trained.model, model)
    elif config.decoder is not None:
        copy_weights(config.decoder, model.decoder)
    return model, processor


def decoder_of(config: ModelConfig) -> Captioner | None:
    """Load the captioner whose decoder a new captioner takes, if `config.decoder` is the folder of a captioner.

    Raises:
        SettingError: its decoder reads images by another fusion.
    """
    path = Path(str(config.decoder)) / "config.json"
    try:
        if json.loads(path.read_text())["model_type"] != CaptionerConfig.model_type:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    trained = load(config.decoder, "cpu")
    if (fusion := trained.model.config.fusion) != config.fusion:
        raise SettingError(
            f"the decoder of '{config.decoder}' reads images by {fusion}, not by {config.fusion}", "fusion", "decoder"
        )
    return trained


def copy_captioner(trained: CaptionerModel, model: CaptionerModel) -> None:
    """Copy the weights of a trained captioner into a new one: those of its decoder and of its projector.

    For another encoder, the projector's first layers are new, and its output for zeros is what the decoder learned.
    """
    model.decoder.load_state_dict(trained.decoder.state_dict())
    state = trained.projector.state_dict()
    if digest_tensors(trained.encoder.state_dict()) != digest_tensors(model.encoder.state_dict()):
        state = {name: state[name] for name in ("fc1.bias", "fc2.weight", "fc2.bias")}
    model.projector.load_state_dict(state, strict=False)


def new_decoder(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, positions: int) -> GPT2Config:
    """Return the configuration of a decoder from scratch.

    Args:
        config: its size.
        tokenizer: its tokenizer.
        positions: number of its positions.
    """
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's gelu_new, in one operation
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def hub_decoder(name: str, positions: int) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Load the tokenizer and the configuration of a causal language model; its weights are trained in float32.

    Args:
        name: hub id or folder of the model.
        positions: number of positions that it must have, image tokens included.

    Raises:
        ValueError: there is no such model, it has no end token, or it has too few positions.
    """
    try:
        options = hub_options(name) | {"trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        text_config = AutoConfig.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        raise SettingError(f"no decoder at '{name}': {first_line(error)}", "decoder") from None
    if tokenizer.eos_token_id is None:
        raise SettingError(
            f"the tokenizer of '{name}' has no end token, so captions could not end; "
            "name one as eos_token in its tokenizer_config.json, or use another decoder",
            "decoder",
        )
    if len(tokenizer) > text_config.vocab_size:
        raise SettingError(
            f"the tokenizer of '{name}' has {len(tokenizer)} tokens, its model only {text_config.vocab_size}; "
            "they do not belong together",
            "decoder",
        )
    check_positions(name, text_config, positions)
    text_config.dtype = torch.float32  # many models are published in bfloat16, in which small updates are lost
    return tokenizer, text_config


def check_positions(name: str | None, text_config: PretrainedConfig, positions: int) -> None:
    """Refuse a decoder that has too few positions.

    Raises:
        SettingError: the message has both numbers.
    """
    room = getattr(text_config, "max_position_embeddings", None)
    if room is not None and room < positions:
        raise SettingError(
            f"'{name}' has room for {room} tokens; image tokens and text need {positions}", "grid", "max_length"
        )


def copy_weights(name: str, decoder: nn.Module) -> None:
    """Load the weights of a causal language model into a decoder of the same configuration.

    Args:
        name: hub id or folder of the model.
        decoder: the decoder, changed in place.

    Raises:
        SettingError: the model has no safetensors weights, lacks some of its weights, or has another architecture.
    """
    options: dict[str, Any] = hub_options(name) | {"trust_remote_code": False}
    options |= {"use_safetensors": True, "dtype": torch.float32}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_complete` names them
    try:
        pretrained, info = AutoModelForCausalLM.from_pretrained(name, config=decoder.config, **options)
        missing = info["missing_keys"] and info["missing_keys"] & weight_names(name)
    except LOADING_ERRORS as error:
        raise SettingError(f"no weights for decoder '{name}': {first_line(error)}", "decoder") from None
    check_complete(name, missing, info["mismatched_keys"], "decoder")
    decoder.load_state_dict(pretrained.state_dict())


def weight_names(name: str) -> set[str]:
    """Return the names of a causal language model's weights by its own configuration, without a fusion's weights."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub_options(name))
    with torch.device("meta"), torch.random.fork_rng(devices=()):
        return set(AutoModelForCausalLM.from_config(config).state_dict())


def trainable_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
