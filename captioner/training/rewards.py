"""The reward of stage scst: CIDEr-D, and further scores with a weight each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from captioner.metrics import CiderD, tokenize_caption
from captioner.metrics.ngrams import NGrams, ReferenceIndex, flatten
from captioner.metrics.overlap import bleu, bleu_statistics
from captioner.metrics.quick_meteor import Words, quick_meteor
from captioner.tags import TagVocabulary

END = " </s>"
"""The end token as a word, which no tokenized caption contains."""


class CaptionReward:
    """The reward of a caption: its CIDEr-D (0 to 10), plus other scores (0 to 1 each) times their weights.

    The n-gram statistics of CIDEr-D are those of all references together. So a word has one weight, whatever data set
    an image is from.

    Args:
        references: captions of each image; the index in this list is the number of an image.
        bleu_weight: weight of BLEU-4.
        meteor_weight: weight of `quick_meteor`.
        object_weight: weight of `object_score`.
        vocabulary: the objects of `object_score`.

    Raises:
        ValueError: there are no images, or one has no captions.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        bleu_weight: float = 0.0,
        meteor_weight: float = 0.0,
        object_weight: float = 0.0,
        vocabulary: TagVocabulary | None = None,
    ):
        plain = [[tokenize_caption(text) for text in texts] for texts in references]
        tokenized = {n: [text + END for text in texts] for n, texts in enumerate(plain)}
        image_of, captions = flatten(tokenized)
        self.weights = {"CIDEr": 1.0, "BLEU": bleu_weight, "METEOR": meteor_weight, "objects": object_weight}
        self.grams, self.vocabulary = NGrams(), vocabulary
        counts = self.grams.count(captions, learn=True)
        self.index = ReferenceIndex(counts, image_of, len(tokenized), self.grams.size)
        self.cider = CiderD.from_index(self.index, counts)
        self.texts = [[Words(text) for text in texts] for texts in plain] if meteor_weight else []
        self.shares: list[dict[int, float]] = []
        if object_weight:
            assert vocabulary is not None, "an object reward needs a vocabulary"
            self.shares = [mention_shares(texts, vocabulary) for texts in references]

    def __call__(self, images: np.ndarray, captions: Sequence[str], ended: Sequence[bool]) -> np.ndarray:
        """Compute the rewards of captions.

        Args:
            images: (B,) number of each caption's image.
            captions: B captions as plain text.
            ended: whether each caption reached its end token; one that did not was cut.

        Returns:
            (B,) rewards, float64.
        """
        return self.total(self.scores(images, captions, ended))

    def total(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Return the rewards (B,) that the scores of `scores` add up to."""
        rewards = scores["CIDEr"]
        for name, values in scores.items():
            if name != "CIDEr":
                rewards = rewards + self.weights[name] * values
        return rewards

    def scores(self, images: np.ndarray, captions: Sequence[str], ended: Sequence[bool]) -> dict[str, np.ndarray]:
        """Compute the scores that have a weight, by name: each (B,), without the weight. See `__call__`."""
        plain = [tokenize_caption(text) for text in captions]
        counts = self.grams.count([text + (END if end else "") for text, end in zip(plain, ended, strict=True)])
        scores: dict[str, Any] = {"CIDEr": self.cider.score_counts(images, counts)}
        if self.weights["BLEU"]:
            scores["BLEU"] = bleu(bleu_statistics(self.index, images, counts))[:, -1]
        if self.weights["METEOR"]:
            pairs = zip(images.tolist(), plain, strict=True)
            scores["METEOR"] = np.array([quick_meteor(Words(text), self.texts[image]) for image, text in pairs])
        if self.weights["objects"] and self.vocabulary is not None:
            pairs = zip(images.tolist(), captions, strict=True)
            find = self.vocabulary.find
            scores["objects"] = np.array([object_score(find(text), self.shares[image]) for image, text in pairs])
        return scores


def mention_shares(references: Sequence[str], vocabulary: TagVocabulary) -> dict[int, float]:
    """Return the share of the references that mention each tag; tags that none mentions are left out."""
    shares: dict[int, float] = {}
    for text in references:
        for tag in vocabulary.find(text):
            shares[tag] = shares.get(tag, 0.0) + 1 / len(references)
    return shares


def object_score(named: Sequence[int], shares: dict[int, float]) -> float:
    """Return the F1 of the objects that a caption names, 0 to 1.

    Precision is the share of them that some reference names: one minus CHAIR-i (Rohrbach et al., 2018,
    https://arxiv.org/abs/1809.02156) with references in place of labels. Recall weights each object by the share of
    references that name it. A caption without objects has the score 1 if no reference names one, else 0.

    Args:
        named: numbers of the objects that the caption names, each once.
        shares: share of the references that name each object.
    """
    if not named or not shares:
        return float(not named and not shares)
    right = [tag for tag in named if tag in shares]
    precision, recall = len(right) / len(named), sum(shares[tag] for tag in right) / sum(shares.values())
    return 2 * precision * recall / (precision + recall) if right else 0.0
