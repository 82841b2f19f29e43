"""Open untrusted images safely: from any file or bytes to an upright 8-bit RGB image, or one clear error."""

import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from captioner.images.metadata import strip_metadata, turn_upright
from captioner.images.pixels import MAX_PIXELS, array_to_rgb, check_size, to_rgb
from captioner.images.plugins import PLUGINS, jxl_size
from captioner.images.sources import ImageError, ImageSource, is_array, is_file, quote_name

ABSENT = [plugin for plugin in PLUGINS if not plugin.installed]
"""Plugins that are not installed, so that their formats are not read."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF", "JXL")
"""Decoders for untrusted bytes. Decoders that start other programs, such as that of EPS, are not among them. The last
two are optional packages."""

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp")
    + (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc")
    + (".jpf", ".jpx", ".ico", ".tga", ".icb", ".vda", ".vst")
    + tuple(ending for plugin in PLUGINS if plugin not in ABSENT for ending in plugin.endings)
)
"""File endings of images when a folder is searched: all usual ones of those `FORMATS` that can be read here."""

RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw")

UNREAD = (
    {ending: plugin.kind for plugin in ABSENT for ending in plugin.endings}
    | dict.fromkeys(RAW, "camera raw")
    | dict.fromkeys((".eps", ".ps", ".ai"), "PostScript")
    | {".psd": "Photoshop", ".svg": "SVG", ".emf": "EMF", ".wmf": "WMF", ".dcm": "DICOM"}
    | {".exr": "EXR", ".qoi": "QOI"}
)
"""Image formats that are not read, by file ending; such images must be converted to JPEG or PNG."""

INSTALLABLE = {plugin.kind: plugin.install for plugin in ABSENT}
"""Packages that make formats readable, by format."""

MAX_BYTES = 512 * 2**20
"""Encoded size in bytes above which a file is refused without reading it."""

UNSUPPORTED = "of an unsupported format"

DRAFT = (1024, 1024)
"""Smallest size in pixels to which a large JPEG is reduced while it is decoded, which saves time."""


def open_image(source: ImageSource) -> Image.Image:
    """Open one image as upright, 8-bit RGB.

    The EXIF orientation is applied, transparency becomes white, and an animation gives its first frame. Other depths
    become 8 bits by the fixed rules of `captioner.images.pixels`: 16 bits by `value // 257`, floating point from 0.0
    (black) to 1.0 (white). The rules do not depend on the brightest value of the image. Metadata that cannot be read is
    ignored.

    Args:
        source: a path, encoded bytes, a `datasets` record `{"path": ..., "bytes": ...}`, a file opened in binary mode,
            a PIL image of any mode, or an array: (H, W), (H, W, 3) or (H, W, 4), for a torch tensor (3, H, W), of
            uint8, uint16, bool or floating point from 0 to 1.

    Raises:
        ImageError: the image is missing, empty, truncated, without pixels, of a refused format, larger than
            `MAX_PIXELS` or `MAX_BYTES`, or no image at all.
    """
    name = quote_name(source)
    content: Any = source
    if isinstance(source, Mapping):
        content = source["bytes"] if source.get("bytes") is not None else source.get("path")
    try:
        with ignore_pillow_warnings():
            if isinstance(content, Image.Image):
                return open_pil(content, name)
            if is_array(content):
                return array_to_rgb(content)
            if is_file(content):
                return open_encoded(read_file(content, name), name)
            if isinstance(content, bytes | bytearray | memoryview):
                return open_encoded(bytes(content), name)
            if isinstance(content, str | os.PathLike):
                return open_path(Path(os.fsdecode(content)), name)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        advice = "; addresses are not opened, download the image first" if is_address(name) else ""
        raise ImageError(f"{name} does not exist{advice}", "missing") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image of a supported format{advise(name)}", UNSUPPORTED) from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name} is too large: over {MAX_PIXELS // 10**6} megapixels is refused", "too large"
        ) from None
    except (
        Exception
    ) as error:  # for broken data, Pillow's decoders raise nearly any error, such as KeyError and struct.error
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ImageError(f"{name} cannot be read: {' '.join(why.split())}", "damaged or not readable") from None
    raise ImageError(
        f"{type(source).__name__} is no image; give a path, encoded bytes, an open file, a PIL image or an array",
        "not an image",
    )


def is_address(name: str) -> bool:
    """Return whether a quoted name is an address, such as `https://...`, and not the path of a file."""
    return bool(re.match(r"'([a-z]{2,}://|data:)", name, re.IGNORECASE))


def advise(name: str) -> str:
    """Return what to do with a file of a format that is not read, by its ending; an empty text for other files."""
    unread = UNREAD.get(Path(name.strip("'")).suffix.lower())
    return f": {unread} is not read, {remedy(unread)}" if unread else ""


def remedy(unread: str) -> str:
    """Return what to do with an image of a format that is not read."""
    package = INSTALLABLE.get(unread)
    return f"install {package} or convert it to JPEG or PNG" if package else "convert it to JPEG or PNG"


def open_path(path: Path, name: str) -> Image.Image:
    """Open an image file."""
    size = path.stat().st_size
    if not path.is_file():  # a folder; or a pipe, which may never end
        raise ImageError(f"{name} is not a file", "not a file")
    check_bytes(size, name)
    with path.open("rb") as file:
        return open_encoded(file, name)


def read_file(file: BinaryIO, name: str) -> bytes:
    """Read an open file from its start; one that cannot seek is read from its position.

    Raises:
        ImageError: the file is open in text mode.
    """
    if getattr(file, "seekable", bool)():
        file.seek(0)
    data = file.read(MAX_BYTES + 1)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(f"{name} is open as text; open it in binary mode", "open as text")
    return bytes(data)


def check_bytes(size: int, name: str) -> None:
    """Refuse a file by its size in bytes.

    Raises:
        ImageError: it is empty, or larger than `MAX_BYTES`.
    """
    if size == 0:
        raise ImageError(f"{name} is empty", "empty")
    if size > MAX_BYTES:
        raise ImageError(
            f"{name} is {size / 2**20:.0f} MiB; files over {MAX_BYTES // 2**20} MiB are refused", "too large"
        )


def open_encoded(content: bytes | BinaryIO, name: str) -> Image.Image:
    """Decode an image; if that fails, decode it again without its metadata, which may be the broken part."""
    if isinstance(content, bytes):
        check_bytes(len(content), name)
    try:
        return decode(io.BytesIO(content) if isinstance(content, bytes) else content, name)
    except ImageError:
        raise
    except Exception as error:  # see `open_image`
        if not isinstance(content, bytes):
            content.seek(0)
            content = content.read()
        stripped = strip_metadata(content)
        if stripped == content:
            raise
        try:
            return decode(io.BytesIO(stripped), name)
        except UnidentifiedImageError:
            raise error from None


def decode(file: BinaryIO, name: str) -> Image.Image:
    """Decode an open file with the decoders that are allowed."""
    head = file.read(2**16)
    if size := jxl_size(head):
        check_size(*size, name)
    file.seek(0)
    with Image.open(file, formats=supported()) as image:
        check_size(image.width, image.height, name)
        if isinstance(image, JpegImagePlugin.JpegImageFile):  # other decoders would return a thumbnail from the file
            image.draft("RGB", DRAFT)
        image.load()
        return to_rgb(turn_upright(image), name)


def open_pil(image: Image.Image, name: str) -> Image.Image:
    """Convert a PIL image to mode RGB, by the rules for files; the image may not be decoded yet."""
    check_size(image.width, image.height, name)
    if isinstance(image, ImageFile.ImageFile) and image.tile and (image.fp is None or image.fp.closed):
        raise ImageError(f"{name} was closed before its pixels were read; open it again", "closed")
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in (*FORMATS, "MPO"):
        raise ImageError(f"{name} is of the format {image.format}, which is refused unless it is decoded", UNSUPPORTED)
    try:
        image.load()
    except Exception:  # see `open_image`
        file = getattr(image, "fp", None)
        if file is None or image.tell() != 0:
            raise
        return open_encoded(read_file(file, name), name)
    return to_rgb(turn_upright(image), name)


@lru_cache
def supported() -> tuple[str, ...]:
    """Return the formats out of `FORMATS` that this build of Pillow reads."""
    Image.init()
    for plugin in PLUGINS:
        if plugin.installed:
            plugin.register()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_size(data: bytes, formats: list[str] | tuple[str, ...]) -> tuple[int, int] | None:
    """Read the width and height in the header of an encoded image; `None` if no decoder of these formats can."""
    try:
        with ignore_pillow_warnings(), Image.open(io.BytesIO(data), formats=formats) as image:
            return image.size
    except Exception:  # as in `open_image`
        return None


PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
"""An entry of `warnings.filters` that ignores the warnings of Pillow's modules."""

lock = threading.Lock()
opening = 0


@contextmanager
def ignore_pillow_warnings() -> Iterator[None]:
    """Return a context that ignores Pillow's warnings (of odd metadata, and of sizes, which are checked here).

    A program may turn warnings into errors, which would refuse a usable image. The filters are shared by all threads:
    the first thread in this context adds the entry, the last one removes it. `warnings.catch_warnings` is not made for
    threads, and shows all other warnings again.
    """
    global opening
    with lock:
        opening += 1
        if opening == 1:
            warnings.filters.insert(0, PILLOW)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with lock:
            opening -= 1
            if opening == 0:
                with suppress(ValueError):  # a test that ended in the meantime has restored all filters
                    warnings.filters.remove(PILLOW)  # type: ignore[attr-defined]
