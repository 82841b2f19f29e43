"""Fusion: the ways in which a text decoder reads the prefix. Each is a class in one registry.

The prefix is the decoder's input before the text: the projected image tokens.

Letters: B texts, P prefix tokens, E decoder width, T text tokens.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from captioner.errors import SettingError


class Fusion(ABC):
    """One way in which a text decoder reads the prefix.

    A new way is a subclass and an entry in `FUSIONS`; no other code depends on which one a model has.

    Args:
        decoder: any causal language model of transformers.
    """

    shares_prefix: ClassVar[bool]
    """Whether several texts about one image can share one pass of the decoder over the prefix."""

    def __init__(self, decoder: PreTrainedModel):
        self.decoder = decoder

    @staticmethod
    @abstractmethod
    def configure(text_config: PretrainedConfig) -> None:
        """Change the configuration of a decoder as this fusion needs it.

        Raises:
            SettingError: the decoder does not support the fusion.
        """

    @staticmethod
    @abstractmethod
    def positions(prefix_tokens: int, text_tokens: int) -> int:
        """Return the number of decoder positions that a prefix and a text take."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width E of the prefix that the decoder takes."""

    @abstractmethod
    def arrange(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the decoder's arguments for prefixes and texts; its last T positions are those of the text.

        Args:
            prefix: prefixes (B, P, E).
            input_ids: a text for each prefix (B, T).
            attention_mask: 1 for text, 0 for padding (B, T).
        """


class PrefixFusion(Fusion):
    """The prefix comes before the text, in one sequence; every causal language model supports it."""

    shares_prefix = True

    @staticmethod
    def configure(text_config: PretrainedConfig) -> None:
        """Do nothing: every decoder supports it."""

    @staticmethod
    def positions(prefix_tokens: int, text_tokens: int) -> int:
        """Return the number of decoder positions: those of the prefix and those of the text."""
        return prefix_tokens + text_tokens

    @property
    def width(self) -> int:
        """Width E of the word embeddings; the width of the layers may differ, as in OPT-350m."""
        return cast(nn.Embedding, self.decoder.get_input_embeddings()).embedding_dim

    def arrange(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the prefix and the embeddings of the text as one sequence, (B, P+T, E)."""
        text = self.decoder.get_input_embeddings()(input_ids)  # (B, T, E)
        embeds = torch.cat([prefix.to(text.dtype), text], 1)  # (B, P+T, E)
        mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], 1)  # (B, P+T)
        if not attention_mask[:, 0].all():
            order = padding_first(attention_mask, prefix.shape[1])
            embeds = embeds.gather(1, order[..., None].expand_as(embeds))
            mask = mask.gather(1, order)
        return {"inputs_embeds": embeds, "attention_mask": mask}


def padding_first(attention_mask: torch.Tensor, prefix_tokens: int) -> torch.Tensor:
    """Return the order of positions (B, P+T) that puts the prefix between a text and the padding on its left.

    If padding stood between prefix and text, fewer tokens would be inside the window of sliding attention.

    Args:
        attention_mask: mask of the texts (B, T).
        prefix_tokens: P, the tokens of the prefix, which come before padding and text.
    """
    padding = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
    places = torch.arange(prefix_tokens + attention_mask.shape[1], device=attention_mask.device)[None]  # (1, P+T)
    moved = torch.where(places < padding, places + prefix_tokens, places - padding)
    return torch.where(places < padding + prefix_tokens, moved, places)


class CrossAttentionFusion(Fusion):
    """Every decoder layer attends to the prefix; the decoder must have cross-attention, as GPT-2 has."""

    shares_prefix = False

    @staticmethod
    def configure(text_config: PretrainedConfig) -> None:
        """Switch on cross-attention.

        Raises:
            SettingError: the decoder has none.
        """
        if not hasattr(text_config, "add_cross_attention"):
            raise SettingError(
                f"a {text_config.model_type} decoder has no cross-attention; use prefix fusion", "fusion"
            )
        text_config.add_cross_attention = True

    @staticmethod
    def positions(prefix_tokens: int, text_tokens: int) -> int:
        """Return the number of decoder positions: those of the text alone."""
        return text_tokens

    @property
    def width(self) -> int:
        """Width E of the decoder's layers."""
        return self.decoder.config.hidden_size

    def arrange(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the prefix as the states that the layers attend to."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "encoder_hidden_states": prefix}


FUSIONS: dict[str, type[Fusion]] = {"prefix": PrefixFusion, "cross_attention": CrossAttentionFusion}
"""The fusions, by their names in configurations."""
