"""Tags from captions: the most frequent words that stand where English nouns stand."""

import re
from collections import Counter
from collections.abc import Iterable

from captioner.tags import plural


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


DETERMINERS = word_set(
    "a an the his her their its this that these those some two three four five six several many of another each "
    "red orange yellow green blue purple pink brown black white gray grey golden dark bright "
    "small large big little young old wooden metal"
)
"""Words after which a noun may stand at once; of adjectives, the most frequent in captions."""
FOLLOWERS = word_set(
    "in on at of with is are was were to from by near next behind under over through into onto while as that who which "
    "for up down out off along around beside between against during above below inside outside across has have"
)
"""Words that may stand after a noun; a noun may also end a sentence. `and` is none of them: it stands after colours."""
STOPPED = word_set(
    "a an and are as at back background be behind bottom both bunch close couple day each edge end foreground front "
    "group half her him his inside it its kind left length line lot middle number one other others outside pair part "
    "himself photo photograph picture piece right row same scene set shot side sides thing things top two type variety "
    "view way image images them something someone time area place another distance corner"
)
"""Words that stand where nouns stand, and name no thing in an image."""
SHARE = 0.1
"""Least share of a word's occurrences that stand after a determiner and before a follower or the end."""


USUALLY_PLURAL = 4
"""A noun whose plural is more than this many times as frequent has the plural as its name."""


def frequent_nouns(captions: Iterable[str], count: int, known: Iterable[str] = ()) -> dict[str, list[str]]:
    """Find the words that most captions name, and that stand where nouns stand in English.

    Args:
        captions: the captions.
        count: number of nouns.
        known: phrases of other tags, which are left out.

    Returns:
        The nouns, the most frequent first, each with its phrases: itself, and its regular plural where that occurs.
    """
    occurrences: Counter[str] = Counter()
    as_noun: Counter[str] = Counter()
    for caption in captions:
        words = re.findall(r"[^\W\d_]+|[.,;]", caption.lower())
        occurrences.update(word for word in set(words) if len(word) > 2)
        found = set()
        for before, word, after in zip(["", *words], words, [*words[1:], "."], strict=False):
            if before in DETERMINERS and (after in FOLLOWERS or after in ".,;"):
                found.add(word)
        as_noun.update(found)
    skipped = STOPPED | DETERMINERS | FOLLOWERS | set(known)
    nouns: Counter[str] = Counter()
    phrases: dict[str, list[str]] = {}
    for word in occurrences.keys() - {plural(word) for word in occurrences}:
        forms = [form for form in (word, plural(word)) if form in occurrences]
        seen = sum(occurrences[form] for form in forms)
        if skipped.isdisjoint(forms) and sum(as_noun[form] for form in forms) >= SHARE * seen:
            several = occurrences[forms[-1]] > USUALLY_PLURAL * occurrences[word]
            name = forms[-1] if several else word  # `jeans`, not `jean`
            nouns[name], phrases[name] = seen, forms
    chosen = sorted(nouns, key=lambda word: (-nouns[word], word))[:count]
    return {word: phrases[word] for word in chosen}
