"""A score close to METEOR that needs no Java, for rewards: thousands of captions a second.

It is METEOR 1.5 (Denkowski and Lavie, 2014, https://aclanthology.org/W14-3348) with its weights for English: a weighted
mean of unigram precision and recall, words of content before words of grammar, times a penalty for fragments, for the
best reference. It leaves out synonyms and paraphrases, its stemmer is simpler, and it aligns words from left to right
without a search. Report METEOR itself, which `captioner score` computes.
"""

from collections.abc import Sequence
from functools import lru_cache

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75
"""METEOR's weight of recall, exponent and factor of the penalty, and weight of words of content."""
STEM = 0.6
"""METEOR's weight of two words with one stem; equal words have the weight 1."""
GRAMMAR_WORDS = """a an the this that these those some of in on at to from by with for into onto over under up down out
off near through and or but as is are was were be been being has have had it its he his him she her they their them who
which while there one"""
GRAMMAR = frozenset(GRAMMAR_WORDS.split())
"""Words of grammar, which count less."""


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """Return a word without English endings, so that its forms are equal: `rides` and `riding` give `rid`."""
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) > 2 and not word.endswith(("ss", "us")):
            word = word[: -len(ending)]
            if ending in ("ing", "ed") and word[-1] == word[-2] and word[-1] not in "ls":
                word = word[:-1]  # running, run
            break
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


class Words:
    """A tokenized text in the form for `compare`."""

    def __init__(self, text: str):
        self.words = text.split()
        self.stems = [stem(word) for word in self.words]
        self.weights = [1 - DELTA if word in GRAMMAR else DELTA for word in self.words]
        self.total = sum(self.weights)


def quick_meteor(caption: Words, references: Sequence[Words]) -> float:
    """Return the score of a caption against its references, 0 to 1: that of the reference where it is highest."""
    return max((compare(caption, reference) for reference in references), default=0.0)


def compare(caption: Words, reference: Words) -> float:
    """Return the score of a caption against one reference, 0 to 1."""
    places = align(caption, reference)
    matched = [number for number, place in enumerate(places) if place is not None]
    if not matched:
        return 0.0
    precision = recall = 0.0
    chunks, before = 0, None
    for number in matched:
        place = places[number]
        assert place is not None
        factor = 1.0 if caption.words[number] == reference.words[place] else STEM
        precision += factor * caption.weights[number]
        recall += factor * reference.weights[place]
        chunks += before != (number - 1, place - 1)
        before = number, place
    precision, recall = precision / caption.total, recall / reference.total
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    whole = len(matched) == len(caption.words) == len(reference.words) and chunks == 1
    return mean if whole else mean * (1 - GAMMA * (chunks / len(matched)) ** BETA)


def align(caption: Words, reference: Words) -> list[int | None]:
    """Return the place in the reference that each word of the caption is matched with; `None` without a match.

    Equal words are matched first, then words with one stem. A word takes the place after that of the word before it if
    it can, else the first free one.
    """
    places: list[int | None] = [None] * len(caption.words)
    free = [True] * len(reference.words)
    for ours, theirs in ((caption.words, reference.words), (caption.stems, reference.stems)):
        for number, word in enumerate(ours):
            if places[number] is not None:
                continue
            before = places[number - 1] if number else -1
            following = len(theirs) if before is None else before + 1
            if following < len(theirs) and free[following] and theirs[following] == word:
                place = following
            else:
                place = next((n for n, other in enumerate(theirs) if free[n] and other == word), -1)
            if place >= 0:
                places[number], free[place] = place, False
    return places
