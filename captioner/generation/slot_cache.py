"""Keys and values of a search over several images: those of an image are stored once for all its beams.

Each image has a slot. Its keys and values are in columns: first those of prefix and prompt, then K for each step, one
for each beam. A mask selects the columns of each beam's own text. A beam that continues another one copies the mask,
not the keys. A beam therefore also reads columns that its mask hides. These are few numbers, while a copy of the image
for every beam would be most of the memory that a step reads.

Letters: S slots, K beams, H heads, C columns, d width of a head.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of every layer."""


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, (S, H, C, d); a step uses the first slots and columns.

    Args:
        keys: keys of the size and dtype to store, (B, H, T, d).
        values: values, likewise; their width may differ.
        slots: slots S.
        columns: columns C.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: int, columns: int):
        super().__init__()
        self.keys = keys.new_empty(slots, keys.shape[1], columns, keys.shape[3])
        self.values = values.new_empty(slots, values.shape[1], columns, values.shape[3])
        self.is_initialized = True
        self.slots, self.start, self.used = slots, 0, columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the memory is allocated at construction."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the K new columns of each slot; return all columns in use, (S, H, C, d)."""
        end = self.start + key_states.shape[2]
        self.keys[: self.slots, :, self.start : end] = key_states
        self.values[: self.slots, :, self.start : end] = value_states
        return self.keys[: self.slots, :, : self.used], self.values[: self.slots, :, : self.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns in use, and 0 for the first of them."""
        return self.used, 0

    def get_seq_length(self) -> int:
        """Return the first column of this step."""
        return self.start

    def get_max_length(self) -> int:
        """Return the number of columns."""
        return self.keys.shape[2]


class FixedLayer(DynamicLayer):
    """The keys and values with which a layer attends to the image; no step adds to them."""


class SlotCache:
    """The keys and values of all layers.

    Args:
        own: keys and values of the text in every layer, as `SlotLayer` takes them.
        cross: keys and values of the image in every layer (B, H, P, d), if the layers have cross-attention.
        first_columns: columns that prefix and prompt take.
        slots: slots S.
        steps: steps after which columns are overwritten; no image stays longer.
        beams: beams K.
    """

    def __init__(self, own: Pairs, cross: Pairs, first_columns: int, slots: int, steps: int, beams: int):
        self.beams, self.steps, self.step = beams, max(steps, 1), 0
        self.first_columns = self.used = first_columns
        self.columns = first_columns + beams * self.steps
        self.own = [SlotLayer(keys, values, slots, self.columns) for keys, values in own]
        self.cross = [SlotLayer(keys, values, slots, keys.shape[2]) for keys, values in cross]

    def put(self, cache: Cache, slot: int) -> None:
        """Copy the keys and values of the prefix and prompt of some images into as many slots, from `slot` on."""
        for layers, others in zip((self.own, self.cross), split_cache(cache), strict=True):
            for layer, (keys, values) in zip(layers, others, strict=True):
                count, _, columns, _ = keys.shape
                layer.keys[slot : slot + count, :, :columns] = keys
                layer.values[slot : slot + count, :, :columns] = values

    def prepare(self, slot: int, count: int) -> None:
        """Clear the columns without tokens in the slots of new images, from `slot` on."""
        if slot == 0:  # no other image is active, so the columns can be used from the first again
            self.step, self.used = 0, self.first_columns
        for layer in self.own:  # even what the mask hides must be a number
            layer.keys[slot : slot + count, :, self.first_columns : self.used] = 0
            layer.values[slot : slot + count, :, self.first_columns : self.used] = 0

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy slots onto others."""
        for layer in (*self.own, *self.cross):
            layer.keys[targets] = layer.keys[sources]
            layer.values[targets] = layer.values[sources]

    def next_step(self, slots: int) -> tuple[int, int]:
        """Start a step of the first `slots` slots; return the first of K new columns, and how many are in use."""
        start = self.first_columns + self.beams * (self.step % self.steps)
        self.step += 1
        self.used = min(self.first_columns + self.beams * self.step, self.columns)
        for layer in self.own:
            layer.slots, layer.start, layer.used = slots, start, self.used
        return start, self.used

    def as_cache(self, slots: int) -> Cache:
        """Return the first `slots` slots as an argument of the decoder."""
        cache = Cache(layers=list(self.own))
        if not self.cross:
            return cache
        fixed = []
        for layer in self.cross:
            fixed.append(FixedLayer())
            fixed[-1].keys, fixed[-1].values = layer.keys[:slots], layer.values[:slots]
            fixed[-1].is_initialized = True
        return EncoderDecoderCache(cache, Cache(layers=fixed))


def split_cache(cache: Cache) -> tuple[Pairs, Pairs]:
    """Return the keys and values in a decoder's cache: of the text, and of the image in cross-attention, if any."""
    crossed = isinstance(cache, EncoderDecoderCache)
    own = cache.self_attention_cache.layers if crossed else cache.layers
    cross = cache.cross_attention_cache.layers if crossed else []
    return [(layer.keys, layer.values) for layer in own], [(layer.keys, layer.values) for layer in cross]


def grows_plainly(config: Any) -> bool:
    """Return whether every layer of a decoder caches the keys and values of all tokens, and nothing else."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
