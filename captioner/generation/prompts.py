"""The texts that a decoder continues: prompts, and the words of tags that it reads before them.

A text is `[words of tags] <start> [prompt] new tokens <end>`. The words of tags are read and not returned.

Letters: B images, T0 tokens of the longest prompt, W tokens of the longest prompt with its tags.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

Words = Sequence[Sequence[int]]
"""For each text, the tokens that are read before its start token."""


class Prompts(NamedTuple):
    """Prompts of texts, one for each image, and what is read before them."""

    input_ids: torch.Tensor
    """Start token and prompt (B, T0), padded on the left."""
    attention_mask: torch.Tensor
    """0 for padding (B, T0)."""
    before: Words | None = None
    """Words of tags; `None` where the prompts came without any."""

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the decoder reads, words of tags included, and its mask, each (B, W), padded on the left."""
        most = max(map(len, self.before or ()), default=0)
        if not most:
            return self.input_ids, self.attention_mask
        rows = []
        for ids, mask, words in zip(self.input_ids, self.attention_mask, self.before or (), strict=True):
            rows.append(torch.cat([ids.new_tensor(words, dtype=ids.dtype), ids[mask.bool()]]))
        width = max(map(len, rows))
        read, mask = self.input_ids.new_zeros(len(rows), width), self.attention_mask.new_zeros(len(rows), width)
        for number, row in enumerate(rows):
            read[number, width - len(row) :] = row
            mask[number, width - len(row) :] = 1
        return read, mask


def split_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, start: int | None) -> Prompts:
    """Split texts into prompts, and the words of tags that stand before the start token of each.

    Args:
        input_ids: texts (B, T), as the processor makes them.
        attention_mask: 0 for padding (B, T).
        start: the start token.

    Returns:
        The prompts. Those of texts that all begin with their start token, or of which one has none, are unchanged.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    starts = (input_ids == (-1 if start is None else start)) & mask.bool()
    first, begin = starts.int().argmax(1), mask.int().argmax(1)
    if not len(input_ids) or not starts.any(1).all() or bool((first == begin).all()):
        return Prompts(input_ids, mask)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    prompt = mask.bool() & (places >= first[:, None])
    words = mask.bool() & (places < first[:, None])
    before = [ids[own].tolist() for ids, own in zip(input_ids, words, strict=True)]
    cut = int(first.min())
    return Prompts((input_ids * prompt)[:, cut:], prompt[:, cut:].to(mask.dtype), before)
