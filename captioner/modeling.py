"""The captioner: a frozen encoder, a projector, a causal language model; readable top to bottom.

Letters: B images, K captions of each, M image tokens, D encoder width, E decoder width, T text tokens, V vocabulary,
N text positions at which a prediction is wanted.

    pixel_values (B, 3, H, W) -> encoder (frozen) -> image_tokens (B, M, D) -> projector -> prefix (B, M, E) -> decoder

How the decoder takes the prefix is in `fusion.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from captioner.encoders import rebuild_encoder
from captioner.fusion import FUSIONS, Reader
from captioner.grids import Grid, parse_grid
from captioner.labels import IGNORED, label_generated, next_tokens


class CaptionerConfig(PretrainedConfig):
    """Configuration of a `CaptionerModel`.

    Args:
        encoder_config: `{"name": timm name, "kwargs": {...}}`, handed to `create_encoder`.
        text_config: configuration of any causal language model, as an object or a dict with `model_type`.
        fusion: `prefix` or `cross_attention`.
        grid: compressed grid (rows, columns) asked of the encoder; `None` for the encoder's own default.
        blind: zero the image tokens. The control that shows what a decoder says without looking.

    Raises:
        ValueError: the fusion is not known, or the decoder has no cross-attention.
    """

    model_type = "captioner"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers declares it so

    def __init__(
        self,
        encoder_config: dict | None = None,
        text_config: PretrainedConfig | dict | None = None,
        fusion: str = "prefix",
        grid: Grid | None = None,
        blind: bool = False,
        **kwargs,
    ):
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is '{fusion}'; it must be one of {', '.join(FUSIONS)}")
        self.encoder_config = encoder_config or {"name": "lookupvit_small_patch16_224", "kwargs": {}}
        if text_config is None:
            text_config = {"model_type": "gpt2"}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if fusion == "cross_attention":
            if not hasattr(text_config, "add_cross_attention"):
                raise ValueError(
                    f"a {text_config.model_type} decoder has no cross-attention; use --model.fusion prefix"
                )
            text_config.add_cross_attention = True
        self.text_config, self.fusion, self.blind = text_config, fusion, blind
        self.grid = parse_grid(grid)
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Decoder width E."""
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Decoder vocabulary V."""
        return self.text_config.vocab_size


class Projector(nn.Module):
    """Bring image tokens (B, M, D) to the decoder's width (B, M, E): layer norm, then a two-layer perceptron."""

    def __init__(self, encoder_dim: int, decoder_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(encoder_dim)
        self.fc1 = nn.Linear(encoder_dim, decoder_dim)
        self.fc2 = nn.Linear(decoder_dim, decoder_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project tokens (B, M, D) into (B, M, E)."""
        return self.fc2(F.gelu(self.fc1(self.norm(tokens))))


@dataclass
class CaptionerOutput(ModelOutput):
    """What a forward pass returns: mean `loss` over the labels, if any, and `logits`, (B*K, T, V) or (N, V)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class CaptionerModel(PreTrainedModel, GenerationMixin):
    """A frozen image encoder, a projector and a text decoder, as one transformers model.

    Text always begins with a start token (the tokenizer's bos, or its eos if it has none); position t of the logits
    predicts text token t + 1, whichever way images are fused.
    """

    config_class = CaptionerConfig
    base_model_prefix = "captioner"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CaptionerConfig):
        super().__init__(config)
        with torch.device("cpu"):  # timm computes at construction; transformers would have it on no device at all
            self.encoder = rebuild_encoder(config.encoder_config).freeze()
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        width = config.text_config.hidden_size
        if config.fusion == "prefix":  # some decoders, OPT-350m for one, embed words in another width than their own
            width = self.decoder.get_input_embeddings().embedding_dim
        self.projector = Projector(self.encoder.embed_dim, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the projector alone: encoder and decoder initialise themselves."""
        if isinstance(module, Projector):
            for layer in (module.fc1, module.fc2):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            nn.init.ones_(module.norm.weight)
            nn.init.zeros_(module.norm.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's token embedding."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embedding."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's language-model head."""
        return self.decoder.get_output_embeddings()

    def encode(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) into image tokens (B, M, D), at the configured grid unless another is given."""
        return self.encoder.encode(pixel_values, self.config.grid if grid is None else grid)

    def prefix(
        self,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        grid: Grid | None = None,
    ) -> torch.Tensor:
        """Project pixels (B, 3, H, W), or image tokens (B, M, D) encoded before, into the decoder's width (B, M, E).

        Raises:
            ValueError: neither is given, or the tokens are not of this encoder's width.
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
        return self.projector(image_tokens)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        grid: Grid | None = None,
        label_smoothing: float = 0.0,
        wanted: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CaptionerOutput:
        """Predict each text token from the image and the text before it.

        Args:
            pixel_values: images (B, 3, H, W).
            input_ids: text (B*K, T), the K captions of an image in a row; each begins with the start token.
            attention_mask: 1 for text, 0 for padding (B*K, T).
            labels: text to predict (B*K, T), usually `input_ids` with -100 (`IGNORED`) for padding and prompt.
            image_tokens: encoded images (B, M, D), in place of pixels.
            grid: compressed grid asked of the encoder; `None` for the configured one.
            label_smoothing: share of the probability spread over the vocabulary in the loss.
            wanted: where logits are wanted (B*K, T), true at N positions: they are then (N, V), in the order of the
                positions. Padding, and prompts that are given, need none: more than half of a batch. Without labels.
            kwargs: handed to the decoder.

        Raises:
            ValueError: no text, captions that cannot be shared out among the images, or labels with `wanted`.
        """
        if input_ids is None:
            raise ValueError("no text: give input_ids that begin with the start token")
        if labels is not None and wanted is not None:
            raise ValueError("labels need logits everywhere: leave wanted out")
        prefix = self.prefix(pixel_values, image_tokens, grid)  # (B, M, E)
        if len(input_ids) % len(prefix):
            raise ValueError(f"{len(input_ids)} captions do not divide among {len(prefix)} images")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        logits = self.reader().predict(prefix, input_ids, attention_mask, wanted, **kwargs)
        loss = None
        if labels is not None:
            said, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = F.cross_entropy(said, targets, label_smoothing=label_smoothing, reduction="sum")
            loss = loss / (targets != IGNORED).sum().clamp(min=1)
        return CaptionerOutput(loss=loss, logits=logits)

    def reader(self) -> Reader:
        """Return the decoder as it reads texts about images, by the configured fusion."""
        return Reader(self.decoder, self.config.fusion)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        grid: Grid | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Caption images.

        Args:
            pixel_values: images (B, 3, H, W).
            input_ids: start token and prompt that every caption continues (B, T); the start token alone if absent.
            image_tokens: encoded images (B, M, D), in place of pixels.
            grid: compressed grid asked of the encoder; `None` for the configured one.
            kwargs: generation settings of transformers: `num_beams`, `max_new_tokens`, `do_sample`, `top_p`,
                `repetition_penalty`, `num_return_sequences`, ...

        Returns:
            New tokens (B * num_return_sequences, up to max_new_tokens), without start and prompt, padded at the end.
        """
        prefix = self.prefix(pixel_values, image_tokens, grid)  # (B, M, E)
        if input_ids is None:
            start = self.generation_config.bos_token_id
            input_ids = torch.full((len(prefix), 1), start, device=prefix.device)
        if "generation_config" not in kwargs:
            kwargs = self.generation_config.to_diff_dict() | kwargs
            kwargs.pop("transformers_version", None)
        inputs = self.reader().fuse(prefix, input_ids, torch.ones_like(input_ids))
        sequences = self.decoder.generate(**inputs, **kwargs)
        return sequences[:, input_ids.shape[1] :] if self.config.fusion == "cross_attention" else sequences

    @torch.no_grad()
    def log_probability(
        self, sequences: torch.Tensor, image_tokens: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the log-probability of generated captions under the model itself, end token included.

        Args:
            sequences: what `generate` returned (B*K, T).
            image_tokens: the encoded images (B, M, D) it was generated from.
            input_ids: start token and prompt given to `generate` (B, T0).

        Returns:
            One natural logarithm for each caption (B*K,), in float32.
        """
        if input_ids is None:
            input_ids = sequences.new_full((len(image_tokens), 1), self.generation_config.bos_token_id)
        prompt = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0)
        text = label_generated(prompt, sequences, self.generation_config.eos_token_id)
        read, said = next_tokens(text)
        logits = self.forward(image_tokens=image_tokens, **read).logits.float()  # (N, V)
        logprobs = -F.cross_entropy(logits, said, reduction="none")  # (N,)
        return logprobs.new_zeros(read["wanted"].shape).masked_scatter(read["wanted"], logprobs).sum(1)
