"""Differences between the supported versions of transformers, 5.10 up to the newest. This file handles all of them."""

import inspect

from transformers import PreTrainedModel


def cache_name(decoder: PreTrainedModel) -> str | None:
    """Return the name of a decoder's cache of keys and values, as an argument and in its output.

    It was `past_key_values`, and is `cache` in the newest versions, which warn of the old name.

    Returns:
        The name; `None` for a decoder without a cache.
    """
    parameters = inspect.signature(decoder.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Make a model recompute its activations in the backward pass, which takes time and saves memory.

    The method was `gradient_checkpointing_enable`; the newest versions warn of that name.
    """
    options = {"use_reentrant": False}  # the reentrant form gives a decoder no gradient if its inputs have none
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
