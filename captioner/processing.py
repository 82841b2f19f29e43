"""The processor: what stands between files and text on one side and the model's tensors on the other."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from timm.data import create_transform
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from captioner.images import ImageSource, is_single, open_image
from captioner.labels import IGNORED

IMAGE_DEFAULTS = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
"""Keys are timm's. `squash` shows the encoder the whole image; `center` crops it as classifiers do."""


def image_settings(default_cfg: dict, image_size: int | None = None, crop_mode: str = "squash") -> dict:
    """Derive the image transform's settings from an encoder's timm configuration.

    Args:
        default_cfg: the encoder's `default_cfg`.
        image_size: side of the image in pixels; `None` for the encoder's own.
        crop_mode: how an image becomes a square; `center` takes the encoder's own share of it.
    """
    image = {key: default_cfg[key] for key in ("input_size", "mean", "std", "interpolation")}
    if image_size is not None:
        image["input_size"] = (3, image_size, image_size)
    return image | {"crop_mode": crop_mode, "crop_pct": default_cfg["crop_pct"] if crop_mode == "center" else 1.0}


class CaptionerProcessor(ProcessorMixin):
    """Image transform and tokenizer in one object; `save_pretrained` writes both into one folder.

    Args:
        tokenizer: any fast tokenizer; without a pad token its end token pads.
        image: timm's data settings; what is missing is taken from `IMAGE_DEFAULTS`.
        prompt: text that every caption continues, such as `A photo of`.
        max_length: text tokens above which a caption is cut, start and end token included.
    """

    def __init__(self, tokenizer=None, image: dict | None = None, prompt: str = "", max_length: int = 40):
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        self.image = {key: (image or {}).get(key, default) for key, default in IMAGE_DEFAULTS.items()}
        self.prompt, self.max_length = prompt, max_length
        self._transform = create_transform(**self.image)
        super().__init__(tokenizer)

    @property
    def start_token_id(self) -> int:
        """The token that every text begins with: bos, or eos where a tokenizer has no bos."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def prompt_ids(self) -> list[int]:
        """Return start token and prompt as token ids."""
        return [self.start_token_id, *self._ids([self.prompt])[0]]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def pixels(self, image: ImageSource) -> torch.Tensor:
        """Open one image and transform it into pixels (3, H, W).

        Raises:
            ImageError: the image cannot be used.
        """
        return self._transform(open_image(image))

    def texts(self, captions: Sequence[str]) -> "Texts":
        """Encode captions for training once, to batch any of them later: start, prompt, caption, end.

        The full stop of a caption is left out.
        """
        lead, end = self.prompt_ids(), self.tokenizer.eos_token_id
        # a caption after a prompt continues a sentence: byte-level tokenizers mark that by the space before it
        tidy = [(" " if self.prompt else "") + c.strip().removesuffix(".").rstrip() for c in captions]
        rows = (
            np.array([*lead, *ids][: self.max_length - 1] + [end], np.int32)
            for start in range(0, len(tidy), 10_000)  # COCO's 600,000 at once would take gigabytes
            for ids in self._ids(tidy[start : start + 10_000])
        )
        return Texts(rows, len(lead), self.tokenizer.pad_token_id)

    def text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode captions for training as one batch; see `Texts.batch` for what is returned."""
        return self.texts(captions).batch(range(len(captions)))

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Turn images into `pixel_values` (B, 3, H, W) and captions into what `text` of this class returns."""
        if images is None and text is None:
            raise ValueError("nothing to process: give images, text or both")
        data = {}
        if images is not None:
            images = [images] if is_single(images) else list(images)
            data["pixel_values"] = torch.stack([self.pixels(image) for image in images])
        if text is not None:
            data |= self.text([text] if isinstance(text, str) else text)
        return BatchFeature(data, tensor_type=return_tensors)

    def captions(self, sequences: torch.Tensor) -> list[str]:
        """Decode generated tokens (B, T) into tidy captions: one line, no special tokens.

        The prompt is not part of them: no reference caption begins with it, and scores would suffer.
        """
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    @property
    def model_input_names(self) -> list[str]:
        """Name what the model takes."""
        return ["pixel_values", "input_ids", "attention_mask"]


class Texts:
    """Encoded captions, laid end to end.

    Args:
        rows: token ids of each caption.
        lead: how many of them are start and prompt.
        pad: id of the padding token.
    """

    def __init__(self, rows: Iterable[np.ndarray], lead: int, pad: int):
        rows = list(rows)
        self.lengths = np.array([len(row) for row in rows])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.ids, self.lead, self.pad = np.concatenate(rows), lead, pad

    def batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Batch captions by number, padded to the longest.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each (captions, T). Start, prompt and padding carry no label.
        """
        lengths, places = self.lengths[numbers][:, None], np.arange(self.lengths[numbers].max())
        there = places < lengths  # (captions, T)
        input_ids = np.where(there, self.ids[np.where(there, self.starts[numbers][:, None] + places, 0)], self.pad)
        labels = np.where(there & (places >= self.lead), input_ids, IGNORED)
        arrays = {"input_ids": input_ids, "attention_mask": there, "labels": labels}
        return {key: torch.from_numpy(array.astype(np.int64)) for key, array in arrays.items()}


def train_tokenizer(captions: Sequence[str], vocab_size: int = 8000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on captions, with `<s>`, `</s>` and `<pad>` as special tokens.

    Raises:
        ValueError: there are no captions, or the vocabulary is smaller than the 256 bytes and 3 special tokens.
    """
    from tokenizers import ByteLevelBPETokenizer

    special = ["<pad>", "<s>", "</s>"]
    if not captions:
        raise ValueError("no captions to train a tokenizer on")
    if vocab_size < 256 + len(special):
        raise ValueError(f"a byte-level vocabulary needs at least {256 + len(special)} tokens, not {vocab_size}")
    bpe = ByteLevelBPETokenizer(add_prefix_space=True, lowercase=True)
    bpe.train_from_iterator(
        captions, vocab_size=vocab_size, min_frequency=2, special_tokens=special, show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
