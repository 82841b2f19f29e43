"""Text files of other people's programs, read whole: their encoding is found out, their size is limited."""

import codecs
import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 2 * 2**30
"""Size in bytes above which a text file is refused, because it would fill the memory."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Read a text file: by its byte order mark, else as UTF-8, else as Windows-1252, with a warning.

    A file that is UTF-8 in other places is never read as Windows-1252, which would spoil these places.

    Raises:
        ValueError: it is larger than `MAX_TEXT_BYTES`, in another encoding, or holds NUL bytes.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(f"'{path}' is {size / 2**30:.1f} GiB; over {MAX_TEXT_BYTES // 2**30} GiB is refused")
    text = decode_text(path.read_bytes(), path)
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise ValueError(
            f"'{path}', line {line}, holds a NUL character; a text file must be UTF-8, or UTF-16 with a byte order mark"
        )
    return text


def decode_text(data: bytes, path: Path) -> str:
    """Decode the bytes of a text file as `read_text` does.

    Raises:
        ValueError: the encoding cannot be told.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(f"'{path}' begins as {encoding} and is not: {error}") from None
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
    """A JSON object with two values under one name, of which JSON readers drop the first without a word."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its names and values.

    Raises:
        RepeatedKeyError: a name stands there more than once.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"an object has the name '{twice}' more than once")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
"""Reads the JSON of other people's programs."""


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: it is not JSON, or is refused by `read_text`.
        OSError: it cannot be read.
    """
    return parse_json_text(read_text(path), path)


def parse_json_text(text: str, path: Path) -> Any:
    """Parse the text of a JSON file; see `load_json`."""
    try:
        return DECODER.decode(text)
    except RepeatedKeyError as error:
        raise ValueError(f"'{path}': {error}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ValueError(f"'{path}' is not JSON: {error}") from None
