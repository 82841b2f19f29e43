"""The model to train: built from an encoder and a decoder, or loaded as a trained captioner."""

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
from captioner.data.token_cache import compare_sources, encoder_fingerprint
from captioner.encoders import TokenEncoder, describe_encoder, frozen_encoder
from captioner.errors import SettingError, first_line
from captioner.fusion import FUSIONS
from captioner.generation import check_room
from captioner.grids import Grid, parse_grid, write_grid
from captioner.hub import hub_options
from captioner.inference import load
from captioner.loading import check_complete
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor, image_settings, train_tokenizer
from captioner.tag_head import TagConfig, TagHead, load_head, read_description
from captioner.training.config import ModelConfig, TrainConfig
from captioner.training.lora import tune
from captioner.transformers_versions import LOADING_ERRORS, checkpoint_activations


def starting_point(config: TrainConfig, captions: Callable[[], list[str]]) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Build or load the model and processor of a run, choose the trained weights, and set how the model generates.

    Args:
        config: the run; `init_from` and `stage` decide whether the model is built or loaded.
        captions: returns the captions on which the tokenizer of a decoder from scratch is trained.

    Raises:
        ValueError: an encoder, decoder or captioner cannot be found, or parts do not fit together.
        SettingError: the decoder has no room for captions of `max_new_tokens`.
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
        model, processor = build_captioner(config.model, captions() if config.model.decoder is None else [])
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
    model = CaptionerModel(model_config)
    model.encoder.load_state_dict(encoder.state_dict())
    if head is not None and model.tag_head is not None:
        model.tag_head.load_state_dict(head.state_dict())
    if config.decoder is not None:
        copy_weights(config.decoder, model.decoder)
    return model, processor


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
    room = getattr(text_config, "max_position_embeddings", None)
    if room is not None and room < positions:
        raise SettingError(
            f"'{name}' has room for {room} tokens; image tokens and text need {positions}", "grid", "max_length"
        )
    text_config.dtype = torch.float32  # many models are published in bfloat16, in which small updates are lost
    return tokenizer, text_config


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
