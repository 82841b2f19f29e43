r"""Write names of files on one line each, by one rule for every output and every message.

In Python, a name is text in which bytes that are not UTF-8 are single surrogates (`os.fsdecode`). A written name is on
one line, is valid UTF-8, and can be read back exactly:

| in the name                                             | written                          |
|---------------------------------------------------------|----------------------------------|
| backslash, tab, line feed, carriage return              | `\\`, `\t`, `\n`, `\r`           |
| another ASCII control character, a byte that is no UTF-8 | `\xHH`, that byte                |
| another character that some program takes for a line end | `\uHHHH`, such as `\u2028`       |
| anything else, emoji too                                | unchanged                        |

The shell reads it back with `printf %b`. On Windows, where backslashes separate folders, they are unchanged. JSON has
its own escape for each of these characters, so names in JSON Lines follow JSON's rule (`write_json`).
"""

import json
import os
import re
from typing import Any

CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
"""Characters that end a line for some program, are invisible, or are not valid in UTF-8."""

BACKSLASH = "" if os.sep == "\\" else r"\\"
SPECIAL = re.compile(f"[{BACKSLASH}{CONTROL}]")
ESCAPED = re.compile(rf"\\(?:[{BACKSLASH}tnr]|x[0-9a-f]{{2}}|u[0-9a-f]{{4}}|U[0-9a-f]{{8}})")
SHORT = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
LONG = {written: character for character, written in SHORT.items()}


def escape_name(name: str) -> str:
    """Return a name on one line and in valid UTF-8; `unescape_name` reverses it."""
    return SPECIAL.sub(lambda match: escape_character(match[0]), name)


def unescape_name(text: str) -> str:
    """Return the name from which `escape_name` made a text; a backslash that starts no escape stands for itself."""
    return ESCAPED.sub(lambda match: LONG.get(match[0]) or read_number(match[0]), text)


def escape_character(character: str) -> str:
    """Return the escape of one character."""
    code = ord(character)
    if character in SHORT:
        return SHORT[character]
    if 0xDC80 <= code <= 0xDCFF:  # Python's form of a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def read_number(escape: str) -> str:
    r"""Return the character of `\xHH`, `\uHHHH` or `\UHHHHHHHH`."""
    code = int(escape[2:], 16)
    return chr(code + 0xDC00 if escape[1] == "x" and code >= 0x80 else code)


def write_json(value: Any) -> str:
    r"""Return JSON on one line and in valid UTF-8; characters that `escape_name` escapes become JSON's own `\uHHHH`."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(f"[{CONTROL}]", lambda match: f"\\u{ord(match[0]):04x}", text)


def fit_encoding(text: str, encoding: str) -> str:
    """Return a text in which characters that an encoding lacks are escaped, such as an umlaut in ASCII."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(c if can_encode(c, encoding) else escape_character(c) for c in text)
    return text


def can_encode(character: str, encoding: str) -> bool:
    """Return whether an encoding has a character."""
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
