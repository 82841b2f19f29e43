"""The decoder of a new captioner: from scratch, of the hub, or of a trained captioner."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from captioner.configuration import CaptionerConfig
from captioner.encoders import TokenEncoder
from captioner.errors import SettingError, first_line
from captioner.hub import hub_options
from captioner.inference import Captioner, load
from captioner.loading import check_complete
from captioner.modeling import CaptionerModel
from captioner.runs.digests import digest_tensors
from captioner.training.config import ModelConfig
from captioner.transformers_versions import LOADING_ERRORS


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


def same_encoder(trained: CaptionerModel, encoder: TokenEncoder) -> bool:
    """Return whether an encoder has the weights of a trained captioner's, in half precision."""
    return digest_tensors(trained.encoder.state_dict()) == digest_tensors(encoder.state_dict())


def copy_captioner(trained: CaptionerModel, model: CaptionerModel) -> None:
    """Copy the weights of a trained captioner into a new one: those of its decoder and of its projector.

    For another encoder, the projector's first layers are new, and its output for zeros is what the decoder learned.
    """
    model.decoder.load_state_dict(trained.decoder.state_dict())
    state = trained.projector.state_dict()
    if not same_encoder(trained, model.encoder):
        state = {name: state[name] for name in ("fc1.bias", "fc2.weight", "fc2.bias")}
    model.projector.load_state_dict(state, strict=False)
