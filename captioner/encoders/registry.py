"""Encoders by name: create one, describe it, rebuild it from its description."""

import json
import logging
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from timm.models import is_model_in_modules

from captioner.encoders.base import TokenEncoder
from captioner.encoders.shipped import SHIPPED, describe_shipped, load_shipped
from captioner.encoders.timm_models import PooledEncoder
from captioner.hub import hub_options

logger = logging.getLogger(__name__)


EXPORTED = ("hf-hub:", "local-dir:")
"""How names of encoders begin that are not timm's own."""


def create_encoder(name: str, **kwargs) -> TokenEncoder:
    """Build an encoder by its timm name: this package's own, or any stock timm model through `PooledEncoder`.

    Args:
        name: a timm model name, such as `lookupvit_small_patch16_224`; or, with its weights, a timm name with a tag
            (`vit_small_patch16_224.augreg_in21k`), `local-dir:FOLDER` as `pretrain.py` exports it, `hf-hub:OWNER/NAME`,
            or `shipped`, the encoder of the captioner that comes with this package.
        kwargs: handed to `timm.create_model` (`img_size`, `pretrained`, `checkpoint_path`, ...).

    Raises:
        ValueError: timm knows no model of that name, or its weights cannot be had.
    """
    if name == SHIPPED:
        description = describe_shipped()
        encoder = build_encoder({**description, "kwargs": description["kwargs"] | kwargs})
        load_shipped(encoder)
        return encoder
    exported = name.startswith(EXPORTED)
    architecture = exported_config(name)["architecture"] if exported else name.split(".")[0]
    if not timm.is_model(architecture):
        close = ", ".join(timm.list_models(f"*{architecture.split('_')[0]}*")[:5])
        raise ValueError(f"no encoder named '{name}' in timm" + (f"; did you mean one of: {close}?" if close else ""))
    settings = {"num_classes": 0, "pretrained": has_weights(name)}
    if is_model_in_modules(architecture, ["vision_transformer"]):
        settings["dynamic_img_size"] = True  # any size divisible by the patch, as the contract has it
    try:
        model = timm.create_model(name, **{**settings, **kwargs})
    except TypeError as error:
        raise ValueError(f"the encoder '{name}' has no such option: {error}") from None
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"no weights of the encoder '{name}': {str(error).splitlines()[0]}") from None
    return model if isinstance(model, TokenEncoder) else PooledEncoder(model)


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


def has_weights(name: str) -> bool:
    """Tell whether an encoder of this name comes with trained weights; others begin at random."""
    return name == SHIPPED or name.startswith(EXPORTED) or "." in name


def exported_config(name: str) -> dict:
    """Read what timm wrote beside the weights of `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.

    Raises:
        ValueError: there is no such encoder, or its weights are not safetensors.
    """
    kind, _, place = name.partition(":")
    folder = Path(place)
    try:
        if kind == "hf-hub":
            hub_options(place)  # refuses one that cannot be had
            return json.loads(Path(hf_hub_download(place, "config.json")).read_text())
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"no encoder at '{name}': {str(error).splitlines()[0]}") from None
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"no weights of the encoder '{name}': it has no model.safetensors")
    if "architecture" not in config:
        raise ValueError(f"'{folder / 'config.json'}' describes no timm model; export one with captioner pretrain")
    return config


def encoder_config(name: str, encoder: TokenEncoder) -> dict:
    """Say how to rebuild an encoder without the folder or hub it came from: `{"name": timm name, "kwargs": {...}}`.

    Args:
        name: what `create_encoder` built it from.
        encoder: what it built.
    """
    if name == SHIPPED:
        return describe_shipped()
    kwargs = {}
    if name.startswith(EXPORTED):
        kwargs = exported_config(name).get("model_args", {})
        kwargs = {k: v for k, v in kwargs.items() if k not in ("num_classes", "global_pool")}
    return {"name": encoder.default_cfg["architecture"], "kwargs": kwargs}


def build_encoder(description: dict) -> TokenEncoder:
    """Build the encoder that a configuration describes, without weights: these are the captioner's own.

    Args:
        description: `{"name": timm name, "kwargs": {...}}`.

    Raises:
        ValueError: it names what lies elsewhere, or what timm does not know; a configuration may be hostile.
    """
    name, kwargs = description["name"], description.get("kwargs", {})
    if elsewhere := [name] * name.startswith(EXPORTED) + loading_options(kwargs):
        raise ValueError(f"a captioner's configuration may not ask for '{elsewhere[0]}' of its encoder")
    return create_encoder(name.split(".")[0], **kwargs, pretrained=False)


def loading_options(kwargs: dict) -> list[str]:
    """Name those of timm's keyword arguments that make it load something."""
    return [key for key in kwargs if str(key).startswith(("pretrained", "checkpoint")) or key == "cache_dir"]
