"""Open untrusted images: from a path, bytes, a PIL image or an array to an upright 8-bit RGB image, or one error."""

from captioner.images.opening import FORMATS, MAX_BYTES, MAX_PIXELS, SUFFIXES, open_image, supported
from captioner.images.sources import ImageError, ImageSource, each_image, is_single, name_source

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "SUFFIXES",
    "ImageError",
    "ImageSource",
    "each_image",
    "is_single",
    "name_source",
    "open_image",
    "supported",
]
