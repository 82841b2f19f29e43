"""Compute the logits of texts about images, with any text decoder; texts about one image share the prefix.

Letters: B images, K texts about each, P prefix tokens, E decoder width, T text tokens, V vocabulary, N text positions
whose logits are computed; n of these positions, or of the texts, in one group.
"""

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache
from transformers.utils import ModelOutput

from captioner.fusion import Fusion
from captioner.transformers_versions import cache_name

PLAIN_HEADS = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3")
"""Decoders whose logits are the unchanged output of their head; some other decoders scale or cap it."""


class TextDecoder:
    """A text decoder that computes the logits of K texts about each of B images.

    Args:
        fusion: the decoder, and the way in which it reads the prefix.
    """

    def __init__(self, fusion: Fusion):
        self.fusion, self.decoder = fusion, fusion.decoder
        self.sharded = any(isinstance(part, FSDPModule) for part in self.decoder.modules())
        self.plain = self.decoder.config.model_type in PLAIN_HEADS and not self.sharded
        self.cache_name = cache_name(self.decoder)

    def output(
        self, prefix: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any
    ) -> ModelOutput:
        """Return the decoder's output, with the logits at every position of the texts, (B*K, T, V).

        Args:
            prefix: prefix of each image (B, P, E).
            input_ids: texts (B*K, T), the K texts about one image in a row.
            attention_mask: 1 for text, 0 for padding (B*K, T).
            kwargs: further arguments of the decoder. With them, the texts do not share a pass over the prefix.
        """
        owners = self.owners(prefix, input_ids)
        cache = None if kwargs else self.prefix_cache(prefix, len(input_ids) // len(prefix))
        inputs = self.arrange(prefix, cache, owners, input_ids, attention_mask)
        output = self.run(self.decoder, inputs | kwargs, input_ids.shape[1])
        output.logits = output.logits[:, -input_ids.shape[1] :]
        return output

    def logits_at(
        self,
        prefix: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        positions: torch.Tensor,
        owners: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the logits at some positions of the texts, (N, V), row by row.

        Most decoders apply their head at these positions alone; a head may cost as much as several layers. On a CPU,
        texts of similar length form groups, which need little padding.

        Args:
            prefix: prefix of each image (B, P, E).
            input_ids: texts (B*K, T), the K texts about one image in a row.
            attention_mask: 1 for text, 0 for padding (B*K, T).
            positions: true at the N positions (B*K, T).
            owners: number of the image that each text is about (texts,), where images have different numbers of texts.
        """
        if owners is None:
            owners = self.owners(prefix, input_ids)
        cache = self.prefix_cache(prefix, math.ceil(len(input_ids) / len(prefix)))
        numbers = torch.arange(positions.numel(), device=positions.device).view(positions.shape)
        outputs, places = [], []
        for rows, length in self.groups(positions):
            here = positions[rows, :length].flatten().nonzero()[:, 0]  # (n,), before the pass: it waits for the device
            inputs = self.arrange(prefix, cache, owners[rows], input_ids[rows, :length], attention_mask[rows, :length])
            found = self.run(self.decoder.base_model if self.plain else self.decoder, inputs, length)
            output = (found.last_hidden_state if self.plain else found.logits)[:, -length:]
            outputs.append(output.flatten(0, 1).index_select(0, here))  # (n, E or V)
            places.append(numbers[rows, :length].flatten()[here])
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)[torch.cat(places).argsort()]
        return self.decoder.get_output_embeddings()(output) if self.plain else output

    @staticmethod
    def owners(prefix: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the number of the image that each text is about, (B*K,)."""
        return torch.arange(len(prefix), device=prefix.device).repeat_interleave(len(input_ids) // len(prefix))

    def run(self, decoder: nn.Module, inputs: dict[str, Any], length: int) -> ModelOutput:
        """Run the decoder or its body; the text has the last T (`length`) positions of the output."""
        if "logits_to_keep" in inspect.signature(decoder.forward).parameters:
            inputs = inputs | {"logits_to_keep": length}  # the positions of the prefix predict nothing
        return decoder(**inputs)

    def arrange(
        self,
        prefix: torch.Tensor,
        cache: DynamicCache | None,
        owners: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> dict[str, Any]:
        """Return the decoder's arguments for texts (n, T) and the numbers of their images (n,).

        The texts continue the cache of the prefixes (B, P, E). Without a cache, each text follows its own prefix.
        """
        if cache is None:
            inputs = self.fusion.arrange(prefix.index_select(0, owners), input_ids, attention_mask)
            return inputs | self.positions(inputs["attention_mask"], attention_mask) | {"use_cache": False}
        own = copy.copy(cache)  # keeps the class that the decoder chose
        own.layers = [copy.copy(layer) for layer in cache.layers]
        layer: Any
        for layer in own.layers:
            layer.keys, layer.values = layer.keys.index_select(0, owners), layer.values.index_select(0, owners)
        mask = torch.cat([attention_mask.new_ones(len(owners), prefix.shape[1]), attention_mask], 1)  # (n, P+T)
        positions = {name: ids[:, prefix.shape[1] :] for name, ids in self.positions(mask, attention_mask).items()}
        inputs = {"input_ids": input_ids, "attention_mask": mask, **positions}
        return inputs | {str(self.cache_name): own, "use_cache": True}

    def positions(self, mask: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the decoder's `position_ids` if texts have padding on their left, otherwise no argument.

        Without `position_ids`, a decoder counts padding as positions; `generate` does not.

        Args:
            mask: attention mask of the decoder's whole input (n, P+T), or (n, T) without a prefix before the text.
            attention_mask: attention mask of the texts (n, T).
        """
        if attention_mask[:, 0].all() or "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            return {}
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def shares_prefix(self, count: int) -> bool:
        """Return whether `count` texts about an image can share one pass over its prefix, and are then faster."""
        if not self.fusion.shares_prefix or self.cache_name is None:
            return False
        if self.sharded:  # sharded weights are gathered for one pass at a time
            return False
        layers = set(getattr(self.decoder.config, "layer_types", None) or ["full_attention"])
        attention_only = layers == {"full_attention"} and not getattr(self.decoder, "_is_stateful", False)
        parts = self.decoder.modules()
        recomputing = self.decoder.training and any(getattr(part, "gradient_checkpointing", False) for part in parts)
        worthwhile = (
            count > 1 or self.decoder.device.type == "cpu"
        )  # for one text, it saves the gradient of the last layer
        return attention_only and worthwhile and not recomputing

    def prefix_cache(self, prefix: torch.Tensor, count: int) -> DynamicCache | None:
        """Compute the keys and values of the prefixes (B, P, E), if `count` texts about each can share them.

        In a causal decoder, no position of the prefix depends on the text. So its keys and values are the same for all
        K texts about an image: B*P + B*K*T positions are computed in place of B*K*(P+T), gradients included.

        Returns:
            The cache; `None` for a decoder that cannot share it or does not return it.
        """
        if not self.shares_prefix(count):
            return None
        embedding = cast(nn.Embedding, self.decoder.get_input_embeddings())
        output = self.decoder.base_model(inputs_embeds=prefix.to(embedding.weight.dtype), use_cache=True)
        cache = output.get(self.cache_name)
        return cache if isinstance(cache, DynamicCache) else None

    def groups(self, positions: torch.Tensor) -> Iterator[tuple[torch.Tensor | slice, int]]:
        """Yield the rows of each group of texts that are computed together, and their length up to the last position.

        On a CPU, a group has 24 to 47 texts: for 160 captions, this took two thirds of the time of one pass. On a GPU,
        and with sharded weights, all texts form one group, because each further pass costs time to start.
        """
        count = len(positions) // 24
        if count < 2 or self.sharded or positions.device.type != "cpu":
            yield slice(None), positions.shape[1]
            return
        lengths = (positions * torch.arange(1, positions.shape[1] + 1)).amax(1).clamp(min=1)
        for rows in lengths.argsort().chunk(count):
            yield rows, int(lengths[rows].amax())
