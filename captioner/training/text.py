"""Sentences without images, and the tags that their own words mention: what a decoder learns language from.

Letters: N sentences of a batch, T text tokens.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from captioner.data.stream import SeededStream
from captioner.grids import Grid
from captioner.labels import put_before
from captioner.processing import CaptionerProcessor
from captioner.tags import TagVocabulary
from captioner.training.config import InputConfig

CHUNK = 50
"""Steps whose sentences are sorted by length together."""


class TagWords:
    """The tokens of tags as the decoder reads them before a text, some of them left out.

    Args:
        vocabulary: the tags; `None` for a model without tags.
        processor: the model's processor, which encodes the names of tags.
        config: which tags are left out in training.
    """

    def __init__(self, vocabulary: TagVocabulary | None, processor: CaptionerProcessor, config: InputConfig):
        self.vocabulary, self.config = vocabulary, config
        self.ids: list[list[int]] = [] if vocabulary is None else processor.tag_ids(vocabulary.names)

    def of(self, sentence: str) -> list[int]:
        """Return the numbers of the tags that a sentence mentions, in order of their first mention."""
        return [] if self.vocabulary is None else self.vocabulary.find(sentence)

    def drop(self, tags: Sequence[int], random: np.random.Generator) -> list[int]:
        """Leave out tags as the settings say, and put the others into a random order."""
        if not tags or random.random() < self.config.tag_dropout:
            return []
        share = random.uniform(0, self.config.single_tag_dropout)
        left = [tag for tag in tags if random.random() >= share]
        return [left[place] for place in random.permutation(len(left))]

    def tokens(self, tags: Sequence[int]) -> list[int]:
        """Return the tokens of tags, one tag after the other."""
        return [token for tag in tags for token in self.ids[tag]]


class TextStream(SeededStream):
    """An endless stream of sentences after their own tags; the sentences of a step have similar lengths.

    Each epoch has the sentences in a new order. If they do not fill the last step of the epoch, the rest is left out of
    it; each epoch leaves out others.

    Args:
        sentences: the sentences.
        processor: the model's processor.
        tags: the tags of the sentences.
        seed: decides the order, the tags and the grids.
        grids: compressed grids, of which each optimiser step draws one; without any, the model's own.
        per_step: sentences of an optimiser step, over all processes.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        processor: CaptionerProcessor,
        tags: TagWords,
        seed: int,
        grids: Sequence[Grid] = (),
        per_step: int = 1,
    ):
        size = max(1, len(sentences) // per_step) * per_step
        super().__init__(size, seed, grids, per_step)
        self.sentences, self.tags = sentences, tags
        self.texts = processor.texts(sentences)
        self.texts.warn_cut(processor.max_length)

    @lru_cache(maxsize=2)  # noqa: B019 - a stream lives as long as the run
    def order(self, epoch: int) -> np.ndarray:
        """Return the numbers of the sentences in an epoch, in order (size,)."""
        random, step = np.random.default_rng((self.seed, epoch)), self.per_step
        count = len(self.sentences)
        repeats = [random.permutation(count) for _ in range(-(-self.size // count))]  # several if a step takes more
        numbers = np.concatenate(repeats)[: self.size]
        for start in range(0, self.size, CHUNK * step):
            chunk = numbers[start : start + CHUNK * step]
            steps = chunk[self.texts.lengths[chunk].argsort(kind="stable")].reshape(-1, step)
            numbers[start : start + CHUNK * step] = steps[random.permutation(len(steps))].ravel()
        return numbers

    def load(self, number: int, i: int) -> dict:
        """Return sentence `number` and the tokens of some of its tags."""
        tags = self.tags.drop(self.tags.of(self.sentences[number]), self.generator(i))
        return {"text": number, "before": self.tags.tokens(tags)}

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor | Grid]:
        """Batch N items: the tensors of `Texts.batch` (N, T) with tags before the texts, and the step's `grid`."""
        texts = put_before(self.texts.batch([item["text"] for item in items]), [item["before"] for item in items])
        grid = self.grid(items)
        return texts | ({"grid": grid} if grid else {})
