"""Load the parts of a captioner from a folder or a hub id, and refuse what is not one."""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging as transformers_logging

from captioner.errors import SettingError, first_line
from captioner.hub import hub_options
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.transformers_versions import LOADING_ERRORS

MODEL = ("model", "init_from", "captioner")
"""Settings that name a captioner; each job has one of them."""

loading = threading.Lock()


@contextmanager
def silence_transformers(bars: bool) -> Iterator[None]:
    """Return a context for loading a captioner, in which transformers prints no warnings: all would be false alarms.

    The settings of transformers belong to the whole program. So only one thread at a time is in this context, and the
    settings are restored at its end.

    Args:
        bars: whether transformers may draw progress bars, for a download.
    """
    with loading:
        verbosity = transformers_logging.get_verbosity()
        hide = not bars and transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        if hide:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if hide:
                transformers_logging.enable_progress_bar()


def load_parts(source: str) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Load the model and the processor of a captioner from a folder or a hub id.

    Raises:
        SettingError: the folder or repository contains no captioner, or a weight is missing.
    """
    local = os.path.exists(source)
    if local and not (Path(source) / "config.json").is_file():
        raise SettingError(f"no captioner model in '{source}': it has no config.json", *MODEL)
    if not local and (source.count("/") != 1 or source.startswith((".", "/"))):
        raise SettingError(f"no captioner model at '{source}': no such folder, and not a hub id", *MODEL)
    try:
        options: dict[str, Any] = {**hub_options(source)}
    except ValueError as error:
        raise SettingError(f"no captioner model at '{source}': {error}", *MODEL) from None
    downloaded = local or isinstance(try_to_load_from_cache(source, "config.json"), str)
    options["trust_remote_code"] = False  # transformers would ask whether to run code that lies beside the weights
    try:
        with silence_transformers(bars=not downloaded):
            processor = CaptionerProcessor.from_pretrained(source, **options)
            options |= {"use_safetensors": True, "dtype": torch.float32}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_weights` names them
            loaded, info = cast("tuple[CaptionerModel, dict]", CaptionerModel.from_pretrained(source, **options))
    except LOADING_ERRORS as error:
        raise SettingError(f"'{source}' is not a captioner model: {first_line(error)}", *MODEL) from None
    check_weights(source, info)
    return loaded, processor


def check_complete(source: str, missing: Iterable[str], mismatched: Iterable[tuple], *settings: str) -> None:
    """Refuse a model whose folder does not contain all of its weights.

    Args:
        source: its folder or hub id.
        missing: names of the weights that the folder lacks.
        mismatched: weights of another shape, as transformers lists them: the name first.
        settings: settings that name the model.

    Raises:
        SettingError: weights are missing or have another shape.
    """
    if names := sorted(missing):
        raise SettingError(f"'{source}' lacks {len(names)} of its weights, such as {names[0]}", *settings)
    if names := sorted(str(name) for name, *_ in mismatched):
        fact = f"{len(names)} weights of '{source}' have other shapes than its configuration says, such as {names[0]}"
        raise SettingError(fact, *settings)


def check_weights(source: str, info: dict[str, Any]) -> None:
    """Refuse a captioner whose weights are not those that its configuration describes.

    Args:
        source: its folder or hub id.
        info: what transformers says of loading it.

    Raises:
        SettingError: weights are missing, of another shape, or more than there is a place for.
    """
    check_complete(source, info["missing_keys"], info["mismatched_keys"], *MODEL)
    if unknown := sorted(info["unexpected_keys"]):
        fact = f"the configuration of '{source}' has no place for {len(unknown)} of its weights, such as {unknown[0]}"
        raise SettingError(fact, *MODEL)
