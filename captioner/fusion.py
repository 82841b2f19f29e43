"""How a text decoder is given the prefix: one class for each way, one registry.

The prefix is what the decoder knows before the text: the projected image tokens.

Letters: B texts, P prefix tokens, E decoder width, T text tokens.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
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
        return self.decoder.get_input_embeddings().embedding_dim

    def arrange(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Arrange the prefix and the words' embeddings as one sequence, (B, P+T, E)."""
        text = self.decoder.get_input_embeddings()(input_ids)  # (B, T, E)
        return {
            "inputs_embeds": torch.cat([prefix.to(text.dtype), text], 1),  # (B, P+T, E)
            "attention_mask": torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], 1),
        }


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
