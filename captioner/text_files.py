"""Read text files of other programs: their encoding is detected, and their size is limited; gzip is unpacked."""

import codecs
import gzip
import json
import logging
import zlib
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 2 * 2**30
"""Size in bytes above which a text file is refused, because it would fill the memory."""

GZIP = b"\x1f\x8b"
"""The first bytes of a file that gzip packed."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Read a text file: by its byte order mark, else as UTF-8, else as Windows-1252, with a warning.

    A file that contains characters of UTF-8 is never read as Windows-1252, which would garble these characters. A file
    that gzip packed, whatever its name, is unpacked in memory.

    Raises:
        ValueError: the file is larger than `MAX_TEXT_BYTES`, is damaged, has another encoding, or contains NUL bytes.
        OSError: the file cannot be read.
    """
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(f"'{path}' is {size / 2**30:.1f} GiB; over {MAX_TEXT_BYTES // 2**30} GiB is refused")
    data = path.read_bytes()
    text = decode_text(unpack(path) if data.startswith(GZIP) else data, path)
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise ValueError(
            f"'{path}', line {line}, holds a NUL character; a text file must be UTF-8, or UTF-16 with a byte order mark"
        )
    return text


def unpack(path: Path) -> bytes:
    """Unpack a file that gzip packed.

    Raises:
        ValueError: the file is damaged, or its content is larger than `MAX_TEXT_BYTES`.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"'{path}' is damaged: it cannot be unpacked ({error})") from None
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"'{path}' holds more than {MAX_TEXT_BYTES // 2**30} GiB of text, which is refused")
    return data


def decode_text(data: bytes, path: Path) -> str:
    """Decode the bytes of a text file as `read_text` does.

    Raises:
        ValueError: the encoding is unknown.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"'{path}' has the byte order mark of {encoding} and another encoding: {error}"
                ) from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
    try:
        if data.decode("utf-8", "ignore").isascii():
            text = data.decode("cp1252")
            logger.warning("'%s' is not UTF-8 (line %d): it is read as Windows-1252", path, line)
            return text
    except UnicodeDecodeError:
        pass
    raise ValueError(f"'{path}', line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8")


class RepeatedKeyError(ValueError):
    """A JSON object has one name twice. JSON readers keep only the last value, without a warning."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its names and values.

    Raises:
        RepeatedKeyError: a name appears more than once.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"an object has the name '{twice}' more than once")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
"""Parses JSON of other programs; it refuses an object that has one name twice."""


def parse_json_text(text: str, path: Path) -> Any:
    """Parse the text of a JSON file.

    Raises:
        ValueError: the text is not JSON.
    """
    try:
        return DECODER.decode(text)
    except RepeatedKeyError as error:
        raise ValueError(f"'{path}': {error}") from None
    except (ValueError, RecursionError) as error:  # json raises ValueError for numbers of thousands of digits, too
        raise ValueError(f"'{path}' is not JSON: {error}") from None
