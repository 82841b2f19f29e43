"""Find captions whose language writes no spaces between words: scores cannot split them into words."""

import re
from collections.abc import Iterable

UNSPACED = re.compile(
    "[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003134f]"  # Han, Kana
    "|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"  # Thai, Lao, Burmese, Khmer
)
LONG = {True: 4, False: 10}
"""Characters from which a word is taken for several words: in Han and Kana (True), and in the other scripts (False),
whose words are longer."""


def count_unsplit(captions: Iterable[str]) -> int:
    """Count the captions without spaces between words: those whose words have too many letters on average.

    Args:
        captions: tokens joined by spaces.
    """
    return sum(is_unsplit(caption) for caption in captions if not caption.isascii())


def is_unsplit(caption: str) -> bool:
    """Return whether a caption lacks spaces between its words."""
    words = [word for word in caption.split() if UNSPACED.search(word)]
    letters = [letter for word in words for letter in UNSPACED.findall(word)]
    ideographic = sum(letter >= "\u3040" for letter in letters) * 2 > len(letters)
    return bool(words) and len(letters) >= LONG[ideographic] * len(words)
