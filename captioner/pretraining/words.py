"""The words of captions as targets for their images."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


class CaptionWords:
    """For each image, the share of its captions in which each frequent word occurs.

    An encoder that predicts these shares learns what people write about, without a decoder (Joulin et al., ECCV 2016).

    Attributes:
        words: the V words, the most frequent first.
        targets: share of captions with each word, float32 (images, V).
    """

    def __init__(self, captions: Sequence[list[str]], size: int):
        frequency = Counter(word for group in captions for word in count_words(group))
        self.words = [word for word, _ in sorted(frequency.items(), key=lambda item: (-item[1], item[0]))[:size]]
        self.targets = word_shares(captions, self.words)

    @property
    def prior(self) -> np.ndarray:
        """Mean target of each word, (V,)."""
        return self.targets.mean(0)


def count_words(captions: Sequence[str]) -> Counter[str]:
    """Count the captions in which each word occurs."""
    return Counter(word for caption in captions for word in set(re.findall(r"[a-z]+", caption.lower())))


def word_shares(captions: Sequence[Sequence[str]], words: Sequence[str]) -> np.ndarray:
    """Return the share of each image's captions in which each word occurs, float32 (images, V)."""
    index = {word: place for place, word in enumerate(words)}
    shares = np.zeros((len(captions), len(words)), np.float32)
    for row, group in enumerate(captions):
        for word, count in count_words(group).items():
            if word in index:
                shares[row, index[word]] = count / len(group)
    return shares
