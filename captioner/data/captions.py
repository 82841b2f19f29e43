"""The rules for captions and image ids.

Training, caching, evaluation, scoring and streaming all read captions by these rules. So an entry that one of them
cannot use is unusable for the others, too.
"""

import ast
import io
import json
import math
import re
import tokenize
import warnings
from typing import Any, NamedTuple

ImageId = int | str

NO_VALUE = frozenset(("", "nan", "none", "null", "<na>", "n/a", "#n/a"))
"""Texts that programs write into cells without a value, in lower case; pandas writes `nan`, for example."""

CONSTRUCTED = re.compile(r"(array|list|tuple|set|frozenset|deque|Series)\(\s*[\[({]")
"""Start of the `repr` of an array or another list: it is not a caption, and it is not parsed as a list."""

CLOSING = {"[": "]", "(": ")", "{": "}"}

NEIGHBOURS = re.compile(r"""["']\s*["']""")
"""Two texts without a comma between them: Python would join them, but numpy prints two texts so."""


class Captions(NamedTuple):
    """The captions of one image, and the numbers of its entries that are not captions."""

    texts: list[str]
    """The captions, unchanged."""
    empty: int = 0
    """Entries without a caption: blank, missing, or `nan`."""
    unreadable: int = 0
    """Entries that are not text, or that look like a list but cannot be read as one."""


def read_captions_of(value: Any) -> Captions:
    """Read the captions of one image: a text, or a list of texts.

    A list that is stored as text, in the form of JSON, Python or numpy, is read as a list: `['a dog', 'a red dog']` in
    a cell of a CSV file are two captions.

    Args:
        value: the value of the image in the data, of any type.
    """
    texts: list[str] = []
    empty = unreadable = 0
    for item in value if isinstance(value, list) else (value,):
        if not isinstance(item, str):
            if is_missing(item):
                empty += 1
            else:
                unreadable += 1
            continue
        text = item.strip()
        if len(text) < 5 and text.lower() in NO_VALUE:
            empty += 1
        elif CONSTRUCTED.match(text):
            unreadable += 1
        elif text[0] not in CLOSING:
            texts.append(clean_text(item))
        else:
            try:
                inner = parse_list(text)
            except ValueError:
                unreadable += 1
                continue
            if inner is None:
                texts.append(clean_text(item))
            else:
                texts += [clean_text(text) for text in inner if text is not None and not is_missing(text)]
                empty += sum(map(is_missing, inner)) + (not inner)
    return Captions(texts, empty, unreadable)


def is_missing(value: Any) -> bool:
    """Return whether a value stands for a missing one: `None`, NaN, a blank text, or a word such as `nan`."""
    if isinstance(value, str):
        return value.strip().lower() in NO_VALUE
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_list(text: str) -> list[str | None] | None:
    """Read a list of texts that is stored as text.

    Args:
        text: the text, without white space around it; its first character is one of `[({`.

    Returns:
        The items, None for those without a value; or None if the text is not a list but a caption.

    Raises:
        ValueError: the text looks like a list but cannot be read as a list of texts.
    """
    whole, inner = text[-1] == CLOSING[text[0]], text[1:-1].strip()
    quoted = text[1:].lstrip()[:1] in ("'", '"')
    word = re.fullmatch(r"[^\s,'\"\[\]]+", inner) and inner.lower() not in NO_VALUE  # such as "[UNK]"
    if text[0] == "[" and (quoted or (whole and not closes_early(text))) and not word:
        return check_items(parse_json(text) or parse_python(text))
    if not (whole and quoted):
        return None
    try:  # a tuple or a set; or a caption in brackets
        items = parse_json(text) or parse_python(text)
    except ValueError:
        return None
    return None if isinstance(items, str) else check_items(items)


def closes_early(text: str) -> bool:
    """Return whether the bracket that opens a text is closed before its end, as in "[one] and [two]"."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth == 0:
            return place < len(text) - 1
    return False


def parse_json(text: str) -> Any:
    """Return the value of JSON, or None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_python(text: str) -> Any:
    """Parse a Python literal, or a numpy array of texts as numpy prints it.

    Raises:
        ValueError: the text is neither.
    """
    if not NEIGHBOURS.search(text):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of backslashes in texts
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None  # `nan` in a list is not a literal
        if value is not None and not isinstance(value, set):  # a set loses the order
            return value
    try:
        return parse_array(text)
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"not a list of texts: {error}") from None


def parse_array(text: str) -> list[str | None]:
    """Parse a list of texts token by token: with commas between all texts, or without commas, as numpy prints arrays.

    Raises:
        ValueError: the list contains something else, or commas between some texts only.
    """
    items: list[str | None] = []
    brackets = commas = 0
    space = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING:
            items.append(ast.literal_eval(token.string))
        elif token.type == tokenize.NAME and token.string.lower() in NO_VALUE:
            items.append(None)
        elif token.string == ",":
            commas += 1
        elif token.type == tokenize.OP and token.string in "[](){}":
            brackets += 1
        elif token.type not in space:
            raise ValueError(f"{token.string!r} is not a text")
    if brackets != 2:
        raise ValueError("a list within a list")
    if commas and commas not in (len(items) - 1, len(items)):
        raise ValueError("a comma is missing")
    return items


def check_items(items: Any) -> list[str | None]:
    """Return the items of a list or tuple if all are texts or have no value.

    Raises:
        ValueError: an item is something else.
    """
    if not isinstance(items, list | tuple) or not all(isinstance(i, str) or is_missing(i) for i in items):
        raise ValueError("not a list of texts")
    return list(items)


def clean_text(text: str) -> str:
    """Replace single surrogates, which JSON can contain, but files, pipes and tables cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def plain_id(value: Any) -> ImageId | None:
    """Return an image id as a whole number or a text; None for anything else. 7.0, as in data frames, becomes 7."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
