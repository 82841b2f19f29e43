"""The PTB tokenizer of the COCO caption evaluation, without Java: `tokenize`.

pycocoevalcap writes all captions to a file, one per line, runs Stanford CoreNLP's `PTBTokenizer` on it, and drops
punctuation. This module gives the same tokens. The consequences:

- **The next caption may matter**, as in Java, which reads across line ends. A caption that ends in a single letter and
  a period ("a sign that reads K.") gives `k` if the next caption starts with a word such as "A" or "The", and `k.`
  otherwise. (Three of the 25,014 captions of COCO val2017 end so.) `tokenize` does the same; `tokenize_caption` takes
  one caption alone.
- **One caption stays one caption.** pycocoevalcap replaces "\\n" by a space. Other line separators (carriage return,
  vertical tab, form feed, U+2028, U+2029) break Java's lines, and every later caption gets the tokens of another image.
  Here they are spaces, too.
- Brackets stay as `-lrb-` and so on: the list of punctuation has them in capitals, but the tokens are in small letters.
- Some tokens contain a no-break space (U+00A0), as in "23 3/4": `str.split()` splits there, `str.split(" ")` does not.

Known differences, found with random strings: the small form of a capital sigma in a token that also has digits or
signs; and Java reads tags and one smiley (`~.[^x=`...) across line ends.
"""

import re
from collections.abc import Iterable

from captioner.metrics.ptb.chars import CLASSES, LETTER, MARK
from captioner.metrics.ptb.rules import GAP, LINK, RULES, RULES_WITHOUT_LINKS, kind_of

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""Tokens that pycocoevalcap drops; they are compared with lower-cased tokens."""

MAX_WORDS = 1_000_000
"""Words in the memory of tokens above which it is emptied."""

_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
_GAPS = re.compile(f"{GAP}+")
_SIGMA_WORD = re.compile(r"[\w'.\u2010\u2011-]*\u03a3[\w'.\u2010\u2011-]*")
_SPLIT_WORDS = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))

# A text between spaces whose tokens cannot depend on its neighbours: letters, inner hyphens and slashes, quotes,
# closing punctuation. Tokens with digits, entities, tags and smileys may depend on text after a space, or contain it.
_ALONE = re.compile(
    rf"""["'(]*[A-Za-z{LETTER}{MARK}]+(?:[-'/][A-Za-z{LETTER}{MARK}]+)*(?:[,?!."'][")]*|[")]*[,;:?!."']?)|[-,.?!"'()]|"""
)
# Those of them whose tokens depend on the text after their period: one letter, and words that are abbreviations only
# before a number or "Ltd".
_READS_ON = re.compile(
    r"[A-Za-z]*[^A-Za-z].*[A-Za-z]\.|(?:[A-Za-z]|(?i:ca|figs?|prop|nos?|art|pp|op|pt[ey]|co))\."  # in linear time
)


class _Words(dict):
    """Maps a text between spaces to its tokens, joined by spaces; to None if they depend on its neighbours."""

    def __missing__(self, word: str) -> str | None:
        if len(self) >= MAX_WORDS:
            self.clear()
        shape = word.translate(CLASSES)
        if not _ALONE.fullmatch(shape) or _READS_ON.fullmatch(shape):
            joined = None
        elif word.isascii() and word.isalpha() and word.lower() not in _SPLIT_WORDS:
            joined = word.lower()
        else:
            tokens: list[str] = []
            place = 0
            while place < len(word):
                token, place = _next_token(word + "\n", shape + "\n", place, _RULES_WITHOUT_LINKS)
                tokens.append(token)
            joined = _joined(tokens)
        self[word] = joined
        return joined


_WORDS = _Words()


class _Rules(dict):
    """Maps a character of a class string to the rules that can match a token with this first character."""

    def __init__(self, by_kind: dict[str, tuple]):
        self.by_kind = by_kind

    def __missing__(self, character: str) -> tuple:
        self[character] = self.by_kind[kind_of(character)]
        return self[character]


_RULES, _RULES_WITHOUT_LINKS = _Rules(RULES), _Rules(RULES_WITHOUT_LINKS)


def tokenize(captions: Iterable[str]) -> list[str]:
    """Tokenize captions as pycocoevalcap's `PTBTokenizer` does when given them in this order.

    Args:
        captions: plain text. The tokens of one that ends in a one-letter abbreviation depend on the next (see above).

    Returns:
        The tokens of each caption, lower-cased, without punctuation, joined by single spaces.
    """
    lines = [line if line.isprintable() else _LINE_BREAKS.sub(" ", line) for line in captions]
    words = _WORDS.__getitem__
    tokenized = []
    for index, line in enumerate(lines):
        tokens = list(map(words, line.split(" ")))
        if None in tokens or ". ." in line:
            tokenized.append(_read(line, _following(lines, index)))
        else:
            tokenized.append(" ".join(filter(None, tokens)))
    return tokenized


def tokenize_caption(caption: str) -> str:
    """Tokenize one caption as `tokenize` does if no other caption follows."""
    line = _LINE_BREAKS.sub(" ", caption)
    tokens = list(map(_WORDS.__getitem__, line.split(" ")))
    return _read(line, "\n") if None in tokens or ". ." in line else " ".join(filter(None, tokens))


def _following(lines: list[str], index: int) -> str:
    """Return the text after a line that Java may read for its tokens: up to the end of the next line with text."""
    following = ""
    for line in lines[index + 1 :]:
        following += "\n" + line
        if line.strip():
            break
    return following + "\n" if following and following.count("\n") < len(lines) - index - 1 else following


def _read(line: str, following: str) -> str:
    """Tokenize one line by the rules; words whose tokens depend on no neighbour are looked up in `_WORDS`."""
    line, text = _utf16(line), _utf16(line + following)
    shapes = text if text.isascii() else text.translate(CLASSES)
    rules = _RULES if LINK.search(shapes) else _RULES_WITHOUT_LINKS
    ellipsis = ". ." in line  # periods may then join across spaces
    pieces, place, stop = [], 0, len(line)
    while place < stop:
        if place == 0 or text[place - 1] == " ":
            gaps = _GAPS.match(shapes, place) if place else None
            if gaps:
                place = gaps.end()
                continue
            cut = text.find(" ", place, stop)
            cut = stop if cut < 0 else cut
            word = text[place:cut]
            known = None if ellipsis and word.endswith(".") else _WORDS[word]
            if known is not None:
                pieces.append(known or ".")  # a dropped token is still the end of the line, see `_joined`
                place = cut + 1
                continue
        token, place = _next_token(text, shapes, place, rules)
        pieces.append(token)
    return _joined(pieces)


def _next_token(text: str, shapes: str, place: int, rules: _Rules) -> tuple[str, int]:
    """Read the token at a position.

    Args:
        text: the text that the token is cut from.
        shapes: the class string of `text`, of the same length.
        place: position of the first character of the token.
        rules: the rules to try.

    Returns:
        The token (empty if its characters are dropped), and the position of the next one.
    """
    best, furthest = None, place
    for rule in rules[shapes[place]]:
        match = rule.pattern.match(shapes, place)
        if match and match.end() > furthest:
            best, action, furthest = match, rule.action, match.end()
    if best is None:
        return "", place + 1
    end = best.end(1)
    if isinstance(action, str):
        return action, end
    if isinstance(action, int):
        return text[place : end - action], end - action
    return (action(text[place:end]) if action else text[place:end]), end


def _joined(tokens: list[str]) -> str:
    """Join tokens as pycocoevalcap does: lower-cased, without white space at the line's end, without punctuation."""
    line = _whole(" ".join(map(_lower, filter(None, tokens)))).rstrip()
    return " ".join(token for token in line.split(" ") if token not in PUNCTUATION)


def _lower(token: str) -> str:
    """Lower-case a token as Java does: it finds the final sigma by the whole word, Python by the next letter."""
    return _SIGMA_WORD.sub(_lower_sigma, token).lower() if "\u03a3" in token else token.lower()


def _lower_sigma(word: re.Match) -> str:
    cased = [letter.isupper() or letter.islower() or letter.istitle() for letter in word[0]]
    return "".join(
        letter if letter != "\u03a3" else "\u03c2" if any(cased[:place]) and not any(cased[place + 1 :]) else "\u03c3"
        for place, letter in enumerate(word[0])
    )


def _utf16(text: str) -> str:
    """Write each character above U+FFFF as two surrogates, as Java stores it."""
    if text.isascii() or max(text) <= "\uffff":
        return text
    return "".join(map(chr, memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")))


def _whole(text: str) -> str:
    """Undo `_utf16`."""
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
