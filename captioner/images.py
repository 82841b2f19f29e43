"""Opening untrusted images safely: any file or bytes in, an upright 8-bit RGB image out, or one clear error."""

import io
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
"""Decoders that may see untrusted bytes; those that call out to other programs (EPS, say) are not among them."""

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
    + (".avif", ".jp2", ".ico", ".tga")
)
"""File endings taken for images when a folder is searched."""

MAX_PIXELS = 128 * 2**20
"""Pixels above which an image is refused as a decompression bomb; a 128-megapixel camera still passes."""

MAX_BYTES = 512 * 2**20
"""Encoded size in bytes above which a file is refused unread."""

BROKEN = (OSError, SyntaxError, EOFError, IndexError, OverflowError, RuntimeError, TypeError, ValueError, Warning)
"""What Pillow's decoders raise on broken data; warnings where Python is told to raise them."""

ImageSource = str | os.PathLike | bytes | Mapping | Image.Image


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


def open_image(source: ImageSource) -> Image.Image:
    """Open one image as upright, 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit and float data are scaled to 8 bits, and of an
    animation the first frame is taken.

    Args:
        source: a path, encoded bytes, a `datasets` record `{"path": ..., "bytes": ...}`, or a PIL image.

    Raises:
        ImageError: missing, empty, truncated, not an image, of a refused format, or larger than `MAX_PIXELS`.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    kind = type(source).__name__
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if not isinstance(source, bytes | str | os.PathLike):
        raise ImageError(f"{kind} is no image; give a path, encoded bytes or a PIL image")
    name = "image in memory" if isinstance(source, bytes) else f"'{os.fspath(source)}'"
    try:
        if not isinstance(source, bytes) and not Path(source).is_file() and Path(source).exists():
            raise ImageError(f"{name} is not a file")  # a folder, or a pipe, which would wait for ever
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        if size == 0:
            raise ImageError(f"{name} is empty")
        if size > MAX_BYTES:
            raise ImageError(f"{name} is {size / 2**20:.0f} MiB; files over {MAX_BYTES // 2**20} MiB are refused")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=supported()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{name} is {image.width}x{image.height} px; over {MAX_PIXELS // 10**6} megapixels is refused"
                )
            image.draft("RGB", (1024, 1024))  # a large JPEG decodes at a fraction of its size
            image.load()
            if image.mode == "RGB" and image.has_transparency_data and max(image.info["transparency"]) < 256:
                return to_rgb(image.convert("RGBA"))  # a PNG whose key colour is transparent
            return to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image of a supported format") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} is too large: over {MAX_PIXELS // 10**6} megapixels is refused") from None
    except BROKEN as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be read: {error}") from None


@lru_cache
def supported() -> tuple[str, ...]:
    """Return those of `FORMATS` that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any PIL image upright and into mode RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    elif image.mode in ("I", "F"):
        low, high = image.getextrema()
        if high > 255 or low < 0:
            high, low = (65535, 0) if image.mode == "I" and low >= 0 and high < 65536 else (high, low)
            scale = 255 / max(high - low, 1e-12)
            image = image.convert("F").point(lambda value: value * scale - low * scale)
        image = image.convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
