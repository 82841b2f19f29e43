"""Formats that optional packages decode: HEIC by pillow-heif, JPEG XL by pillow-jxl-plugin."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec


@dataclass(frozen=True)
class Plugin:
    """A package that adds a decoder to Pillow.

    Attributes:
        format: Pillow's name of the format.
        kind: usual name of the format.
        module: name of the module to import.
        install: name of the package for pip.
        endings: endings of the format's files.
    """

    format: str
    kind: str
    module: str
    install: str
    endings: tuple[str, ...]

    @property
    def installed(self) -> bool:
        """Whether the package is installed; it is not imported."""
        return find_spec(self.module) is not None

    def register(self) -> bool:
        """Add the decoder to Pillow; returns whether that worked."""
        try:
            module = import_module(self.module)
        except (ImportError, OSError):  # for example, built for another machine
            return False
        if hasattr(module, "register_heif_opener"):
            module.register_heif_opener(thumbnails=False)
        return True


PLUGINS = (
    Plugin("HEIF", "HEIC", "pillow_heif", "pillow-heif", (".heic", ".heics", ".heif", ".heifs", ".hif")),
    Plugin("JXL", "JPEG XL", "pillow_jxl", "pillow-jxl-plugin", (".jxl",)),
)

RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
"""Width to height, by its number in a JPEG XL."""

BITS = (9, 13, 18, 30)
"""Bits of a side of a JPEG XL, by the two bits before it."""


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """Read the width and height of a JPEG XL without decoding it, as its decoder would; `None` for other files.

    Source: ISO/IEC 18181-1, `SizeHeader`, and ISO/IEC 18181-2 for the boxes.

    Raises:
        ValueError: the JPEG XL has no size.
    """
    if data[:2] != b"\xff\x0a":
        if data[4:8] != b"JXL ":
            return None
        data = next(jxl_boxes(data), b"")
    if data[:2] != b"\xff\x0a":
        raise ValueError("a JPEG XL without an image")
    bits = int.from_bytes(data[2:14].ljust(12, b"\0"), "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    small = take(1)

    def take_side() -> int:
        return 8 * (take(5) + 1) if small else take(BITS[take(2)]) + 1

    height, ratio = take_side(), take(3)
    width = height * RATIOS[ratio][0] // RATIOS[ratio][1] if ratio else take_side()
    return width, height


def jxl_boxes(data: bytes) -> Iterator[bytes]:
    """Yield the parts of the image in the boxes of a JPEG XL."""
    start = 0
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= len(data):
            (size,), head = struct.unpack_from(">Q", data, start + 8), 16
        stop = len(data) if size == 0 else start + size
        if size and size < head:
            return
        if kind in (b"jxlc", b"jxlp"):
            yield data[start + head + (4 if kind == b"jxlp" else 0) : stop]
        start = stop
