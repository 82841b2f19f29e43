"""One step of any text decoder for all texts of a search.

Letters: B images, S of them active, K beams, T tokens, E decoder width, P prefix tokens, V vocabulary, C columns of
the cache.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from captioner.generation.slot_cache import SlotCache, split_cache
from captioner.transformers_versions import cache_name


class DecoderSteps:
    """Steps by the decoder's own `forward`.

    Args:
        decoder: any causal language model that takes positions and a mask for every token.
        slots: slots S of the cache.
        steps: largest number of steps of an image.
        beams: beams K.
    """

    def __init__(self, decoder: PreTrainedModel, slots: int, steps: int, beams: int):
        self.decoder, self.sizes = decoder, (slots, steps, beams)
        self.cache: SlotCache | None = None
        self.cache_name = str(cache_name(decoder))

    def read_prompt(self, inputs: dict[str, Any], positions: torch.Tensor, slot: int) -> torch.Tensor:
        """Read prefix and prompt of some images into as many slots, from `slot` on.

        Args:
            inputs: the decoder's arguments, as a fusion arranges them; without padding, the mask is `None`.
            positions: positions of the tokens (B, T).
            slot: the first slot.

        Returns:
            The logits after the last token, (B, 1, V).
        """
        output = self.decoder(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
        first = output[self.cache_name]
        if self.cache is None:
            self.cache = SlotCache(*split_cache(first), positions.shape[1], *self.sizes)
        self.cache.put(first, slot)
        return output.logits[:, -1:]

    def read_tokens(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, prefix: torch.Tensor | None
    ) -> torch.Tensor:
        """Read the next token of every text; return the logits after it (S, K, V).

        Args:
            tokens: the tokens (S, K).
            positions: their positions (S, K).
            mask: 0 for the columns of a text, minus infinity for all others (S, 1, K, C).
            prefix: the prefix (S, P, E), for a decoder with cross-attention.
        """
        assert self.cache is not None
        inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
        inputs[self.cache_name] = self.cache.as_cache(len(tokens))
        if prefix is not None:
            inputs["encoder_hidden_states"] = prefix
        return self.decoder(**inputs, use_cache=True).logits
