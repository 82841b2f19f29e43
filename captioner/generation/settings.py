"""The settings of one call of `CaptionerModel.generate`: merged, checked, and as a search uses them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from captioner.errors import SettingError
from captioner.fusion import Fusion


def merge_settings(
    own: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any], prompt_length: int
) -> dict[str, Any]:
    """Merge the settings of one call with those of the model.

    Args:
        own: settings of the model.
        given: settings that replace single settings of the model.
        kwargs: settings that replace both. A `max_length` here or in `given` counts the tokens of prompt and new text;
            transformers would count the image tokens, too.
        prompt_length: tokens of the prompt.

    Returns:
        Keyword arguments of transformers' `generate`.
    """
    call = ({} if given is None else given.to_diff_dict()) | kwargs
    settings = own.to_diff_dict() | call
    settings.pop("transformers_version", None)
    if call.get("max_length") is not None and call.get("max_new_tokens") is None:
        settings["max_new_tokens"] = max(1, call["max_length"] - prompt_length)
    if settings.get("max_new_tokens") is not None:
        settings.pop("max_length", None)  # transformers warns if both are set
    return settings


def check_room(fusion: Fusion, prefix_tokens: int, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a text that needs more positions than the decoder has.

    Raises:
        SettingError: the text needs more.
    """
    room = getattr(fusion.decoder.config, "max_position_embeddings", None)
    needed = fusion.positions(prefix_tokens, prompt_tokens + new_tokens)
    if room is not None and needed > room:
        raise SettingError(
            f"the decoder has room for {room} tokens; image, prompt and {new_tokens} new tokens need {needed}",
            "max_new_tokens",
        )


def count_prompt(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with which a penalty of repetition counts every token of prompts that are not padded.

    transformers would leave out as many tokens as the mask has padding, which here stands before words of tags.
    """
    penalty = settings.get("repetition_penalty")
    if penalty in (None, 1.0):
        return settings
    processors = [RepetitionPenaltyLogitsProcessor(penalty), *(settings.get("logits_processor") or ())]
    return settings | {"repetition_penalty": None, "logits_processor": LogitsProcessorList(processors)}


@dataclass
class SearchSettings:
    """The settings of a search, as transformers prepares them."""

    config: GenerationConfig
    processors: LogitsProcessorList
    prompt_length: int
    end: torch.Tensor
    """The end tokens; there may be none."""
    fill: int
    """The token that follows the end of a text."""

    @classmethod
    def capture(
        cls,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> "SearchSettings":
        """Take the settings that `generate(custom_generate=SearchSettings.capture)` has checked and merged."""
        for processor in logits_processor:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processor.prompt_ignore_length = None  # of the mask's padding, which may stand before words of tags
        end, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
        fill = pad
        if generation_config.num_beams > 1:  # transformers' beam search takes a pad token 0 for a missing one
            fill = (pad or end[0]) if end is not None else -1
        end = torch.tensor([], dtype=torch.long) if end is None else end
        fill = 0 if fill is None else int(fill)
        return cls(generation_config, logits_processor, input_ids.shape[1], end.to(input_ids.device), fill)
