"""Captions that scores cannot split into words, because their language writes no spaces between them."""

import re
from collections.abc import Iterable

UNSPACED = re.compile(
    "[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003134f]"  # Han, Kana
    "|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"  # Thai, Lao, Burmese, Khmer
)
LONG = {True: 4, False: 10}
"""Characters of a word above which it is taken for several: of Han and Kana, and of the alphabets, whose words are
longer."""


def count_unsplit(captions: Iterable[str]) -> int:
    """Count the captions whose words are not apart: those whose words would have too many letters on average.

    Args:
        captions: tokens joined by spaces.
    """
    return sum(is_unsplit(caption) for caption in captions if not caption.isascii())


def is_unsplit(caption: str) -> bool:
    """Tell whether a caption consists of words that are not apart."""
    words = [word for word in caption.split() if UNSPACED.search(word)]
    letters = [letter for word in words for letter in UNSPACED.findall(word)]
    ideographic = sum(letter >= "\u3040" for letter in letters) * 2 > len(letters)
    return bool(words) and len(letters) >= LONG[ideographic] * len(words)
