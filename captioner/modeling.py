"""The captioner: a frozen encoder, a projector and a causal language model.

Letters: B images, K captions of each, M image tokens, D encoder width, E decoder width, P prefix tokens, T text tokens,
T0 of them in the prompt, V vocabulary, N text positions whose logits are computed.

    pixel_values (B, 3, H, W) -> encoder (frozen) -> image_tokens (B, M, D) -> projector -> prefix (B, P, E) -> decoder

`fusion.py` has the ways in which the decoder reads the prefix; `text_decoder.py` computes the logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

from captioner.configuration import CaptionerConfig
from captioner.encoders import rebuild_encoder, unsaved_buffers
from captioner.fusion import FUSIONS, Fusion
from captioner.generation import generate_texts
from captioner.grids import Grid
from captioner.labels import count_targets, label_generated, next_labels, split_targets, token_loss
from captioner.text_decoder import TextDecoder


class Projector(nn.Module):
    """Maps image tokens (B, M, D) to the decoder's width (B, M, E): a layer norm, then a two-layer perceptron."""

    def __init__(self, encoder_dim: int, decoder_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(encoder_dim)
        self.fc1 = nn.Linear(encoder_dim, decoder_dim)
        self.fc2 = nn.Linear(decoder_dim, decoder_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project tokens (B, M, D) into (B, M, E)."""
        return self.fc2(F.gelu(self.fc1(self.norm(tokens))))


class CaptionerModel(PreTrainedModel, GenerationMixin):
    """A frozen image encoder, a projector and a text decoder, as one model of transformers.

    Every text starts with the start token (the tokenizer's bos, or its eos if it has no bos). For every fusion, the
    logits at position t predict token t + 1 of the text.
    """

    config_class = CaptionerConfig
    base_model_prefix = "captioner"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers declares it so
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CaptionerConfig):
        super().__init__(config)
        with torch.device("cpu"):  # timm computes at construction, which fails on transformers' meta device
            self.encoder = rebuild_encoder(config.encoder_config).freeze()
        self.encoder_constants = unsaved_buffers(self.encoder)  # transformers' loading overwrites them
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        self.projector = Projector(self.encoder.embed_dim, self.fusion.width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the projector and the encoder's unsaved buffers; all other parts initialise themselves."""
        for name, value in self.encoder_constants.get(module, {}).items():
            module.get_buffer(name).copy_(value)
        if isinstance(module, Projector):
            for layer in (module.fc1, module.fc2):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            nn.init.ones_(module.norm.weight)
            nn.init.zeros_(module.norm.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's word embeddings."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's word embeddings."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's language-model head."""
        return self.decoder.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the size of the decoder's vocabulary; see transformers' method of this name."""
        embeddings = self.decoder.resize_token_embeddings(*args, **kwargs)
        self.config.text_config.vocab_size = self.decoder.config.vocab_size
        return embeddings

    @property
    def fusion(self) -> Fusion:
        """The way in which the decoder reads the prefix."""
        return FUSIONS[self.config.fusion](self.decoder)

    @property
    def text_decoder(self) -> TextDecoder:
        """The decoder, which computes the logits of texts about images."""
        return TextDecoder(self.fusion)

    def encode(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) into image tokens (B, M, D), at the given grid or else the configured one."""
        return self.encoder.encode(pixel_values, self.config.grid if grid is None else grid)

    def prefix(
        self,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        grid: Grid | None = None,
    ) -> torch.Tensor:
        """Compute the prefix (B, P, E), the decoder's input before the text.

        Args:
            pixel_values: images (B, 3, H, W).
            image_tokens: image tokens (B, M, D) encoded before, in place of pixels.
            grid: compressed grid of the image tokens; `None` for the configured one.

        Raises:
            ValueError: there is no image, or the tokens have another width than this encoder's.
        """
        if image_tokens is None:
            if pixel_values is None:
                raise ValueError("no image: give pixel_values or image_tokens")
            image_tokens = self.encode(pixel_values, grid)
        if image_tokens.shape[-1] != self.encoder.embed_dim:
            raise ValueError(
                f"image tokens are {image_tokens.shape[-1]} wide, this encoder's are {self.encoder.embed_dim}; "
                "they come from another encoder"
            )
        image_tokens = image_tokens.to(self.projector.fc1.weight.dtype)
        if self.config.blind:
            image_tokens = torch.zeros_like(image_tokens)
        return self.projector(image_tokens)  # (B, P, E); further embeddings of the prefix would be appended here

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        grid: Grid | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Compute the logits at every text position (B*K, T, V), from the image and the text so far.

        Args:
            pixel_values: images (B, 3, H, W).
            input_ids: texts (B*K, T), the K texts about one image in a row; each starts with the start token.
            attention_mask: 1 for text, 0 for padding (B*K, T).
            labels: `input_ids` with -100 (`IGNORED`) for every token that is not learned (B*K, T).
            image_tokens: encoded images (B, M, D), in place of pixels.
            grid: compressed grid of the image tokens; `None` for the configured one.
            num_items_in_batch: number that divides the summed loss, as transformers' `Trainer` gives it; `None` for the
                learned tokens of this call.
            kwargs: further arguments of the decoder, such as `output_hidden_states`.

        Returns:
            The `logits`, and the `loss` if there are labels. On request also the decoder's `hidden_states` and
            `attentions`; these include the positions of a prefix that stands before the text.

        Raises:
            ValueError: there is no text or no image, or the texts do not divide among the images.
        """
        inputs = self.check_inputs(self.prefix(pixel_values, image_tokens, grid), input_ids, attention_mask)
        output = self.text_decoder.output(*inputs, **kwargs)
        logits, loss = output.logits, None
        if labels is not None:
            items = count_targets(labels).clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = token_loss(logits[:, :-1], next_labels(labels)) / items
        return CausalLMOutput(loss, logits, output.get("hidden_states"), output.get("attentions"))

    def logits_at(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        grid: Grid | None = None,
        owners: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the logits at some text positions only, (N, V), ordered by row.

        Training needs no logits at padding and at the prompt, which are more than half of a usual batch.

        Args:
            pixel_values: images (B, 3, H, W).
            input_ids: texts (B*K, T), the K texts about one image in a row; each starts with the start token.
            attention_mask: 1 for text, 0 for padding (B*K, T).
            positions: true at the N positions (B*K, T); `None` for every position with text.
            image_tokens: encoded images (B, M, D), in place of pixels.
            grid: compressed grid of the image tokens; `None` for the configured one.
            owners: number of the image that each text is about (texts,), where images have different numbers of texts.

        Raises:
            ValueError: as `forward`.
        """
        prefix = self.prefix(pixel_values, image_tokens, grid)
        inputs = self.check_inputs(prefix, input_ids, attention_mask, owners)
        return self.text_decoder.logits_at(*inputs, inputs[-1].bool() if positions is None else positions, owners)

    def check_inputs(
        self,
        prefix: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        owners: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the prefix (B, P, E), the texts about it and their mask (B*K, T); raises the errors of `forward`."""
        if input_ids is None:
            raise ValueError("no text: give input_ids that start with the start token")
        if owners is None and len(input_ids) % len(prefix):
            raise ValueError(f"{len(input_ids)} captions do not divide among {len(prefix)} images")
        return prefix, input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        grid: Grid | None = None,
        generation_config: GenerationConfig | None = None,
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
            kwargs: settings of transformers' `generate`, such as `num_beams`, `max_new_tokens`, `do_sample`,
                `streamer`, `num_return_sequences` or `return_dict_in_generate`. They replace those of
                `generation_config`. A `max_length` counts the tokens of the prompt and the new ones, not the image's.

        Returns:
            Texts (B * num_return_sequences, T) as in transformers: start token, prompt, new tokens, end token, and
            padding on the right. With `return_dict_in_generate`, an output that has these as `sequences`.

        Raises:
            ValueError: there is no image, prompts and images do not match, or the decoder has no room for the text.
        """
        prefix = self.prefix(pixel_values, image_tokens, grid)
        settings = (self.generation_config, generation_config, kwargs)
        return generate_texts(self.fusion, prefix, input_ids, attention_mask, *settings)[0]

    @torch.no_grad()
    def generate_with_log_probability(
        self,
        image_tokens: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Continue a text about each image, as `generate` does, and return the log-probabilities, too.

        Greedy and beam search sum them up during the search. After any other way to generate, such as sampling,
        `log_probability` computes them in one more pass of the decoder.

        Args:
            image_tokens: encoded images (B, M, D).
            input_ids: start token and prompt of each text (B, T0); the start token alone if absent.
            attention_mask: 0 where a prompt is padded on its left (B, T0).
            kwargs: settings of transformers' `generate`.

        Returns:
            Texts (B * num_return_sequences, T), those of an image in a row, best first in a beam search; and their
            log-probabilities (B * num_return_sequences,), float32.

        Raises:
            ValueError: as `generate`.
        """
        prefix, settings = self.prefix(None, image_tokens), (self.generation_config, None, kwargs)
        texts, logprobs = generate_texts(self.fusion, prefix, input_ids, attention_mask, *settings, logprob=True)
        if logprobs is None:
            logprobs = self.log_probability(texts, image_tokens, input_ids, attention_mask)
        return texts, logprobs

    @torch.no_grad()
    def log_probability(
        self,
        sequences: torch.Tensor,
        image_tokens: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the log-probability of generated texts under the model, end token included.

        Args:
            sequences: texts that `generate` returned (B*K, T).
            image_tokens: the image tokens (B, M, D) of these texts.
            input_ids: the prompts in that call of `generate` (B, T0); the start token alone if absent.
            attention_mask: the mask of these prompts (B, T0).

        Returns:
            One natural logarithm for each text (B*K,), float32, of its probability after the prompt.
        """
        prompt_length = 1 if input_ids is None else input_ids.shape[1]
        text = label_generated(sequences, prompt_length, self.generation_config.eos_token_id, attention_mask)
        inputs, targets = split_targets(text)
        positions = inputs["positions"]
        logits = self.logits_at(None, inputs["input_ids"], inputs["attention_mask"], positions, image_tokens)  # (N, V)
        logprobs = -token_loss(logits, targets, reduction="none")  # (N,)
        return logprobs.new_zeros(positions.shape).masked_scatter(positions, logprobs).sum(1)
