"""From the caption table to training batches: several captions of a picture share its one encoding."""

from typing import TYPE_CHECKING

import torch

from captioner.data.stream import SeededStream
from captioner.processing import CaptionerProcessor

if TYPE_CHECKING:
    from datasets import Dataset


class CaptionStream(SeededStream):
    """Pictures of a caption table, each with K of its captions.

    Each item holds `pixel_values` (3, H, W) and `captions`, K texts drawn without repetition as far as there are K.
    """

    def __init__(self, table: "Dataset", processor: CaptionerProcessor, captions_per_image: int, seed: int):
        super().__init__(len(table), seed)
        self.table, self.processor, self.captions_per_image = table, processor, captions_per_image

    def load(self, number: int, i: int) -> dict:
        """Open picture `number` and draw its captions."""
        record = self.table[number]
        pixels = self.processor.pixels(record["image"])
        captions = record["captions"]
        order = self.generator(i).permutation(len(captions))
        chosen = [captions[order[k % len(order)]] for k in range(self.captions_per_image)]
        return {"pixel_values": pixels, "captions": chosen}

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """Batch B items into `pixel_values` (B, 3, H, W) and the text tensors of `CaptionerProcessor.text` (B*K, T)."""
        captions = [caption for item in items for caption in item["captions"]]
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), **self.processor.text(captions)}
