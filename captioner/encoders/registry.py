"""Encoders by name: create one, describe it, rebuild it from its description."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.layers import to_2tuple
from timm.models import is_model_in_modules, model_entrypoint

from captioner.encoders.base import TokenEncoder
from captioner.encoders.shipped import SHIPPED, describe_shipped, load_shipped
from captioner.encoders.timm_models import PooledEncoder
from captioner.errors import SettingError, first_line
from captioner.hub import hub_options

logger = logging.getLogger(__name__)


EXPORTED = ("hf-hub:", "local-dir:")
"""Prefixes in the names of exported encoders."""

WRONG_OPTIONS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
"""Errors that models raise for keyword arguments that they do not take."""


def own_encoders() -> list[str]:
    """Return the timm names of this package's own encoders."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith(f"{__package__}.")]


def create_encoder(name: str, **kwargs: Any) -> TokenEncoder:
    """Build an encoder by its timm name: a `TokenEncoder`, or any stock timm model through `PooledEncoder`.

    Args:
        name: a timm model name, such as `lookupvit_small_patch16_224`, for random weights. For trained weights, a timm
            name with a tag (`vit_small_patch16_224.augreg_in21k`), `local-dir:FOLDER` as `captioner pretrain` exports
            it, `hf-hub:OWNER/NAME`, or `shipped`, the encoder of the captioner that comes with this package.
        kwargs: further arguments of `timm.create_model` (`img_size`, `pretrained`, `checkpoint_path`, ...).

    Raises:
        ValueError: timm has no model of that name, it does not take the options, or its weights cannot be loaded.
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
        settings["dynamic_img_size"] = True  # any size divisible by the patch
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
    """Build an encoder that is never trained. One with random weights gets a warning.

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


def timm_config(**changes: Any) -> dict[str, Any]:
    """Return what timm knows of an encoder of this package; `changes` replace single entries, such as `mean`."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    } | changes


def create_timm(what: str, name: str, *settings: str, **options: Any) -> Any:
    """Build a timm model, such as a teacher, whose weights or outputs are used.

    Args:
        what: the role of the model, for error messages.
        name: timm name, with a tag or without, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        settings: settings that correct a wrong name or wrong weights.
        options: further arguments of `timm.create_model`.

    Raises:
        SettingError: there is no such model, its weights cannot be loaded, or it does not take the options.
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
    """Return whether an encoder of this name has trained weights; others have random ones."""
    return name == SHIPPED or name.startswith(EXPORTED) or "." in name


def exported_config(name: str) -> dict[str, Any]:
    """Read the configuration of timm beside the weights of `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.

    Raises:
        ValueError: there is no such encoder, or its weights are not safetensors.
    """
    kind, _, place = name.partition(":")
    try:
        if kind == "hf-hub":
            hub_options(place)  # raises an error if there is no such repository
            config = json.loads(Path(hf_hub_download(place, "config.json")).read_text())
        else:
            config = json.loads((Path(place) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise SettingError(f"no encoder at '{name}': {first_line(error)}", "encoder") from None
    if reason := lacks_safetensors(kind, place):  # timm would take a pickle in their place
        raise SettingError(f"no weights of the encoder '{name}': {reason}", "encoder")
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise SettingError(
            f"the config.json of '{name}' describes no timm model; `captioner pretrain` exports one", "encoder"
        )
    return config


def lacks_safetensors(kind: str, place: str) -> str | None:
    """Say why there are no safetensors weights in a folder (`local-dir`) or a repository (`hf-hub`); None if there are.

    Those of a repository are downloaded, as timm would do next.
    """
    absent = "it has no model.safetensors"
    if kind == "local-dir":
        return None if (Path(place) / "model.safetensors").is_file() else absent
    try:
        hf_hub_download(place, "model.safetensors")
    except LocalEntryNotFoundError as error:  # the hub does not answer
        return first_line(error)
    except EntryNotFoundError:
        return absent
    except OSError as error:
        return first_line(error)
    return None


def describe_encoder(name: str, **kwargs: Any) -> dict[str, Any]:
    """Return a description for `rebuild_encoder`, which does not need the folder or hub of the encoder.

    Args:
        name: as for `create_encoder`.
        kwargs: further arguments of `create_encoder`.

    Returns:
        `{"name": timm name, "kwargs": {...}}`, without arguments that concern weights or a classifier.

    Raises:
        ValueError: there is no such exported encoder.
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
    """Build the encoder of a captioner's configuration, without loading weights: the captioner's file contains them.

    Args:
        description: `{"name": timm name, "kwargs": {...}}`. It is not trusted: it is refused if it would load anything.

    Raises:
        ValueError: the description would load something, timm has no such model, or it has another form.
    """
    fields = description if isinstance(description, Mapping) else {}
    name, kwargs = fields.get("name"), fields.get("kwargs", {})
    if not isinstance(name, str) or not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise ValueError(f"the encoder_config of a captioner is not valid: {description}")
    if elsewhere := [name] * name.startswith(EXPORTED) + loading_options(kwargs):
        raise ValueError(f"the encoder_config of a captioner may not hold '{elsewhere[0]}', which would load something")
    return create_encoder(name.split(".")[0], **kwargs, pretrained=False)


def loading_options(kwargs: Mapping[str, Any]) -> list[str]:
    """Return the keyword arguments with which timm would load something."""
    return [key for key in kwargs if key.startswith(("pretrained", "checkpoint")) or key == "cache_dir"]
