"""The processor: it turns images and texts into the model's tensors, and generated tokens into captions.

Letters: B images, T tokens of a text, H W pixels.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from timm.data import create_transform
from transformers import BatchFeature, PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from captioner.images import ImageSource, each_image, open_image
from captioner.labels import IGNORED

logger = logging.getLogger(__name__)

IMAGE_DEFAULTS = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
"""Settings of timm's transform. `squash` resizes the whole image to a square; `center` crops it, as classifiers do."""


def image_settings(default_cfg: dict, image_size: int | None = None, crop_mode: str = "squash") -> dict:
    """Derive the image transform's settings from an encoder's timm configuration.

    Args:
        default_cfg: the encoder's `default_cfg`.
        image_size: side of the square image in pixels; `None` for the encoder's own size.
        crop_mode: how an image becomes a square. `center` crops it by the encoder's own `crop_pct`.
    """
    image = {key: default_cfg[key] for key in ("input_size", "mean", "std", "interpolation")}
    if image_size is not None:
        image["input_size"] = (3, image_size, image_size)
    return image | {"crop_mode": crop_mode, "crop_pct": default_cfg["crop_pct"] if crop_mode == "center" else 1.0}


class CaptionerProcessor(ProcessorMixin):
    """Image transform and tokenizer in one object; `save_pretrained` writes both into one folder.

    Every text starts with the start token and the prompt, which `prompt_ids` returns.

    Args:
        tokenizer: any fast tokenizer; one without a pad token pads with its end token.
        image: timm's data settings; missing ones are taken from `IMAGE_DEFAULTS`.
        prompt: text that every caption continues, such as `A photo of`.
        max_length: tokens above which a training text is cut, start token and prompt included.
    """

    def __init__(
        self, tokenizer: Any = None, image: dict | None = None, prompt: str = "", max_length: int = 40
    ) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # texts are continued on the right
        self.image = {key: (image or {}).get(key, default) for key, default in IMAGE_DEFAULTS.items()}
        self.prompt, self.max_length = prompt, max_length
        self._transform = create_transform(**self.image)
        super().__init__(tokenizer)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "CaptionerProcessor":
        """Load a processor from a folder or the hub; see transformers for the options."""
        # The tokenizer's own files name its class. Without this, transformers would read the configuration of the
        # captioner, and warn that it does not know such models.
        kwargs.setdefault("config", PretrainedConfig())
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def start_token_id(self) -> int:
        """The token that every text starts with: bos, or eos where a tokenizer has no bos."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def prompt_ids(self, text: str = "") -> list[int]:
        """Return the ids of the start token and of a text to continue; for an empty text, of the prompt."""
        return [self.start_token_id, *self._ids([text or self.prompt])[0]]

    def tag_ids(self, names: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each tag's name, as of a word within a caption; the decoder reads them before a text.

        Raises:
            ValueError: the tokenizer cannot write a name.
        """
        rows = self._ids([f" {name}" for name in names]) if names else []
        special = set(self.tokenizer.all_special_ids)
        for name, row in zip(names, rows, strict=True):
            if not row or special.intersection(row):
                raise ValueError(f"the tokenizer cannot write the tag '{name}'")
        return rows

    def prompts(self, count: int, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """Return the start token and the prompt for each of `count` images, as arguments of `CaptionerModel.generate`.

        Returns:
            `input_ids` and `attention_mask`, each (count, T).
        """
        input_ids = torch.tensor([self.prompt_ids()], device=device).expand(count, -1)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def pixels(self, image: ImageSource) -> torch.Tensor:
        """Open one image and transform it into pixels (3, H, W).

        Raises:
            ImageError: the image cannot be used.
        """
        return self._transform(open_image(image))

    def texts(self, captions: Sequence[str]) -> "Texts":
        """Encode captions for training: start token, prompt, caption, end token. `Texts.batch` then batches them.

        The full stop of a caption is left out. A caption that is too long is cut to `max_length` tokens. It gets no end
        token, so that the model does not learn to end there; `Texts.cut` counts these captions.
        """
        lead, end, longest = self.prompt_ids(), self.tokenizer.eos_token_id, self.max_length
        # A caption after a prompt continues a sentence; for byte-level tokenizers, it then starts with a space.
        tidy = [(" " if self.prompt else "") + c.strip().removesuffix(".").rstrip() for c in captions]
        rows = (
            np.array([*lead, *ids, end][:longest], np.int32)
            for start in range(0, len(tidy), 10_000)  # COCO's 600,000 at once would take gigabytes
            for ids in self._ids(tidy[start : start + 10_000])
        )
        return Texts(rows, len(lead), end, self.tokenizer.pad_token_id)

    def text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode captions for training as one batch; returns the tensors of `Texts.batch`."""
        return self.texts(captions).batch(range(len(captions)))

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Literal["left", "right"] = "left",
        tags: Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> BatchFeature:
        """Turn images, and texts to continue, into the arguments of `CaptionerModel.generate`.

        Training captions have an end token and labels; the methods `text` and `texts` encode them.

        Args:
            images: one image or B of them.
            text: text that the captions continue: one for all images, or one for each. `None` and an empty text stand
                for the processor's `prompt`.
            return_tensors: `pt`, `np`, or `None` for lists of tokens.
            padding: `True` or `longest`, `max_length`, or `False`.
            truncation: whether a text of more than `max_length` tokens is cut; the start token counts.
            max_length: longest text in tokens; `None` for the processor's own.
            pad_to_multiple_of: see transformers' tokenizers.
            padding_side: side of the padding; `generate` needs it on the left.
            tags: names of object tags, which stand before the start token: one list for all images, or one for each.
                Only a captioner that was trained with tags can read them. With `None`, it predicts its own.

        Returns:
            `pixel_values` (B, 3, H, W) if there are images; `input_ids` and `attention_mask` (B, T) of tags, start
            token and text.

        Raises:
            ImageError: an image cannot be used.
            ValueError: there are neither images nor texts, not one text or one list of tags for each image, or a tag
                that the tokenizer cannot write.
        """
        if images is None and text is None:
            raise ValueError("nothing to process: give images, text or both")
        data: dict[str, Any] = {}
        if images is not None:
            batch = [
                image[0] if isinstance(image, list | tuple) and len(image) == 1 else image
                for image in each_image(images)
            ]
            if not batch:
                raise ValueError("no image: the list of images is empty")
            data["pixel_values"] = torch.stack([self.pixels(image) for image in batch])
        count = None if images is None else len(data["pixel_values"])
        texts = [text or ""] * (count or 1) if text is None or isinstance(text, str) else list(text)
        if count is not None and len(texts) != count:
            raise ValueError(f"{len(texts)} texts for {count} images; give one text for all of them or one for each")
        longest = self.max_length if max_length is None else max_length
        ids = [self.prompt_ids(text)[: longest if truncation else None] for text in texts]
        if tags is not None:
            groups: list[Any] = list(tags)
            if all(isinstance(group, str) for group in groups):
                groups = [groups] * len(ids)
            if len(groups) != len(ids):
                raise ValueError(f"{len(groups)} lists of tags for {len(ids)} texts; give one for all or one for each")
            words = ([token for row in self.tag_ids(group) for token in row] for group in groups)
            ids = [[*before, *row] for before, row in zip(words, ids, strict=True)]
        data |= pad_without_fast_tokenizer_warning(
            self.tokenizer,
            {"input_ids": ids},
            padding=padding,
            max_length=longest if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=True,
        )
        return BatchFeature(data, tensor_type=return_tensors)

    def captions(self, sequences: torch.Tensor, prompt_length: int | None = None) -> list[str]:
        """Decode generated texts (B, T) into B captions of one line each, without special tokens and prompt.

        Reference captions do not start with the prompt, so captions with it would get lower scores.

        Args:
            sequences: texts that `CaptionerModel.generate` returned.
            prompt_length: number of first tokens to leave out; `None` for those of start token and `prompt`.
        """
        length = len(self.prompt_ids()) if prompt_length is None else prompt_length
        texts = self.tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def post_process_image_text_to_text(
        self, generated_outputs: torch.Tensor, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decode texts (B, T), prompt included, without the space that many tokenizers put before the first word."""
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.lstrip() for text in texts]

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Refuse a chat: a captioner continues a text about an image and follows no instructions.

        Raises:
            ValueError: always.
        """
        raise ValueError("a captioner has no chat template: give it images, and as text the start of the caption")

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["pixel_values", "input_ids", "attention_mask"]


class Texts:
    """Encoded captions, concatenated into one array.

    Args:
        rows: token ids of each caption.
        lead: number of tokens of start token and prompt in each caption.
        end: id of the end token.
        pad: id of the padding token.

    Attributes:
        cut: number of captions that were cut.
    """

    def __init__(self, rows: Iterable[np.ndarray], lead: int, end: int, pad: int):
        rows = list(rows)
        self.lengths = np.array([len(row) for row in rows])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.ids, self.lead, self.pad = np.concatenate(rows), lead, pad
        self.cut = int((self.ids[self.starts + self.lengths - 1] != end).sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def warn_cut(self, limit: int, scope: str = "") -> None:
        """Warn of captions that were cut, if there are any.

        Args:
            limit: the tokens to which they were cut.
            scope: which captions these are, for the warning.
        """
        if self.cut:
            message = (
                "%d of %d captions%s have more than %d tokens (max_length): they are cut, and learned without an end"
            )
            logger.warning(message, self.cut, len(self), f" {scope}" if scope else "", limit)

    def batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Batch the captions with these numbers, padded on the right to the longest.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each (captions, T). Start token, prompt and padding have no
            label.
        """
        lengths, places = self.lengths[numbers][:, None], np.arange(self.lengths[numbers].max())
        filled = places < lengths  # (captions, T)
        input_ids = np.where(filled, self.ids[np.where(filled, self.starts[numbers][:, None] + places, 0)], self.pad)
        labels = np.where(filled & (places >= self.lead), input_ids, IGNORED)
        arrays = {"input_ids": input_ids, "attention_mask": filled, "labels": labels}
        return {key: torch.from_numpy(array.astype(np.int64)) for key, array in arrays.items()}


def train_tokenizer(captions: Sequence[str], vocab_size: int = 8000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on captions, with `<s>`, `</s>` and `<pad>` as special tokens.

    Args:
        captions: the captions.
        vocab_size: largest number of tokens.

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
