"""Encoders by name: create one, describe it, rebuild it from its description."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from timm.layers import to_2tuple
from timm.models import is_model_in_modules, model_entrypoint

from captioner.encoders.base import TokenEncoder
from captioner.encoders.shipped import SHIPPED, describe_shipped, load_shipped
from captioner.encoders.timm_models import PooledEncoder
from captioner.errors import SettingError
from captioner.hub import hub_options

logger = logging.getLogger(__name__)


EXPORTED = ("hf-hub:", "local-dir:")
"""How names of encoders begin that are not timm's own."""

WRONG_OPTIONS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
"""What models raise for keyword arguments that they do not take."""


def own_encoders() -> list[str]:
    """Return the timm names of this package's own encoders."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith(f"{__package__}.")]


def create_encoder(name: str, **kwargs: Any) -> TokenEncoder:
    """Build an encoder by its timm name: a `TokenEncoder`, or any stock timm model through `PooledEncoder`.

    Args:
        name: a timm model name, such as `lookupvit_small_patch16_224`; or, with its weights, a timm name with a tag
            (`vit_small_patch16_224.augreg_in21k`), `local-dir:FOLDER` as `pretrain.py` exports it, `hf-hub:OWNER/NAME`,
            or `shipped`, the encoder of the captioner that comes with this package.
        kwargs: handed to `timm.create_model` (`img_size`, `pretrained`, `checkpoint_path`, ...).

    Raises:
        ValueError: timm knows no model of that name, it does not take the options, or its weights cannot be had.
    """
    if name == SHIPPED:
        description = describe_shipped()
        encoder = rebuild_encoder({**description, "kwargs": description["kwargs"] | kwargs})
        load_shipped(encoder)
        return encoder
    exported = name.startswith(EXPORTED)
    architecture = exported_config(name)["architecture"] if exported else name.split(".")[0]
    if not timm.is_model(architecture):
        close = ", ".join(timm.list_models(f"*{architecture.split('_')[0]}*")[:5])
        hint = f"did you mean one of: {close}?" if close else "import the module that registers it first"
        raise SettingError(f"no encoder named '{name}' in timm; {hint}", "encoder")
    settings: dict[str, Any] = {"num_classes": 0, "pretrained": has_weights(name)}
    if is_model_in_modules(architecture, ["vision_transformer"]):
        settings["dynamic_img_size"] = True  # any size divisible by the patch, as the contract has it
    try:
        model: Any = timm.create_model(name, **{**settings, **kwargs})
        if not hasattr(model, "default_cfg"):
            raise ValueError(f"the encoder '{name}' has no default_cfg; let build_model_with_cfg of timm build it")
        if "img_size" in kwargs:
            channels, size = model.pretrained_cfg["input_size"][0], to_2tuple(kwargs["img_size"])
            model.pretrained_cfg["input_size"] = (channels, *size)
        return model if isinstance(model, TokenEncoder) else PooledEncoder(model)
    except (OSError, SafetensorError) as error:
        raise SettingError(f"no weights of the encoder '{name}': {first_line(error)}", "encoder") from None
    except WRONG_OPTIONS as error:
        if isinstance(error, RuntimeError) and settings["pretrained"]:
            raise SettingError(f"no weights of the encoder '{name}': {first_line(error)}", "encoder") from None
        if not kwargs or isinstance(error, NotImplementedError):
            raise  # a fault of the encoder's own code
        options = " ".join(f"{key}={kwargs[key]}" for key in kwargs if key not in loading_options(kwargs))
        raise SettingError(
            f"the encoder '{name}' does not take its options, {options}: {first_line(error)}", "encoder_options"
        ) from error


def frozen_encoder(name: str) -> TokenEncoder:
    """Build an encoder to be used as it is; one without trained weights gets a warning, since it will never have any.

    Raises:
        ValueError: as `create_encoder`.
    """
    encoder = create_encoder(name).freeze()
    if not has_weights(name):
        logger.warning(
            "the encoder '%s' has random weights, and is frozen: for more than a trial name a trained one, "
            "shipped, local-dir:FOLDER of captioner pretrain, hf-hub:OWNER/NAME, or a timm name with a tag",
            name,
        )
    return encoder


def create_timm(what: str, name: str, *settings: str, **options: Any) -> Any:
    """Build a timm model to take weights from or to learn from.

    Args:
        what: what the model is to the user, as the message calls it.
        name: timm name, with a tag or without, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        settings: those that mend a fault of its name or weights.
        options: handed to `timm.create_model`.

    Raises:
        SettingError: there is no such model, its weights cannot be had, or it does not take the options.
    """
    if not name.startswith(EXPORTED) and not timm.is_model(name.split(".")[0]):
        raise SettingError(f"no {what} named '{name}' in timm", *settings)
    try:
        return timm.create_model(name, **options)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise SettingError(f"no weights of the {what} '{name}': {first_line(error)}", *settings) from None
    except TypeError as error:
        raise SettingError(f"the {what} '{name}' does not take its options: {first_line(error)}", *settings) from None


def has_weights(name: str) -> bool:
    """Return whether an encoder of this name comes with trained weights; others start from random ones."""
    return name == SHIPPED or name.startswith(EXPORTED) or "." in name


def exported_config(name: str) -> dict[str, Any]:
    """Read what timm wrote beside the weights of `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.

    Raises:
        ValueError: there is no such encoder, or its weights are not safetensors.
    """
    kind, _, place = name.partition(":")
    folder = Path(place)
    try:
        if kind == "hf-hub":
            hub_options(place)  # refuses one that cannot be had
            config = json.loads(Path(hf_hub_download(place, "config.json")).read_text())
        else:
            config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise SettingError(f"no encoder at '{name}': {first_line(error)}", "encoder") from None
    if kind == "local-dir" and not (folder / "model.safetensors").is_file():
        raise SettingError(f"no weights of the encoder '{name}': it has no model.safetensors", "encoder")
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise SettingError(
            f"the config.json of '{name}' describes no timm model; `captioner pretrain` exports one", "encoder"
        )
    return config


def describe_encoder(name: str, **kwargs: Any) -> dict[str, Any]:
    """Return how to rebuild an encoder without the folder or hub it came from: `{"name": timm name, "kwargs": {...}}`.

    What decides about weights or about a classifier is left out: the description is of the tokens.

    Args:
        name: as for `create_encoder`.
        kwargs: what `create_encoder` was given beside it.
    """
    if name == SHIPPED:
        return describe_shipped()
    config: dict[str, Any] = {"architecture": name.split(".")[0]}
    if name.startswith(EXPORTED):
        config = exported_config(name)
    kwargs = {**(config.get("model_args") or {}), **kwargs}
    skipped = {"num_classes", "global_pool", *loading_options(kwargs)}
    return {"name": config["architecture"], "kwargs": {k: v for k, v in kwargs.items() if k not in skipped}}


def rebuild_encoder(description: Mapping[str, Any]) -> TokenEncoder:
    """Build the encoder that a captioner's configuration describes, without weights: the captioner has its own.

    Args:
        description: `{"name": timm name, "kwargs": {...}}`. It may be hostile: it is refused if it asks for anything to
            be loaded.

    Raises:
        ValueError: it asks for what lies elsewhere, for what timm does not know, or is no description.
    """
    fields = description if isinstance(description, Mapping) else {}
    name, kwargs = fields.get("name"), fields.get("kwargs", {})
    if not isinstance(name, str) or not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise ValueError(f"a captioner's configuration describes no encoder by {description}")
    if elsewhere := [name] * name.startswith(EXPORTED) + loading_options(kwargs):
        raise ValueError(f"a captioner's configuration may not ask for '{elsewhere[0]}' of its encoder")
    return create_encoder(name.split(".")[0], **kwargs, pretrained=False)


def loading_options(kwargs: Mapping[str, Any]) -> list[str]:
    """Return those of timm's keyword arguments that make it load something."""
    return [key for key in kwargs if key.startswith(("pretrained", "checkpoint")) or key == "cache_dir"]


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its kind if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
