"""One call of `CaptionerModel.generate`: its settings, and who searches.

Letters: B images, P prefix tokens, E decoder width, T0 prompt tokens, T longest text, R texts returned for an image.
"""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig

from captioner.errors import SettingError
from captioner.fusion import Fusion
from captioner.search import Batch, Search, SearchSettings
from captioner.slot_cache import grows_plainly


def merge_settings(
    own: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any], prompt_length: int
) -> dict[str, Any]:
    """Merge the settings of one call with those of the model.

    Args:
        own: the model's settings.
        given: settings that replace them, one by one.
        kwargs: settings that replace both. A `max_length` here or in `given` counts the tokens of prompt and new text:
            transformers would count those of the image, too.
        prompt_length: tokens of the prompt.
    """
    call = ({} if given is None else given.to_diff_dict()) | kwargs
    settings = own.to_diff_dict() | call
    settings.pop("transformers_version", None)
    if call.get("max_length") is not None and call.get("max_new_tokens") is None:
        settings["max_new_tokens"] = max(1, call["max_length"] - prompt_length)
    if settings.get("max_new_tokens") is not None:
        settings.pop("max_length", None)  # transformers warns of both
    return settings


def check_room(fusion: Fusion, prefix_tokens: int, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a text that is longer than the positions of the decoder.

    Raises:
        SettingError: it is.
    """
    room = getattr(fusion.decoder.config, "max_position_embeddings", None)
    needed = fusion.positions(prefix_tokens, prompt_tokens + new_tokens)
    if room is not None and needed > room:
        raise SettingError(
            f"the decoder has room for {room} tokens; image, prompt and {new_tokens} new tokens need {needed}",
            "max_new_tokens",
        )


FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3")
"""Decoders that our search has been compared with transformers' for, token by token."""

PLAIN = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "max_length", "min_new_tokens", "min_length"),
    *("num_beams", "num_return_sequences", "length_penalty", "early_stopping"),
    *("no_repeat_ngram_size", "repetition_penalty", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("temperature", "top_k", "top_p"),  # of sampling alone
    *("transformers_version", "_from_model_config"),
}
"""Settings that our search knows, whatever their values."""

NEUTRAL = {"use_cache": (None, True), "num_beam_groups": (None, 1)}
"""Values of other settings that change nothing; of those that are not named here, `None` and false."""


def generate_texts(
    fusion: Fusion,
    prefix: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    own: GenerationConfig,
    given: GenerationConfig | None,
    kwargs: dict[str, Any],
    logprob: bool = False,
) -> tuple[Any, torch.Tensor | None]:
    """Continue a text about each image: by our search where it gives the same, else by transformers' `generate`.

    Args:
        fusion: the decoder, and how it is given the prefix.
        prefix: prefix of each image (B, P, E).
        input_ids: start token and prompt of each text (B, T0); the start token alone if absent.
        attention_mask: 0 where a prompt is padded on its left (B, T0).
        own: the model's settings.
        given: settings that replace them, one by one.
        kwargs: settings that replace both, those of transformers' `generate`.
        logprob: whether to return log-probabilities, if our search is the one that runs.

    Returns:
        What transformers' `generate` returns, and the log-probability of each text (B*R,), or `None`.

    Raises:
        ValueError: prompts and images do not match, or the decoder has no room for the text.
    """
    if input_ids is None:
        if own.bos_token_id is None:
            raise ValueError("no text: give input_ids, because generation_config has no bos_token_id to start with")
        input_ids = torch.full((len(prefix), 1), own.bos_token_id, device=prefix.device)
    if len(input_ids) != len(prefix):
        raise ValueError(f"{len(input_ids)} prompts for {len(prefix)} images; give one for each")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    settings = merge_settings(own, given, kwargs, input_ids.shape[1])
    check_room(fusion, prefix.shape[1], input_ids.shape[1], settings.get("max_new_tokens") or 0)
    batch = Batch(prefix, input_ids, attention_mask)
    prepared = prepare_search(fusion, batch, settings)
    if prepared is None:
        inputs = fusion.arrange(*batch)
        return fusion.decoder.generate(**{"input_ids": input_ids, **inputs, **settings}), None
    found = sorted(Search(fusion, prepared, logprob=logprob).run([batch]), key=lambda one: one.number)
    length = max(int(one.lengths.max()) for one in found)
    texts = torch.cat([one.texts for one in found])[:, :length]  # (B*R, T)
    return texts, torch.cat([one.logprobs for one in found]) if logprob else None


def prepare_search(fusion: Fusion, batch: Batch, settings: dict[str, Any]) -> SearchSettings | None:
    """Have transformers check and merge the settings of a search; `None` if our search may not give the same."""
    if not searches(fusion) or not len(batch.prefix):
        return None
    merged = fusion.decoder.generation_config.to_diff_dict() | settings
    if any(name not in PLAIN and value not in NEUTRAL.get(name, (None, False)) for name, value in merged.items()):
        return None
    padded = not batch.attention_mask.all()
    if padded and settings.get("repetition_penalty") not in (None, 1.0):
        return None  # it counts from another place in each prompt
    one = batch.cut(0, 1)
    inputs = {"input_ids": one.input_ids, **fusion.arrange(*one), **settings}
    return fusion.decoder.generate(**inputs, custom_generate=SearchSettings.capture)


def searches(fusion: Fusion) -> bool:
    """Return whether our search has been tried with a decoder like this one."""
    decoder = fusion.decoder
    if decoder.config.model_type not in FAMILIES or decoder.training or not grows_plainly(decoder.config):
        return False
    if any(isinstance(part, FSDPModule) for part in decoder.modules()):
        return False  # processes must take equally many steps
    return decoder.config._attn_implementation in ("sdpa", "eager")  # these take any mask
