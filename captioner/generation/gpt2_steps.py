"""One step of a GPT-2 for all texts of a search: the numbers of transformers' module in three quarters of the time.

A small decoder spends much time between operations, so this file calls the operations directly. Of a prompt, the last
layer computes keys and values at every position, but its output at the last position only.

Letters: B images, S of them active, K beams, T tokens, E width, H heads, d = E / H the width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from captioner.generation.slot_cache import SlotCache

TANH = ("gelu_new", "gelu_pytorch_tanh")
"""Names of GPT-2's activation function."""


def is_plain_gpt2(decoder: PreTrainedModel) -> bool:
    """Return whether a decoder is GPT-2 as published, without adapters and cross-attention."""
    config = decoder.config
    if config.model_type != "gpt2" or config.add_cross_attention or config.activation_function not in TANH:
        return False
    if config._attn_implementation != "sdpa" or torch.is_autocast_enabled(decoder.device.type):
        return False
    layers: Any = decoder.base_model.h
    return all(
        type(part) is Conv1D
        for layer in layers
        for part in (layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj)
    )


class Gpt2Steps:
    """Steps with the weights of a GPT-2; the methods are those of `DecoderSteps`.

    Args:
        decoder: the decoder, see `is_plain_gpt2`.
        slots: slots S of the cache.
        steps: largest number of steps of an image.
        beams: beams K.
    """

    def __init__(self, decoder: PreTrainedModel, slots: int, steps: int, beams: int):
        self.body: Any = decoder.base_model
        self.head: Any = decoder.get_output_embeddings()
        self.heads, self.sizes = decoder.config.num_attention_heads, (slots, steps, beams)
        self.cache: SlotCache | None = None

    def read_prompt(self, inputs: dict[str, Any], positions: torch.Tensor, slot: int) -> torch.Tensor:
        """See `DecoderSteps.read_prompt`."""
        embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"]
        count, length, _ = embeds.shape
        x = embeds + self.body.wpe(positions)  # (B, T, E)
        if self.cache is None:
            one = x.new_empty(1, self.heads, 0, x.shape[2] // self.heads)
            self.cache = SlotCache([(one, one)] * len(self.body.h), [], length, *self.sizes)
        bias = None
        if mask is not None:
            places = torch.arange(length, device=x.device)
            seen = (places[:, None] >= places) & mask.bool()[:, None]  # (B, T, T)
            seen = seen | (places[:, None] == places)  # padding attends to itself, because it must attend to something
            bias = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, -torch.inf)[:, None]
        for layer, held in zip(self.body.h, self.cache.own, strict=True):
            query, key, value = self.heads_of(layer, x)
            held.keys[slot : slot + count, :, :length] = key
            held.values[slot : slot + count, :, :length] = value
            last = layer is self.body.h[-1]
            if last:
                query, x, bias = query[:, :, -1:], x[:, -1:], None if bias is None else bias[:, :, -1:]
            options = {"is_causal": bias is None and not last, "scale": layer.attn.scaling}
            x = self.finish(layer, x, F.scaled_dot_product_attention(query, key, value, bias, **options))
        return self.head(self.body.ln_f(x))

    def read_tokens(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, prefix: torch.Tensor | None
    ) -> torch.Tensor:
        """See `DecoderSteps.read_tokens`."""
        assert self.cache is not None
        x = self.body.wte(tokens) + self.body.wpe(positions)  # (S, K, E)
        for layer, held in zip(self.body.h, self.cache.own, strict=True):
            query, key, value = self.heads_of(layer, x)
            keys, values = held.update(key, value)
            read = F.scaled_dot_product_attention(query, keys, values, mask, scale=layer.attn.scaling)
            x = self.finish(layer, x, read)
        return self.head(self.body.ln_f(x))

    def heads_of(self, layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values of hidden states (B, T, E), each (B, H, T, d)."""
        mixed = linear(layer.attn.c_attn, layer.ln_1(x))
        return mixed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def finish(self, layer: Any, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Add the output of the heads (B, H, T, d) to hidden states (B, T, E), and compute the MLP."""
        x = x + linear(layer.attn.c_proj, read.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(layer.mlp.c_fc, layer.ln_2(x)), approximate="tanh")
        return x + linear(layer.mlp.c_proj, hidden)


def linear(layer: Conv1D, x: torch.Tensor) -> torch.Tensor:
    """Apply GPT-2's linear layer, whose weights are stored transposed, to x (B, T, i)."""
    return torch.addmm(layer.bias, x.flatten(0, 1), layer.weight).unflatten(0, x.shape[:2])
