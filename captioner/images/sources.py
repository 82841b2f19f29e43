"""The types of images that callers may pass, their names in messages, and the error of an unusable image."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeGuard, cast

import numpy as np
from PIL import Image

from captioner.images.names import escape_name

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = np.ndarray | torch.Tensor
else:
    Array = np.ndarray

ImageSource: TypeAlias = (
    str | os.PathLike | bytes | bytearray | memoryview | Mapping[str, Any] | BinaryIO | Image.Image | Array
)
"""A path, encoded bytes, a `datasets` record `{"path": ..., "bytes": ...}`, an open file, a PIL image, or an array."""

IN_MEMORY = "image in memory"


class ImageError(ValueError):
    """An image cannot be used; the message names it and the reason.

    Args:
        message: one line that names the image.
        kind: the reason in a few words, without the image's name, so that errors can be counted by kind.
    """

    def __init__(self, message: str, kind: str = "unusable"):
        super().__init__(message)
        self.kind = kind


def is_tensor(source: Any) -> "TypeGuard[torch.Tensor]":
    """Return whether this is a tensor of torch, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def is_array(source: Any) -> bool:
    """Return whether this is an array of pixels: of numpy, of torch, or of another library that numpy can read.

    A column of a data frame is not one, nor is a numpy array of texts or objects: each is a sequence, for example of
    paths.
    """
    if is_tensor(source):
        return True
    if isinstance(source, str | bytes) or getattr(getattr(source, "dtype", None), "kind", "") in tuple("OSU"):
        return False  # numpy's own strings have the methods of arrays
    return hasattr(source, "__array__") and hasattr(source, "ndim") and not hasattr(source, "iloc")


def is_file(source: Any) -> TypeGuard[BinaryIO]:
    """Return whether this is an open file, or an object that reads as one."""
    return callable(getattr(source, "read", None))


def is_single(images: Any) -> bool:
    """Return whether this stands for one image, and not for several in a list, a generator or another iterable.

    An array and an open file are one image each, although both can be iterated over. An object that is neither an image
    nor iterable counts as one image, which `open_image` refuses.
    """
    one = (str, bytes, bytearray, memoryview, os.PathLike, Mapping, Image.Image)
    if getattr(images, "ndim", None) == 0:  # numpy cannot iterate over such an array
        return True
    return isinstance(images, one) or is_array(images) or is_file(images) or not hasattr(images, "__iter__")


def each_image(images: "ImageSource | Iterable[ImageSource]") -> Iterator[ImageSource]:
    """Iterate over images, which may be one image or several (see `is_single`)."""
    return iter(cast("Iterable[ImageSource]", [images] if is_single(images) else images))


def name_source(source: Any) -> str:
    """Return the name of an image: its path if it has one, or `image in memory`."""
    if isinstance(source, Mapping):
        source = source.get("path")
    elif is_file(source):
        source = getattr(source, "name", None)  # for pipes and temporary files, a number
    if isinstance(source, os.PathLike):
        source = os.fsdecode(source)
    return source if isinstance(source, str) else IN_MEMORY


def quote_name(source: Any) -> str:
    """Return the name of an image for a message: its path in quotes on one line, or `image in memory`."""
    name = name_source(source)
    return name if name == IN_MEMORY else f"'{escape_name(name)}'"
