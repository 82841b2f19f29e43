"""The PTB tokenizer of the COCO caption evaluation, without Java: `tokenize`.

pycocoevalcap writes all captions to a file, one a line, runs Stanford CoreNLP's `PTBTokenizer` over it, and drops
punctuation. The same tokens come out here. What that implies:

- **The next caption may matter**, as it does there: Java reads on across lines, so that a caption ending in a single
  letter and a period ("a sign that reads K.") gives `k` before a caption that begins with a word such as "A" or "The",
  and `k.` otherwise. (Three of COCO val2017's 25,014 captions end so.) `tokenize` keeps this; `tokenize_caption` knows
  no neighbours.
- **One caption stays one caption.** pycocoevalcap replaces "\\n" by a space; other line separators (carriage return,
  vertical tab, form feed, U+2028, U+2029) break Java's lines and shift every later caption to a wrong image. Here they
  are spaces too.
- Brackets stay, as `-lrb-` and the like: the list of punctuation has them in capitals, the tokens are in small letters.
- Some tokens hold a no-break space (U+00A0), as in "23 3/4": `str.split()` cuts there, `str.split(" ")` does not.

Known to differ, found with random strings: the small form of a capital sigma in a token that also has digits or
signs; and tags and one smiley (`~.[^x=`...) that Java follows across lines are not followed here.
"""

import re
from collections.abc import Iterable

from captioner.metrics.ptb.chars import CLASSES, LETTER, MARK
from captioner.metrics.ptb.rules import GAP, LINK, RULES, RULES_WITHOUT_LINKS, kind_of

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""Tokens that pycocoevalcap drops, compared after lower-casing."""

MAX_WORDS = 1_000_000
"""Words remembered before the memory starts anew."""

_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
_GAPS = re.compile(f"{GAP}+")
_SIGMA_WORD = re.compile(r"[\w'.\u2010\u2011-]*\u03a3[\w'.\u2010\u2011-]*")
_SPLIT_WORDS = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))

# A stretch between spaces whose tokens cannot depend on what stands around it: letters, inner hyphens and slashes,
# quotes, closing punctuation. Digits, entities, tags and smileys may look or reach across a space.
_ALONE = re.compile(
    rf"""["'(]*[A-Za-z{LETTER}{MARK}]+(?:[-'/][A-Za-z{LETTER}{MARK}]+)*(?:[,?!."'][")]*|[")]*[,;:?!."']?)|[-,.?!"'()]|"""
)
# Of those, what reads on after its period: one letter, and abbreviations that count only before a number or "Ltd".
_READS_ON = re.compile(
    r"[A-Za-z]*[^A-Za-z].*[A-Za-z]\.|(?:[A-Za-z]|(?i:ca|figs?|prop|nos?|art|pp|op|pt[ey]|co))\."  # in linear time
)


class _Words(dict):
    """Stretch between spaces -> its tokens joined by spaces, or None where they depend on what stands around it."""

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
    """Character of a class string -> the rules a token starting with it can fall under."""

    def __init__(self, by_kind: dict[str, tuple]):
        self.by_kind = by_kind

    def __missing__(self, character: str) -> tuple:
        self[character] = self.by_kind[kind_of(character)]
        return self[character]


_RULES, _RULES_WITHOUT_LINKS = _Rules(RULES), _Rules(RULES_WITHOUT_LINKS)


def tokenize(captions: Iterable[str]) -> list[str]:
    """Tokenize captions as pycocoevalcap's `PTBTokenizer` does when given them in this order.

    Args:
        captions: plain text; where one ends in a one-letter abbreviation, the next one matters (see above).

    Returns:
        For each caption its tokens, lower-cased, without punctuation, joined by single spaces.
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
    """Tokenize one caption on its own; as `tokenize`, whatever its neighbours."""
    line = _LINE_BREAKS.sub(" ", caption)
    tokens = list(map(_WORDS.__getitem__, line.split(" ")))
    return _read(line, "\n") if None in tokens or ". ." in line else " ".join(filter(None, tokens))


def _following(lines: list[str], index: int) -> str:
    """What Java can see after a line: the break, and all up to the end of the next line that is not blank."""
    following = ""
    for line in lines[index + 1 :]:
        following += "\n" + line
        if line.strip():
            break
    return following + "\n" if following and following.count("\n") < len(lines) - index - 1 else following


def _read(line: str, following: str) -> str:
    """Tokenize one line rule by rule, with the word memory where it applies."""
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
                pieces.append(known or ".")  # a dropped token still ends the line, see the strip below
                place = cut + 1
                continue
        token, place = _next_token(text, shapes, place, rules)
        pieces.append(token)
    return _joined(pieces)


def _next_token(text: str, shapes: str, place: int, rules: _Rules) -> tuple[str, int]:
    """Read the token at a place.

    Args:
        text: what the token is cut from.
        shapes: the class string of `text`, as long.
        place: where the token starts.
        rules: those to try.

    Returns:
        The token, empty if the characters are dropped, and where the next one starts.
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
    """Join tokens as pycocoevalcap does: lower-case, strip the line's end, drop punctuation."""
    line = _whole(" ".join(map(_lower, filter(None, tokens)))).rstrip()
    return " ".join(token for token in line.split(" ") if token not in PUNCTUATION)


def _lower(token: str) -> str:
    """Lower-case as Java: it takes a sigma for final by the letters of the whole word, Python by the next one."""
    return _SIGMA_WORD.sub(_lower_sigma, token).lower() if "\u03a3" in token else token.lower()


def _lower_sigma(word: re.Match) -> str:
    cased = [letter.isupper() or letter.islower() or letter.istitle() for letter in word[0]]
    return "".join(
        letter if letter != "\u03a3" else "\u03c2" if any(cased[:place]) and not any(cased[place + 1 :]) else "\u03c3"
        for place, letter in enumerate(word[0])
    )


def _utf16(text: str) -> str:
    """Spell characters beyond U+FFFF as the two Java sees."""
    if text.isascii() or max(text) <= "\uffff":
        return text
    return "".join(map(chr, memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")))


def _whole(text: str) -> str:
    """Undo `_utf16`."""
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
