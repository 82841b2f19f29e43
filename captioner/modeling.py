"""The captioner: a frozen encoder, a projector, a causal language model; readable top to bottom.

Letters: B images, K captions of each, M image tokens, D encoder width, E decoder width, T text tokens, V vocabulary.

    pixel_values (B, 3, H, W) -> encoder (frozen) -> image_tokens (B, M, D) -> projector -> prefix (B, M, E) -> decoder

Two ways to fuse. `prefix` puts the projected tokens before the text, and works with every causal language model;
`cross_attention` lets every decoder layer attend to them, for decoders that have such layers (GPT-2, for one).
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from captioner.encoders import build_encoder
from captioner.grids import Grid, parse_grid

FUSIONS = ("prefix", "cross_attention")
IGNORED = -100
"""Label of text positions that carry no loss, as everywhere in transformers."""


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
    """What a forward pass returns: mean `loss` over the labels, if there are any, and `logits` (B*K, T, V)."""

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
            self.encoder = build_encoder(config.encoder_config).freeze()
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
        **kwargs: Any,
    ) -> CaptionerOutput:
        """Predict each text token from the image and the text before it.

        Args:
            pixel_values: images (B, 3, H, W).
            input_ids: text (B*K, T), the K captions of an image in a row; each begins with the start token.
            attention_mask: 1 for text, 0 for padding (B*K, T).
            labels: text to predict (B*K, T), usually `input_ids` with `IGNORED` for padding and prompt.
            image_tokens: encoded images (B, M, D), in place of pixels.
            grid: compressed grid asked of the encoder; `None` for the configured one.
            label_smoothing: share of the probability spread over the vocabulary in the loss.
            kwargs: handed to the decoder.

        Raises:
            ValueError: no text, or captions that cannot be shared out among the images.
        """
        if input_ids is None:
            raise ValueError("no text: give input_ids that begin with the start token")
        prefix = self.prefix(pixel_values, image_tokens, grid)  # (B, M, E)
        if len(input_ids) % len(prefix):
            raise ValueError(f"{len(input_ids)} captions do not divide among {len(prefix)} images")
        count = len(input_ids) // len(prefix)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if count > 1 and not kwargs and self.shares_prefix():
            inputs = self.share(prefix, input_ids, attention_mask, count)
        else:
            inputs = self.fuse(prefix.repeat_interleave(count, 0), input_ids, attention_mask) | {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.decoder.forward).parameters:
            inputs["logits_to_keep"] = input_ids.shape[1]  # the image's positions predict nothing
        logits = self.decoder(**inputs, **kwargs).logits[:, -input_ids.shape[1] :]  # (B*K, T, V)
        loss = None
        if labels is not None:
            loss = caption_loss(logits, labels, label_smoothing) / (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        return CaptionerOutput(loss=loss, logits=logits)

    def fuse(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Arrange prefix (B, M, E) and text (B, T) as the decoder's arguments, by the configured fusion."""
        if self.config.fusion == "cross_attention":
            return {"input_ids": input_ids, "attention_mask": attention_mask, "encoder_hidden_states": prefix}
        text = self.get_input_embeddings()(input_ids)  # (B, T, E)
        seen = attention_mask.new_ones(prefix.shape[:2])
        return {
            "inputs_embeds": torch.cat([prefix.to(text.dtype), text], 1),  # (B, M+T, E)
            "attention_mask": torch.cat([seen, attention_mask], 1),
        }

    def shares_prefix(self) -> bool:
        """Whether the K captions of an image can share the decoder's pass over its prefix: see `share`."""
        layers = set(getattr(self.config.text_config, "layer_types", None) or ["full_attention"])
        recomputing = self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.decoder.modules())
        attention_only = layers == {"full_attention"} and not getattr(self.decoder, "_is_stateful", False)
        sharded = isinstance(self, FSDPModule)  # its weights are there for one pass at a time
        return self.config.fusion == "prefix" and attention_only and not recomputing and not sharded

    def share(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, count: int
    ) -> dict[str, Any]:
        """Run the decoder over each prefix (B, M, E) once, and arrange text (B*K, T) to continue it.

        In a causal decoder no prefix position sees the text, so keys and values of the prefix are the same for all K
        captions of an image: B * M + B * K * T positions are computed in place of B * K * (M + T), gradients included.
        """
        weight = self.get_input_embeddings().weight
        past = self.decoder.base_model(inputs_embeds=prefix.to(weight.dtype), use_cache=True).past_key_values
        past.batch_repeat_interleave(count)
        seen = attention_mask.new_ones(len(input_ids), prefix.shape[1])
        mask = torch.cat([seen, attention_mask], 1)  # (B*K, M+T)
        return {"input_ids": input_ids, "attention_mask": mask, "past_key_values": past, "use_cache": True}

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
        inputs = self.fuse(prefix, input_ids, torch.ones_like(input_ids))
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
        start = self.generation_config.bos_token_id
        if input_ids is None:
            input_ids = sequences.new_full((len(image_tokens), 1), start)
        prompt = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0)
        ended = (sequences == self.generation_config.eos_token_id).cumsum(1)
        after_end = (ended - (sequences == self.generation_config.eos_token_id).long()) > 0
        text = torch.cat([prompt, sequences], 1)
        mask = torch.cat([torch.ones_like(prompt), (~after_end).long()], 1)
        logits = self.forward(input_ids=text, attention_mask=mask, image_tokens=image_tokens).logits
        logits = logits[:, prompt.shape[1] - 1 : -1].float()  # (B*K, T, V)
        logprobs = logits.log_softmax(-1).gather(-1, sequences[..., None])[..., 0]  # (B*K, T)
        return logprobs.masked_fill(after_end, 0).sum(1)


def caption_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum the cross-entropy of every labelled token, given logits (B, T, V) and labels (B, T) of the same text."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
