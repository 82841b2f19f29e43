r"""How names of files are written where a line holds one name: one rule for every output and every message.

A name is text as Python has it: bytes that are not UTF-8 are single surrogates (`os.fsdecode`). Written, a name stays
on one line and is valid UTF-8, and it can be read back exactly:

| in the name                                             | written                          |
|---------------------------------------------------------|----------------------------------|
| backslash, tab, line feed, carriage return              | `\\`, `\t`, `\n`, `\r`           |
| another ASCII control character, a byte that is no UTF-8 | `\xHH`, that byte                |
| another character that some program takes for a line end | `\uHHHH`, such as `\u2028`       |
| anything else, emoji too                                | as it is                         |

The shell reads it back with `printf %b`. On Windows, where backslashes separate folders, they are left as they are.
JSON has an escape of its own for each of these, so JSON Lines hold names by JSON's rule (`write_json`).
"""

import json
import os
import re
from typing import Any

CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
"""Characters that end a line for some program, cannot be seen, or are not valid in UTF-8."""

BACKSLASH = "" if os.sep == "\\" else r"\\"
SPECIAL = re.compile(f"[{BACKSLASH}{CONTROL}]")
ESCAPED = re.compile(rf"\\(?:[{BACKSLASH}tnr]|x[0-9a-f]{{2}}|u[0-9a-f]{{4}}|U[0-9a-f]{{8}})")
SHORT = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
LONG = {written: character for character, written in SHORT.items()}


def escape_name(name: str) -> str:
    """Write a name so that it stays on one line, is valid UTF-8, and `unescape_name` gives it back."""
    return SPECIAL.sub(lambda match: escape_character(match[0]), name)


def unescape_name(text: str) -> str:
    """Read a name that `escape_name` wrote; a backslash that begins no escape stands for itself."""
    return ESCAPED.sub(lambda match: LONG.get(match[0]) or read_number(match[0]), text)


def escape_character(character: str) -> str:
    """Write one character as an escape."""
    code = ord(character)
    if character in SHORT:
        return SHORT[character]
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def read_number(escape: str) -> str:
    r"""Read `\xHH`, `\uHHHH` or `\UHHHHHHHH`."""
    code = int(escape[2:], 16)
    return chr(code + 0xDC00 if escape[1] == "x" and code >= 0x80 else code)


def write_json(value: Any) -> str:
    r"""Write JSON on one line and in valid UTF-8: what `escape_name` escapes is written as JSON's own `\uHHHH`."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(f"[{CONTROL}]", lambda match: f"\\u{ord(match[0]):04x}", text)


def fit_encoding(text: str, encoding: str) -> str:
    """Escape what an encoding lacks, such as an umlaut in ASCII."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(c if can_encode(c, encoding) else escape_character(c) for c in text)
    return text


def can_encode(character: str, encoding: str) -> bool:
    """Tell whether an encoding has a character."""
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
