"""The tag head: it reads the frozen tokens of an image, and predicts which tags the image has.

A trained head is a folder: `tags.json` holds its `TagConfig` and the encoder that it was trained on, and
`model.safetensors` its weights.

Letters: B images, M image tokens, D their width, H hidden width, K tags.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from captioner.errors import SettingError, check_positive, check_shares
from captioner.tags import TagVocabulary
from captioner.text_files import parse_json_text, read_text

DESCRIPTION, WEIGHTS = "tags.json", "model.safetensors"
"""Files of a trained head."""


@dataclass(frozen=True)
class TagConfig:
    """What a tag head predicts, and which of its tags a captioner names."""

    vocabulary: TagVocabulary
    """The tags."""
    hidden: int = 512
    """Width H of the head's hidden layer."""
    min_tag: float = 0.35
    """Least probability of a tag that is named."""
    max_tags: int = 6
    """Most tags that are named: the most probable ones."""
    tokens: tuple[tuple[int, ...], ...] = ()
    """The decoder's tokens of each tag's name; none where the head belongs to no captioner yet."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden", "max_tags")
        check_shares(self, "min_tag")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TagConfig":
        """Make the settings of what `to_dict` returned; other entries are ignored.

        Raises:
            ValueError: the content has another form.
        """
        vocabulary = TagVocabulary.from_dict(content)
        numbers = {name: content[name] for name in ("hidden", "min_tag", "max_tags") if name in content}
        for name, value in numbers.items():
            if type(value) is not int and (name != "min_tag" or type(value) is not float):
                raise ValueError(f"{name} of the tags is not a number: {value!r}")
        tokens = content.get("tokens", ())
        if not isinstance(tokens, list | tuple) or not all(map(is_numbers, tokens)):
            raise ValueError("the tokens of the tags are not lists of numbers")
        return cls(vocabulary, **numbers, tokens=tuple(map(tuple, tokens)))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for JSON."""
        rest: dict[str, Any] = {"hidden": self.hidden, "min_tag": self.min_tag, "max_tags": self.max_tags}
        return self.vocabulary.to_dict() | rest | ({"tokens": list(map(list, self.tokens))} if self.tokens else {})

    def check_tokens(self, vocab_size: int) -> None:
        """Refuse tags without tokens of a decoder's vocabulary.

        Raises:
            ValueError: the message names the first such tag.
        """
        if len(self.tokens) != len(self.vocabulary):
            raise ValueError(f"there are {len(self.vocabulary)} tags, and the tokens of {len(self.tokens)}")
        for name, row in zip(self.vocabulary.names, self.tokens, strict=True):
            if not row or not all(0 <= token < vocab_size for token in row):
                raise ValueError(f"the decoder has no tokens of the tag '{name}'")

    def words_of(self, tags: Sequence[int]) -> list[int]:
        """Return the decoder's tokens of tags, one tag after the other.

        Raises:
            ValueError: there is no such tag.
        """
        for tag in tags:
            if not 0 <= tag < len(self.tokens):
                raise ValueError(f"there is no tag {tag}; the captioner has {len(self.tokens)}, from 0")
        return [token for tag in tags for token in self.tokens[tag]]

    def most_words(self) -> int:
        """Return the largest number of the decoder's tokens that the tags of an image take."""
        return sum(sorted(map(len, self.tokens))[-self.max_tags :])

    def pick(
        self, probabilities: torch.Tensor, min_tag: float | None = None, max_tags: int | None = None
    ) -> list[list[int]]:
        """Pick the tags of images that are named.

        Args:
            probabilities: of all tags (B, K).
            min_tag: least probability; `None` for this configuration's.
            max_tags: most tags of an image, 0 for none; `None` for this configuration's.

        Returns:
            For each image the numbers of its tags, the most probable first.
        """
        least = self.min_tag if min_tag is None else min_tag
        most = self.max_tags if max_tags is None else max_tags
        ordered = probabilities.sort(dim=1, descending=True, stable=True)
        counts = (ordered.values >= least).sum(1).clamp(max=most).tolist()
        return [row[:count] for row, count in zip(ordered.indices.tolist(), counts, strict=True)]


def is_numbers(value: Any) -> bool:
    """Return whether a value is a list of whole numbers."""
    return isinstance(value, list | tuple) and all(type(number) is int for number in value)


class TagHead(nn.Module):
    """Predicts the probability of each tag from image tokens (B, M, D) of any grid.

    Each token is normalised. Then the mean and the maximum over the tokens of the grid, and the class token if there is
    one, pass a perceptron with one hidden layer: the mean knows what fills the image, the maximum what is small in it.

    Args:
        width: width of the image tokens D.
        tags: number of tags K.
        hidden: width of the hidden layer H.
        prefix_tokens: tokens before those of the grid, of which the first is the class token.
        dropout: share of the channels that training drops before each linear layer.

    Attributes:
        mean: mean of each feature over the training images, (F,).
        std: its standard deviation, (F,).
        scale: factor of each tag's logit (K,); with `shift` it makes the probabilities calibrated (Platt, 1999).
        shift: summand of each tag's logit (K,).
    """

    frozen: bool = False
    mean: torch.Tensor
    std: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, width: int, tags: int, hidden: int = 512, prefix_tokens: int = 0, dropout: float = 0.0):
        super().__init__()
        features = (3 if prefix_tokens else 2) * width
        self.width, self.prefix_tokens, self.dropout = width, prefix_tokens, dropout
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, tags)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("scale", torch.ones(tags))
        self.register_buffer("shift", torch.zeros(tags))

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pool tokens (B, M, D) into features (B, F), in float32; no weight of the head takes part.

        Raises:
            ValueError: the tokens have another width than the head's, or there are none of a grid.
        """
        if tokens.shape[-1] != self.width or tokens.shape[1] <= self.prefix_tokens:
            raise ValueError(
                f"the image tokens are {tokens.shape[1]} of width {tokens.shape[-1]}, and the tag head reads tokens of "
                f"width {self.width}, the first {self.prefix_tokens} of the whole image"
            )
        x = F.layer_norm(tokens.float(), (self.width,))
        grid = x[:, self.prefix_tokens :]
        parts = [grid.mean(1), grid.amax(1)] + ([x[:, 0]] if self.prefix_tokens else [])
        return torch.cat(parts, 1)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Compute the logits (B, K) of pooled features (B, F), before calibration."""
        x = ((features - self.mean) / self.std).clamp(-4, 4).to(self.fc1.weight.dtype)
        x = F.gelu(self.fc1(F.dropout(x, self.dropout, self.training)))  # (B, H)
        return self.fc2(F.dropout(x, self.dropout, self.training))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Predict the calibrated probabilities (B, K) of tokens (B, M, D), in float32."""
        logits = self.classify(self.pool(tokens)).float()
        return (logits * self.scale.float() + self.shift.float()).sigmoid()

    def freeze(self) -> "TagHead":
        """Freeze the head: no parameter gets a gradient, and it stays in eval mode after `train()`; returns self."""
        self.frozen = True
        return self.eval()

    def train(self, mode: bool = True) -> "TagHead":
        """Switch training mode; a frozen head stays as it is, as a frozen encoder does."""
        if self.frozen:
            self.requires_grad_(False)
        return super().train(mode and not self.frozen)

    @property
    def multiplications(self) -> int:
        """Number of multiply-accumulates of the linear layers for one image."""
        return self.fc1.weight.numel() + self.fc2.weight.numel()


def read_description(folder: Path) -> dict[str, Any]:
    """Read `tags.json` of a trained head.

    Raises:
        SettingError: there is none.
        ValueError: it has another form.
    """
    path = folder / DESCRIPTION
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise SettingError(f"no tag head at '{folder}': it is a folder with {DESCRIPTION} and {WEIGHTS}", "tags")
    content = parse_json_text(read_text(path), path)
    if not isinstance(content, dict) or not {"names", "words", "width", "hidden", "source"} <= content.keys():
        raise ValueError(f"'{path}' does not describe a tag head")
    return content


def load_head(folder: Path, width: int, prefix_tokens: int) -> tuple[TagHead, TagConfig]:
    """Load a trained head.

    Args:
        folder: its folder.
        width: width D of the image tokens that it is to read.
        prefix_tokens: tokens before those of the grid.

    Raises:
        SettingError: there is no head, or it reads tokens of another width.
        ValueError: its files are damaged.
    """
    content = read_description(folder)
    try:
        config = TagConfig.from_dict(content)
    except ValueError as error:
        raise ValueError(f"'{folder / DESCRIPTION}': {error}") from None
    if content["width"] != width:
        raise SettingError(
            f"the tag head '{folder}' reads tokens that are {content['width']} wide, and the encoder's are {width}",
            "tags",
        )
    head = TagHead(width, len(config.vocabulary), config.hidden, prefix_tokens)
    try:
        head.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{folder / WEIGHTS}' does not fit '{DESCRIPTION}' beside it: {reason}") from None
    return head.freeze(), config
