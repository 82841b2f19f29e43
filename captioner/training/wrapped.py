"""Call a method other than `forward` of a model that training has wrapped."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn


def call_method(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a model as if it were its `forward`.

    Data-parallel and sharded training prepare gradients and weights in the `forward` of the wrapper; a direct call of
    the method would train without them. So the method replaces the `forward` of the inner model during the call, as in
    Lightning. For sharded models alone, torch has `register_fsdp_forward_method`.

    Args:
        model: a model that `accelerator.prepare` returned, wrapped or not.
        name: name of the method.
        args: positional arguments of the method.
        kwargs: keyword arguments of the method.

    Returns:
        What the method returns.
    """
    inner = extract_model_from_parallel(model)
    own = inner.__dict__.get("forward")  # accelerate sets it on the instance for mixed precision

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        restore()  # if the method calls `forward`, it gets the real one
        return getattr(inner, name)(*args, **kwargs)

    inner.forward = stand_in
    try:
        return model(*args, **kwargs)
    finally:
        restore()
