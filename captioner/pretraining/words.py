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
        per_image = [Counter(w for c in group for w in set(re.findall(r"[a-z]+", c.lower()))) for group in captions]
        frequency = Counter(word for words in per_image for word in words)
        self.words = [word for word, _ in sorted(frequency.items(), key=lambda item: (-item[1], item[0]))[:size]]
        index = {word: i for i, word in enumerate(self.words)}
        self.targets = np.zeros((len(captions), len(self.words)), np.float32)
        for row, (words, group) in enumerate(zip(per_image, captions, strict=True)):
            for word, count in words.items():
                if word in index:
                    self.targets[row, index[word]] = count / len(group)

    @property
    def prior(self) -> np.ndarray:
        """Mean target of each word, (V,)."""
        return self.targets.mean(0)
