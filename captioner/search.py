"""Find captions of a batch of images: the best by beam search, or random ones by sampling; and their confidence.

Letters: B images, K captions of each, M image tokens, D encoder width, T0 tokens of the prompt, T text tokens,
V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from captioner.errors import SettingError
from captioner.image_tags import ImageTag, TagChoice, make_choice
from captioner.labels import IGNORED, label_generated, next_labels
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.runs.digests import digest_text

COUNTS = ("batch_size", "num_beams", "max_new_tokens", "captions")
"""Options of captioning that must be whole numbers above 0."""

REFUSED = {
    "num_return_sequences": "captions sets the number of captions of an image",
    "return_dict_in_generate": "captioning returns captions",
    "max_length": "max_new_tokens limits the length of a caption",
    "pixel_values": "captioning takes images",
    "image_tokens": "captioning takes images",
    "input_ids": "every caption starts with the captioner's own prompt",
    "attention_mask": "every caption starts with the captioner's own prompt",
}
"""Options of transformers' `generate` that captioning refuses, and why."""

WARPERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "temperature": lambda value: TemperatureLogitsWarper(float(value)),
    "top_k": TopKLogitsWarper,
    "top_p": lambda value: TopPLogitsWarper(float(value)),
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
}
"""Settings of transformers' `generate` that change the distribution of sampling, in the order in which they apply."""

NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0}
"""Values of these settings that have no effect."""


@dataclass
class Candidate:
    """One of the captions of an image.

    Attributes:
        caption: the text.
        logprob: its log-probability under the model, a natural logarithm, summed over its tokens.
        confidence: the geometric mean of its tokens' probabilities, from 0 to 1. It does not fall with the length.
    """

    caption: str
    logprob: float | None = None
    confidence: float | None = None


@dataclass
class Findings:
    """What was found for one image.

    Attributes:
        candidates: the captions, best first.
        tags: the tags that the decoder read; or those that were predicted, if it read none.
    """

    candidates: list[Candidate]
    tags: list[ImageTag]


@dataclass(frozen=True)
class Search:
    """Settings of a search for captions.

    Attributes:
        captions: captions of each image, K.
        prompt: text that every caption starts with; it is part of the captions. If it is empty, the processor's own
            prompt is continued, which is not part of the captions.
        seed: seed of the random numbers of sampling.
        min_confidence: least confidence of a caption; captions below are withheld.
        tags: which tags of an image the decoder reads.
        generation: settings of transformers' `generate`. With `do_sample` tokens are drawn at random.
    """

    captions: int = 1
    prompt: str = ""
    seed: int = 0
    min_confidence: float = 0.0
    tags: TagChoice = field(default_factory=TagChoice)
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise SettingError(
                f"min_confidence is a probability between 0 and 1, not {self.min_confidence}", "min_confidence"
            )

    def resolve(self, model: CaptionerModel) -> dict[str, Any]:
        """Merge the settings of generation with the model's own, and find the number of beams.

        Raises:
            SettingError: there are fewer beams than captions, beams are set for sampling, or the model lacks tags.
        """
        self.tags.check(model)
        own = {k: v for k, v in model.generation_config.to_diff_dict().items() if k != "transformers_version"}
        settings = own | {name: value for name, value in self.generation.items() if value is not None}
        beams = self.generation.get("num_beams")
        if settings.get("do_sample"):
            if (beams or 1) > 1:
                raise SettingError("sampling draws one token after the other and has no beams", "num_beams", "sample")
            check_warpers(settings)
            return settings | {"num_beams": 1}
        if beams is not None and beams < self.captions:
            raise SettingError(
                f"{self.captions} captions of each image need as many beams, not {beams}", "num_beams", "captions"
            )
        return settings | {"num_beams": max(settings.get("num_beams") or 1, self.captions)}

    def needs_logprob(self, model: CaptionerModel) -> bool:
        """Return whether captions are chosen or ordered by their confidence."""
        drawn = self.captions > 1 and bool(self.resolve(model).get("do_sample"))
        return drawn or self.min_confidence > 0

    def run(
        self,
        model: CaptionerModel,
        processor: CaptionerProcessor,
        image_tokens: torch.Tensor,
        names: Sequence[str],
        logprob: bool,
    ) -> list[Findings]:
        """Search for captions of encoded images.

        Args:
            model: the captioner model.
            processor: its processor.
            image_tokens: image tokens (B, M, D).
            names: a name for each image. The captions drawn for an image depend only on its name and the seed, so they
                are the same in any batch and after any interruption.
            logprob: whether to compute log-probabilities and confidences; sampling needs one more pass of the decoder.

        Returns:
            K captions of each image, best first: by the search's own score of beams, or by confidence if they are
            drawn. Drawn captions without log-probabilities are in the order in which they were drawn. And its tags.

        Raises:
            SettingError: see `resolve`; or the decoder has no room for prompt and caption.
        """
        settings, count = self.resolve(model), self.captions
        ids = processor.prompt_ids(self.prompt.strip())
        prompts = torch.tensor([ids], device=image_tokens.device).expand(len(image_tokens), -1)  # (B, T0)
        options, repeats = dict(self.generation), 1
        tags, shown = self.tags.choose(model, image_tokens)
        if settings.get("do_sample"):
            rows = [(name, number) for name in names for number in range(count)]
            options = {name: value for name, value in options.items() if name not in WARPERS}
            options |= {
                name: None for name in WARPERS if name in settings
            }  # the model's own, for which transformers would warn
            options |= {"do_sample": False, "num_beams": 1}
            options["logits_processor"] = LogitsProcessorList([*make_warpers(settings), SeededNoise(self.seed, rows)])
            repeats = count
        else:
            options["num_beams"] = settings["num_beams"]
            if count > 1:
                options["num_return_sequences"] = count
        values = None
        if logprob and not settings.get("do_sample"):
            mask = torch.ones_like(prompts)
            sequences, values = model.generate_with_log_probability(image_tokens, prompts, mask, tags, **options)
        else:
            input_ids = prompts.repeat_interleave(repeats, 0)
            sequences = model.generate(
                image_tokens=image_tokens.repeat_interleave(repeats, 0),
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                tags=[group for group in tags for _ in range(repeats)],
                **options,
            )  # (B*K, T)
            if logprob:
                values = model.log_probability(sequences, image_tokens, prompts, tags=tags)
        texts = processor.captions(sequences, 1 if self.prompt.strip() else len(ids))
        found = [Candidate(text) for text in texts]
        if values is not None:
            labels = label_generated(sequences, len(ids), model.generation_config.eos_token_id)["labels"]
            lengths = (next_labels(labels) != IGNORED).sum(1).clamp(min=1)
            for candidate, value, mean in zip(found, values.tolist(), (values / lengths).exp().tolist(), strict=True):
                candidate.logprob, candidate.confidence = round(value, 4), round(mean, 4)
        groups = [found[start : start + count] for start in range(0, len(found), count)]
        if settings.get("do_sample") and logprob:
            groups = [sorted(group, key=lambda one: -(one.confidence or 0)) for group in groups]
        return [Findings(group, own) for group, own in zip(groups, shown, strict=True)]


def make_search(
    captions: int = 1,
    prompt: str | None = None,
    seed: int | None = None,
    min_confidence: float = 0.0,
    tags: int | Sequence[str] | None = None,
    min_tag: float | None = None,
    **generation: Any,
) -> Search:
    """Check the options of captioning and return them as a `Search`.

    Args:
        captions: captions of each image, best first.
        prompt: text that the captions start with; without it, the processor's own is continued.
        seed: seed of sampling; `None` draws a seed from torch's random numbers.
        min_confidence: least confidence of a caption, the geometric mean of its tokens' probabilities, from 0 to 1. An
            image without such a caption gets an error.
        tags: largest number of object tags that the model predicts in an image and reads before the caption, 0 for
            none; or names of its tags, which it reads for every image. `None` for the model's own number.
        min_tag: least probability of a predicted tag; `None` for the model's own.
        generation: settings of transformers' `generate`, such as `num_beams`; `do_sample=True` draws captions.

    Raises:
        ValueError: an option has a wrong value, or does not fit captioning.
    """
    generation = {name: value for name, value in generation.items() if value is not None}
    for name, value in generation.items():
        if name in COUNTS:
            generation[name] = check_count(name, value)
        if name in REFUSED:
            raise ValueError(f"{REFUSED[name]}; leave {name} out")
    if seed is None:
        seed = int(torch.randint(2**62, ())) if generation.get("do_sample") else 0
    confidence = float(min_confidence)
    if math.isnan(confidence):
        raise SettingError("min_confidence is a probability, not nan", "min_confidence")
    choice = make_choice(tags, min_tag)
    return Search(check_count("captions", captions), prompt or "", index(seed), confidence, choice, generation)


def check_count(name: str, value: Any) -> int:
    """Return a whole number above 0 as an int; integers of numpy are accepted.

    Raises:
        SettingError: the value is not a whole number above 0.
    """
    try:
        count = 0 if isinstance(value, bool) else index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise SettingError(f"{name} must be a whole number above 0, not {value!r}", name)
    return count


def check_warpers(settings: dict[str, Any]) -> None:
    """Refuse settings of sampling that transformers does not accept.

    Raises:
        SettingError: a setting is not accepted; the message names the first one.
    """
    for name in WARPERS:
        try:
            make_warpers({name: settings.get(name)})
        except (ValueError, TypeError):
            raise SettingError(f"{name} cannot be {settings[name]!r}", name) from None
    if settings.get("eta_cutoff"):
        raise SettingError("eta_cutoff does not work with seeded sampling; use epsilon_cutoff", "eta_cutoff")


def make_warpers(settings: dict[str, Any]) -> list[LogitsProcessor]:
    """Return the processors that change the distribution before a token is drawn."""
    return [make(settings[name]) for name, make in WARPERS.items() if settings.get(name) not in (None, NEUTRAL[name])]


class SeededNoise(LogitsProcessor):
    """Add Gumbel noise to logits: the largest sum is then a draw from their distribution (the Gumbel-max trick).

    Greedy search with this noise is sampling. Unlike the random numbers of `torch.multinomial`, those of a row do not
    depend on the other rows. Source: Maddison et al., "A* Sampling", 2014, section 2.

    Args:
        seed: seed of all rows.
        rows: an image's name and the number of the caption, for each row.
    """

    def __init__(self, seed: int, rows: Sequence[tuple[str, int]]):
        self.generators = []
        for name, number in rows:
            generator = torch.Generator()
            generator.manual_seed(int(digest_text(f"{seed} {number} {name}")[:15], 16))
            self.generators.append(generator)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return logits (B*K, V) with noise."""
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        gumbel = -noise.clamp(min=torch.finfo(torch.float32).tiny).log()
        return scores.float() + gumbel.to(scores.device)  # type: ignore[return-value]


def describe_search(search: Search, model: CaptionerModel) -> dict[str, Any]:
    """Return all that captions depend on beside the model and the grid, as values of types of JSON."""
    settings = search.resolve(model)
    sampling = bool(settings.get("do_sample"))
    described: dict[str, Any] = {"captions": search.captions, "sample": sampling, "prompt": search.prompt.strip()}
    described["min_confidence"] = search.min_confidence
    if sampling:
        described["seed"] = search.seed
    drop = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample"} | (set() if sampling else set(WARPERS))
    described |= {name: value for name, value in sorted(settings.items()) if name not in drop and value is not None}
    plain = {name: value if is_plain(value) else repr(value) for name, value in described.items()}
    return plain | search.tags.describe(model)


def is_plain(value: Any) -> bool:
    """Return whether JSON preserves a value."""
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
