"""How a text decoder is given the prefix: one class for each way, one registry.

The prefix is what the decoder knows before the text: the projected image tokens.

Letters: B texts, P prefix tokens, E decoder width, T text tokens.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from captioner.errors import SettingError


class Fusion(ABC):
    """One way to give a text decoder the prefix.

    A new way is a subclass and an entry in `FUSIONS`; nothing else asks which one a model has.

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
        """Switch on what this fusion needs in the configuration of a decoder.

        Raises:
            SettingError: the decoder does not have it.
        """

    @staticmethod
    @abstractmethod
    def positions(prefix_tokens: int, text_tokens: int) -> int:
        """Count the decoder positions that a prefix and a text take."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width E of the prefix that the decoder takes."""

    @abstractmethod
    def arrange(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Arrange a prefix (B, P, E) and a text for each (B, T) as the decoder's arguments.

        The decoder then gives its logits for the text at its last T positions.
        """


class PrefixFusion(Fusion):
    """The prefix stands before the text; every causal language model can read it."""

    shares_prefix = True

    @staticmethod
    def configure(text_config: PretrainedConfig) -> None:
        """Change nothing: no decoder lacks anything."""

    @staticmethod
    def positions(prefix_tokens: int, text_tokens: int) -> int:
        """Count the decoder positions: the prefix takes some of them."""
        return prefix_tokens + text_tokens

    @property
    def width(self) -> int:
        """Width of the word embeddings; that of the layers may be another, as in OPT-350m."""
        return cast(nn.Embedding, self.decoder.get_input_embeddings()).embedding_dim

    def arrange(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Arrange the prefix and the words' embeddings as one sequence, (B, P+T, E)."""
        text = self.decoder.get_input_embeddings()(input_ids)  # (B, T, E)
        embeds = torch.cat([prefix.to(text.dtype), text], 1)  # (B, P+T, E)
        mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], 1)  # (B, P+T)
        if not attention_mask[:, 0].all():
            order = padding_first(attention_mask, prefix.shape[1])
            embeds = embeds.gather(1, order[..., None].expand_as(embeds))
            mask = mask.gather(1, order)
        return {"inputs_embeds": embeds, "attention_mask": mask}


def padding_first(attention_mask: torch.Tensor, prefix_tokens: int) -> torch.Tensor:
    """Return the order that moves the prefix between a text and the padding on its left, (B, P+T).

    Padding between prefix and text would shorten how far a sliding window sees.

    Args:
        attention_mask: of the texts (B, T).
        prefix_tokens: tokens of the prefix, P, which stand before padding and text.
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
        """Count the decoder positions: only the text takes any."""
        return text_tokens

    @property
    def width(self) -> int:
        """Width of the decoder's layers."""
        return self.decoder.config.hidden_size

    def arrange(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Pass the prefix as what the layers attend to."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "encoder_hidden_states": prefix}


FUSIONS: dict[str, type[Fusion]] = {"prefix": PrefixFusion, "cross_attention": CrossAttentionFusion}
"""The ways to fuse, by the name that configurations use."""
