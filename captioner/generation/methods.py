"""The methods of a captioner that generate texts, and that tell how probable a text is.

Letters: B images, K texts about each, M image tokens, D encoder width, T text tokens, T0 of them in the prompt,
V vocabulary, N text positions whose logits are computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from captioner.fusion import Fusion
from captioner.generation.call import generate_texts
from captioner.generation.prompts import Prompts, split_prompts
from captioner.grids import Grid
from captioner.labels import label_generated, put_before, split_targets, token_loss
from captioner.tag_head import TagConfig


class CaptionGeneration:
    """Part of `CaptionerModel`; the attributes and methods declared here are that model's."""

    generation_config: GenerationConfig
    tags: TagConfig | None
    read_image: Callable[..., torch.Tensor]
    prefix: Callable[..., torch.Tensor]
    pick_tags: Callable[[torch.Tensor], list[list[int]]]
    logits_at: Callable[..., torch.Tensor]

    @property
    def fusion(self) -> Fusion:
        """The way in which the decoder reads the prefix."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        grid: Grid | None = None,
        generation_config: GenerationConfig | None = None,
        tags: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue a text about each image.

        Args:
            pixel_values: images (B, 3, H, W).
            input_ids: start token and prompt of each text (B, T0), as the processor makes them; the start token alone
                if absent.
            attention_mask: 0 where a prompt is padded on its left (B, T0).
            image_tokens: encoded images (B, M, D), in place of pixels.
            grid: compressed grid of the image tokens; `None` for the configured one.
            generation_config: settings that replace single settings of the model.
            tags: numbers of the tags of each image, whose words the decoder reads first; `None` for those that
                `pick_tags` returns. Words that stand before the start token of `input_ids` take their place.
            kwargs: settings of transformers' `generate`, such as `num_beams`, `max_new_tokens`, `do_sample`,
                `streamer`, `num_return_sequences` or `return_dict_in_generate`. They replace those of
                `generation_config`. A `max_length` counts the tokens of the prompt and the new ones, not the image's.

        Returns:
            Texts (B * num_return_sequences, T) as in transformers: start token, prompt, new tokens, end token, and
            padding on the right; without words of tags. With `return_dict_in_generate`, an output that has these as
            `sequences`.

        Raises:
            ValueError: there is no image, prompts or tags do not match the images, there is no such tag, or the decoder
                has no room for the text.
        """
        image_tokens = self.read_image(pixel_values, image_tokens, grid)
        prompts = self.read_prompts(image_tokens, input_ids, attention_mask, tags)
        settings = (self.generation_config, generation_config, kwargs)
        return generate_texts(self.fusion, self.prefix(None, image_tokens), prompts, *settings)[0]

    @torch.no_grad()
    def generate_with_log_probability(
        self,
        image_tokens: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tags: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Continue a text about each image, as `generate` does, and return the log-probabilities, too.

        Greedy and beam search sum them up during the search. After any other way to generate, such as sampling,
        `log_probability` computes them in one more pass of the decoder.

        Args:
            image_tokens: encoded images (B, M, D).
            input_ids: start token and prompt of each text (B, T0); the start token alone if absent.
            attention_mask: 0 where a prompt is padded on its left (B, T0).
            tags: numbers of the tags of each image; see `generate`.
            kwargs: settings of transformers' `generate`.

        Returns:
            Texts (B * num_return_sequences, T), those of an image in a row, best first in a beam search; and their
            log-probabilities (B * num_return_sequences,), float32.

        Raises:
            ValueError: as `generate`.
        """
        prompts = self.read_prompts(self.read_image(None, image_tokens), input_ids, attention_mask, tags)
        prefix, settings = self.prefix(None, image_tokens), (self.generation_config, None, kwargs)
        texts, logprobs = generate_texts(self.fusion, prefix, prompts, *settings, logprob=True)
        if logprobs is None:
            logprobs = self.log_probability(texts, image_tokens, input_ids, attention_mask, tags)
        return texts, logprobs

    @torch.no_grad()
    def log_probability(
        self,
        sequences: torch.Tensor,
        image_tokens: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tags: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """Return the log-probability of generated texts under the model, end token included.

        Args:
            sequences: texts that `generate` returned (B*K, T).
            image_tokens: the image tokens (B, M, D) of these texts.
            input_ids: the prompts in that call of `generate` (B, T0); the start token alone if absent.
            attention_mask: the mask of these prompts (B, T0).
            tags: the tags in that call.

        Returns:
            One natural logarithm for each text (B*K,), float32, of its probability after the prompt.
        """
        count = len(sequences) // len(image_tokens)
        input_ids = sequences[::count, :1] if input_ids is None else input_ids
        prompts = self.read_prompts(image_tokens, input_ids, attention_mask, tags)
        mask = None if prompts.attention_mask.all() else prompts.attention_mask
        text = label_generated(sequences, prompts.input_ids.shape[1], self.generation_config.eos_token_id, mask)
        text = put_before(text, [words for words in prompts.before or () for _ in range(count)])
        inputs, targets = split_targets(text)
        positions = inputs["positions"]
        logits = self.logits_at(None, inputs["input_ids"], inputs["attention_mask"], positions, image_tokens)  # (N, V)
        logprobs = -token_loss(logits, targets, reduction="none")  # (N,)
        return logprobs.new_zeros(positions.shape).masked_scatter(positions, logprobs).sum(1)

    def read_prompts(
        self,
        image_tokens: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        tags: Sequence[Sequence[int]] | None,
    ) -> Prompts:
        """Return prompts, and the words of tags before them; for the arguments and errors see `generate`."""
        start, count = self.generation_config.bos_token_id, len(image_tokens)
        if input_ids is None:
            if start is None:
                raise ValueError("no text: give input_ids, because generation_config has no bos_token_id to start with")
            input_ids = torch.full((count, 1), start, device=image_tokens.device)
        prompts = split_prompts(input_ids, attention_mask, start)
        if prompts.before is not None:
            if tags is not None:
                raise ValueError("input_ids have words before the start token, and tags are given, too")
            return prompts
        if tags is None:
            tags = self.pick_tags(image_tokens)
        if len(tags) != count:
            raise ValueError(f"{len(tags)} lists of tags for {count} images; give one for each")
        if self.tags is None and any(tags):
            raise ValueError("this captioner has no tags")
        return prompts._replace(before=[[] if self.tags is None else self.tags.words_of(group) for group in tags])
