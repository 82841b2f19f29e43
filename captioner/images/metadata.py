"""Metadata of image files (EXIF, text, profiles): it may rotate an image, but never makes it unusable."""

import re
import struct
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by its EXIF orientation."""

PNG_START = b"\x89PNG\r\n\x1a\n"

TIFF_PIXELS = frozenset(
    (254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 321, 322, 323, 324)
    + (325, 332, 334, 338, 339, 347, *range(512, 522), *range(529, 533))
)
"""Tags that pixels or their orientation depend on."""

AVIF_EXTRAS = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))(?:Exif|mime)", re.DOTALL)
"""An entry of AVIF's list of items that stands for EXIF or XMP: version 2 has 16-bit numbers, version 3 has 32-bit."""


def turn_upright(image: Image.Image) -> Image.Image:
    """Rotate a loaded image by its EXIF or XMP orientation; an orientation that cannot be read counts as 1, upright."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # for broken EXIF, Pillow raises SyntaxError, struct.error, KeyError, ValueError and others
        return image
    return image if turn is None else image.transpose(turn)


def strip_metadata(data: bytes) -> bytes:
    """Return an encoded image without the metadata that its pixels do not need; a readable orientation stays.

    Pillow reads some metadata before or after the pixels, and refuses the image if that is broken or large.

    Returns:
        The image's bytes. They are unchanged if there is no metadata, if the format is not PNG, JPEG, WebP, TIFF or
        AVIF, or if the structure of the file is broken.
    """
    try:
        if data.startswith(PNG_START):
            return PNG_START + b"".join(png_chunks(data))
        if data.startswith(b"\xff\xd8"):
            return b"\xff\xd8" + b"".join(jpeg_segments(data))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            body = b"WEBP" + b"".join(webp_chunks(data))
            return b"RIFF" + struct.pack("<I", len(body)) + body
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return strip_tiff(data)
        if data[4:8] == b"ftyp":
            return AVIF_EXTRAS.sub(rb"\1skip", data)
    except (struct.error, IndexError, ValueError, OverflowError):
        pass
    return data


def keep_orientation(exif: bytes) -> bytes:
    """Return EXIF with the orientation alone; empty if there is no orientation, or it cannot be read."""
    try:
        found, kept = Image.Exif(), Image.Exif()
        found.load(exif)
        kept[ExifTags.Base.Orientation] = int(found[ExifTags.Base.Orientation])
        return kept.tobytes()
    except Exception:  # as in `turn_upright`
        return b""


def png_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the chunks of a PNG that pixels need, and its orientation.

    Text is never decompressed, so it needs no limit.
    """
    start, colour = len(PNG_START), data[25]
    while start + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        chunk = data[start : start + size + 12]
        start += size + 12
        if kind == b"tRNS" and size < {0: 2, 2: 6}.get(colour, 1):
            continue
        whole = len(chunk) == size + 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or (kind == b"tRNS" and whole):
            yield chunk
        elif kind == b"eXIf" and (exif := keep_orientation(chunk[8:-4])):
            exif = kind + exif.removeprefix(b"Exif\0\0")
            yield struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
        if kind == b"IEND":
            return
    yield data[start:]  # the decoder refuses a file that is cut here


def jpeg_segments(data: bytes) -> Iterator[bytes]:
    """Yield the segments of a JPEG that pixels need, its orientation, and everything after its header."""
    start = 2
    while True:
        start = data.index(b"\xff", start)
        marker = data[start + 1]
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # padding, or a marker without a segment
            start += 1
            continue
        (size,) = struct.unpack_from(">H", data, start + 2)
        segment = data[start : start + size + 2]
        body = segment[4:]
        colours = (marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12) or (
            marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
        )
        if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield segment
        elif marker == 0xE1 and body.startswith(b"Exif\0\0") and (exif := keep_orientation(body)):
            yield b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        start += size + 2
        if marker == 0xDA:  # the pixels follow
            yield data[start:]
            return


def webp_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the chunks of a WebP that pixels need, and its EXIF, which only `turn_upright` reads."""
    start = 12
    while start + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, start)
        stop = start + 8 + size + size % 2
        if kind == b"VP8X":  # its flags list the other chunks: clear those of the profile and of XMP
            yield data[start : start + 8] + bytes([data[start + 8] & 0b00011010]) + data[start + 9 : stop]
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF") or (kind == b"EXIF" and stop <= len(data)):
            yield data[start:stop]
        start = stop


def strip_tiff(data: bytes) -> bytes:
    """Append a directory for the first image to a TIFF, which has only the tags that pixels need; returns the TIFF."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    number, counter, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    header, first = (16, 8) if big else (8, 4)
    (place,) = struct.unpack_from(f"{order}{number}", data, first)
    (count,) = struct.unpack_from(f"{order}{counter}", data, place)
    place += struct.calcsize(f"{order}{counter}")
    kept = [
        data[at : at + entry]
        for at in range(place, min(place + count * entry, len(data) - entry + 1), entry)
        if struct.unpack_from(f"{order}H", data, at)[0] in TIFF_PIXELS
    ]
    if len(kept) == count:
        return data
    start = len(data) + len(data) % 2
    directory = struct.pack(f"{order}{counter}", len(kept)) + b"".join(kept) + struct.pack(f"{order}{number}", 0)
    pointer = struct.pack(f"{order}{number}", start)
    return data[:first] + pointer + data[header:].ljust(start - header, b"\0") + directory
