"""The captioner: a frozen encoder, a projector and a causal language model.

Letters: B images, K captions of each, M image tokens, D encoder width, E decoder width, P prefix tokens, T text tokens,
T0 of them in the prompt, V vocabulary, N text positions whose logits are computed, C tags.

    pixel_values (B, 3, H, W) -> encoder (frozen) -> image_tokens (B, M, D) -> projector -> prefix (B, P, E) -> decoder

A captioner may have object tags: a head predicts them from the image tokens, and their words stand before the start
token of a text, `[words of tags] <start> [prompt] caption <end>`. They are read and not learned.

`fusion.py` has the ways in which the decoder reads the prefix; `text_decoder.py` computes the logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

from captioner.configuration import CaptionerConfig
from captioner.encoders import rebuild_encoder, unsaved_buffers
from captioner.fusion import FUSIONS, Fusion
from captioner.generation import CaptionGeneration
from captioner.grids import Grid
from captioner.labels import count_targets, next_labels, token_loss
from captioner.tag_head import TagHead
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


class CaptionerModel(CaptionGeneration, PreTrainedModel, GenerationMixin):
    """A frozen image encoder, a projector and a text decoder, as one model of transformers.

    Every text starts with the start token (the tokenizer's bos, or its eos if it has no bos). For every fusion, the
    logits at position t predict token t + 1 of the text.

    Attributes:
        tags: the tags and which of them are named; `None` for a captioner without tags.
        tag_head: predicts them from image tokens; frozen.
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
        self.tags, self.tag_head = config.tag_config, None
        if self.tags is not None:
            sizes = (self.encoder.embed_dim, len(self.tags.vocabulary), self.tags.hidden)
            self.tag_head = TagHead(*sizes, prefix_tokens=self.encoder.num_prefix_tokens).freeze()
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

    def read_image(
        self, pixel_values: torch.Tensor | None, image_tokens: torch.Tensor | None, grid: Grid | None = None
    ) -> torch.Tensor:
        """Return the image tokens (B, M, D) that are given, or else encode pixels.

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
        return image_tokens

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
            ValueError: as `read_image`.
        """
        image_tokens = self.read_image(pixel_values, image_tokens, grid).to(self.projector.fc1.weight.dtype)
        if self.config.blind:
            image_tokens = torch.zeros_like(image_tokens)
        return self.projector(image_tokens)  # (B, P, E)

    def predict_tags(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Predict the probabilities of all tags (B, C) from image tokens (B, M, D).

        Raises:
            ValueError: this captioner has no tags, or the tokens come from another encoder.
        """
        if self.tag_head is None:
            raise ValueError("this captioner has no tags")
        return self.tag_head(image_tokens)

    def pick_tags(
        self, image_tokens: torch.Tensor, min_tag: float | None = None, max_tags: int | None = None
    ) -> list[list[int]]:
        """Pick the tags of images that the decoder reads; there are none for a captioner without tags, or a blind one.

        Args:
            image_tokens: image tokens (B, M, D).
            min_tag: least probability of a tag; `None` for the configured one.
            max_tags: most tags of an image; `None` for the configured number.

        Returns:
            The numbers of each image's tags, the most probable first.
        """
        if self.tags is None or self.config.blind:
            return [[] for _ in image_tokens]
        return self.tags.pick(self.predict_tags(image_tokens), min_tag, max_tags)

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
