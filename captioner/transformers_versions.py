"""Where the supported versions of transformers differ: 5.10 up to the newest. Each difference is decided here, once."""

import inspect

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

LOADING_ERRORS = (
    *(AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, StrictDataclassError),
)
"""What `from_pretrained` raises for files that are damaged or hold something else; it has no error of its own."""


def cache_name(decoder: PreTrainedModel) -> str | None:
    """Return what a decoder calls the cache of its keys and values, as an argument and in its output.

    It was `past_key_values`, and is `cache` in the newest versions, which warn of the old name. `None` stands for a
    decoder that has no cache.
    """
    parameters = inspect.signature(decoder.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have a model compute its activations again in the backward pass, which takes time and saves memory.

    The method was `gradient_checkpointing_enable`; the newest versions warn of that name.
    """
    options = {"use_reentrant": False}  # the reentrant form gives no gradient to a decoder whose inputs have none
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
