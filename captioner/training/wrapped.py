"""Calling a method other than `forward` of a model that training has wrapped."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn


def call_method(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a model as if it were its `forward`.

    Data-parallel and sharded training prepare gradients and weights in the wrapper's `forward`; a method that is called
    past it would train without them. So the method stands in for the `forward` of the inner model during the call. This
    is how Lightning does it; torch has a way of its own (`register_fsdp_forward_method`) for sharded models alone.

    Args:
        model: a model as `accelerator.prepare` returns it, wrapped or not.
        name: name of the method.
        args: its arguments.
        kwargs: its further arguments.
    """
    inner = extract_model_from_parallel(model)
    own = inner.__dict__.get("forward")  # accelerate puts one on the instance for mixed precision

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        restore()  # a method that calls `forward` gets the real one
        return getattr(inner, name)(*args, **kwargs)

    inner.forward = stand_in
    try:
        return model(*args, **kwargs)
    finally:
        restore()
