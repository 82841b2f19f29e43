"""One call of `CaptionerModel.generate`: by our search where it returns the same texts, else by transformers.

Letters: B images, P prefix tokens, E decoder width, T0 prompt tokens, T longest text, R texts returned for an image.
"""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig

from captioner.fusion import Fusion
from captioner.generation.beam_search import Batch, BeamSearch
from captioner.generation.prompts import Prompts
from captioner.generation.settings import SearchSettings, check_room, count_prompt, merge_settings
from captioner.generation.slot_cache import grows_plainly

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3")
"""Decoders with which our search was compared with transformers', token by token."""

KNOWN = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "max_length", "min_new_tokens", "min_length"),
    *("num_beams", "num_return_sequences", "length_penalty", "early_stopping"),
    *("no_repeat_ngram_size", "repetition_penalty", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("temperature", "top_k", "top_p"),  # of sampling alone
    *("transformers_version", "_from_model_config"),
}
"""Settings that our search applies, whatever their values."""

NEUTRAL: dict[str, int] = {"use_cache": True, "num_beam_groups": 1}
"""Values with which other settings change nothing; so do `None` for each of them, and false for all others."""


def generate_texts(
    fusion: Fusion,
    prefix: torch.Tensor,
    prompts: Prompts,
    own: GenerationConfig,
    given: GenerationConfig | None,
    kwargs: dict[str, Any],
    logprob: bool = False,
) -> tuple[Any, torch.Tensor | None]:
    """Continue a text about each image.

    Args:
        fusion: the decoder, and the way in which it reads the prefix.
        prefix: prefix of each image (B, P, E).
        prompts: start token and prompt of each text, and the words of tags before them.
        own: settings of the model.
        given: settings that replace single settings of the model.
        kwargs: settings of transformers' `generate` that replace both.
        logprob: whether to return log-probabilities, if our search runs.

    Returns:
        What transformers' `generate` returns; and the log-probability of each text (B*R,), or `None`.

    Raises:
        ValueError: prompts and images do not match, or the decoder has no room for the text.
    """
    if len(prompts.input_ids) != len(prefix):
        raise ValueError(f"{len(prompts.input_ids)} prompts for {len(prefix)} images; give one for each")
    batch = Batch(prefix, prompts.input_ids, prompts.attention_mask, *prompts.read())
    settings = merge_settings(own, given, kwargs, batch.input_ids.shape[1])
    check_room(fusion, prefix.shape[1], batch.read_ids.shape[1], settings.get("max_new_tokens") or 0)
    prepared = prepare_search(fusion, batch, settings)
    if prepared is None:
        inputs = batch.arrange(fusion)
        if batch.read_ids is not batch.input_ids and batch.attention_mask.all():
            settings = count_prompt(settings)
        return fusion.decoder.generate(**{"input_ids": batch.input_ids, **inputs, **settings}), None
    found = sorted(BeamSearch(fusion, prepared, logprob=logprob).run([batch]), key=lambda one: one.number)
    length = max(int(one.lengths.max()) for one in found)
    texts = torch.cat([one.texts for one in found])[:, :length]  # (B*R, T)
    return texts, torch.cat([one.logprobs for one in found]) if logprob else None


def prepare_search(fusion: Fusion, batch: Batch, settings: dict[str, Any]) -> SearchSettings | None:
    """Return the settings of a search, checked and merged by transformers; `None` if its texts might differ."""
    if not supports_search(fusion) or not len(batch.prefix):
        return None
    merged = fusion.decoder.generation_config.to_diff_dict() | settings
    if any(name not in KNOWN and not changes_nothing(name, value) for name, value in merged.items()):
        return None
    padded = not batch.attention_mask.all()
    if padded and settings.get("repetition_penalty") not in (None, 1.0):
        return None  # it counts from another place in each prompt
    one = batch.cut(0, 1)
    inputs = {"input_ids": one.input_ids, **one.arrange(fusion), **settings}
    return fusion.decoder.generate(**inputs, custom_generate=SearchSettings.capture)


def changes_nothing(name: str, value: Any) -> bool:
    """Return whether a setting of transformers' `generate` has no effect."""
    return value is None or (isinstance(value, int | float) and value == NEUTRAL.get(name, False))


def supports_search(fusion: Fusion) -> bool:
    """Return whether our search was tested with a decoder like this one."""
    decoder = fusion.decoder
    if decoder.config.model_type not in FAMILIES or decoder.training or not grows_plainly(decoder.config):
        return False
    if any(isinstance(part, FSDPModule) for part in decoder.modules()):
        return False  # all processes must take the same number of steps
    return decoder.config._attn_implementation in ("sdpa", "eager")  # these take any mask
