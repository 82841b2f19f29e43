"""How a decoder reads texts about images, and computes nothing twice or in vain.

Two ways to fuse. `prefix` puts the projected image tokens before the text, and works with every causal language model;
`cross_attention` lets every decoder layer attend to them, for decoders that have such layers (GPT-2, for one).

Letters: B images, K texts about each, M image tokens, E decoder width, T text tokens, V vocabulary, N text positions at
which a prediction is wanted.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel

FUSIONS = ("prefix", "cross_attention")
PLAIN_HEADS = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3")
"""Decoders known to have their head's output as logits, as it is: some others scale or cap it."""


class Reader:
    """A decoder as it reads texts about images.

    Args:
        decoder: any causal language model of transformers.
        fusion: `prefix` or `cross_attention`.
    """

    def __init__(self, decoder: PreTrainedModel, fusion: str):
        self.decoder, self.fusion = decoder, fusion
        self.sharded = any(isinstance(part, FSDPModule) for part in decoder.modules())
        self.plain = decoder.config.model_type in PLAIN_HEADS and not self.sharded

    def predict(
        self,
        images: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        wanted: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict what follows in texts about images.

        If it is said where logits are wanted, most decoders compute them only there (a head may cost as much as several
        layers), and a CPU reads the texts in groups of like length, so that little padding is computed.

        Args:
            images: projected image tokens (B, M, E).
            input_ids: texts (B*K, T), the K about an image in a row.
            attention_mask: 1 for text, 0 for padding (B*K, T).
            wanted: where logits are wanted, (B*K, T), true at N positions; everywhere if absent.
            kwargs: handed to the decoder.

        Returns:
            Logits (B*K, T, V), or (N, V) in the order of the wanted positions.
        """
        count = len(input_ids) // len(images)
        owner = torch.arange(len(images), device=images.device).repeat_interleave(count)  # (B*K,)
        past = self.read_images(images) if not kwargs and self.shares_prefix(count) else None
        if wanted is None:
            inputs = self.arrange(images, past, owner, input_ids, attention_mask)
            return self.run(self.decoder, inputs | kwargs, input_ids.shape[1])
        places = torch.arange(wanted.numel(), device=wanted.device).view(wanted.shape)
        found, where = [], []
        for rows, length in [(slice(None), wanted.shape[1])] if kwargs else self.groups(wanted):
            here = wanted[rows, :length].flatten().nonzero()[:, 0]  # (n,), before the pass: it waits for the device
            inputs = self.arrange(images, past, owner[rows], input_ids[rows, :length], attention_mask[rows, :length])
            output = self.run(self.decoder.base_model if self.plain else self.decoder, inputs | kwargs, length)
            found.append(output.flatten(0, 1).index_select(0, here))  # (n, E or V)
            where.append(places[rows, :length].flatten()[here])
        output = found[0] if len(found) == 1 else torch.cat(found)[torch.cat(where).argsort()]
        return self.decoder.get_output_embeddings()(output) if self.plain else output

    def run(self, decoder: PreTrainedModel, inputs: dict[str, Any], length: int) -> torch.Tensor:
        """Return logits (n, T, V), or hidden states (n, T, E) of a body, at the last T positions: the text's."""
        if "logits_to_keep" in inspect.signature(decoder.forward).parameters:
            inputs = inputs | {"logits_to_keep": length}  # the image's positions predict nothing
        output = decoder(**inputs)
        return (output.logits if "logits" in output else output.last_hidden_state)[:, -length:]

    def fuse(
        self, images: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Arrange image tokens (B, M, E) and a text about each (B, T) as the decoder's arguments."""
        if self.fusion == "cross_attention":
            return {"input_ids": input_ids, "attention_mask": attention_mask, "encoder_hidden_states": images}
        text = self.decoder.get_input_embeddings()(input_ids)  # (B, T, E)
        seen = attention_mask.new_ones(images.shape[:2])
        return {
            "inputs_embeds": torch.cat([images.to(text.dtype), text], 1),  # (B, M+T, E)
            "attention_mask": torch.cat([seen, attention_mask], 1),
        }

    def arrange(
        self,
        images: torch.Tensor,
        past: DynamicCache | None,
        owner: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> dict[str, Any]:
        """Arrange texts (n, T) as the decoder's arguments; `owner` (n,) says about which of the images each is.

        They continue the keys and values of what was read of the images (B, M, E), or follow the images if `None`.
        """
        if past is None:
            return self.fuse(images.index_select(0, owner), input_ids, attention_mask) | {"use_cache": False}
        own = copy.copy(past)  # which is of as many kinds as there are kinds of layers
        own.layers = [copy.copy(layer) for layer in past.layers]
        for layer in own.layers:
            layer.keys, layer.values = layer.keys.index_select(0, owner), layer.values.index_select(0, owner)
        seen = attention_mask.new_ones(len(owner), images.shape[1])
        mask = torch.cat([seen, attention_mask], 1)  # (n, M+T)
        return {"input_ids": input_ids, "attention_mask": mask, "past_key_values": own, "use_cache": True}

    def shares_prefix(self, count: int) -> bool:
        """Whether so many texts about an image can and should share the decoder's pass over it: see `read_images`."""
        if self.fusion != "prefix" or self.sharded:  # sharded weights are there for one pass at a time
            return False
        layers = set(getattr(self.decoder.config, "layer_types", None) or ["full_attention"])
        attention_only = layers == {"full_attention"} and not getattr(self.decoder, "_is_stateful", False)
        parts = self.decoder.modules()
        recomputing = self.decoder.training and any(getattr(part, "gradient_checkpointing", False) for part in parts)
        worthwhile = count > 1 or self.decoder.device.type == "cpu"  # of one text, it saves the last layer's gradient
        return attention_only and worthwhile and not recomputing

    def read_images(self, images: torch.Tensor) -> DynamicCache | None:
        """Read image tokens (B, M, E) as a prefix, for their keys and values; `None` if the decoder does not tell them.

        In a causal decoder no prefix position sees the text, so they are the same for all K texts about an image:
        B * M + B * K * T positions are computed in place of B * K * (M + T), gradients included.
        """
        weight = self.decoder.get_input_embeddings().weight
        output = self.decoder.base_model(inputs_embeds=images.to(weight.dtype), use_cache=True)
        past = getattr(output, "past_key_values", None)
        return past if isinstance(past, DynamicCache) else None

    def groups(self, wanted: torch.Tensor) -> Iterator[tuple[torch.Tensor | slice, int]]:
        """Yield the rows of each group of texts that is read at once, and how far: to the last `wanted` (B*K, T).

        On a CPU, groups of 24 to 47: 160 captions took two thirds of the time of one pass. On a GPU, one: each
        costs the start of a pass, which is what bounds small decoders there. With sharded weights, one, too.
        """
        count = len(wanted) // 24
        if count < 2 or self.sharded or wanted.device.type != "cpu":
            yield slice(None), wanted.shape[1]
            return
        lengths = (wanted * torch.arange(1, wanted.shape[1] + 1)).amax(1).clamp(min=1)
        for rows in lengths.argsort().chunk(count):
            yield rows, int(lengths[rows].amax())
