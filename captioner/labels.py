"""Labels of texts: which tokens are learned, at which positions they are predicted, and the loss on them.

The logits at a position predict the next token. The label at a position is the token there if it is learned, or
`IGNORED`.

Letters: B texts, K of them for an image, T0 tokens of the prompt, T tokens, N tokens that are learned, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

IGNORED = -100
"""Label of tokens that are not learned, as in transformers."""


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that the logits at each position but the last predict, (B, T-1)."""
    return labels[:, 1:]


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Count the learned tokens of labels (B, T); returns a scalar tensor on their device."""
    return (next_labels(labels) != IGNORED).sum()


def split_targets(text: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Split labelled texts into the inputs of a model and the tokens that it should predict.

    Args:
        text: `input_ids`, `attention_mask` and `labels` (B, T).

    Returns:
        The arguments of `CaptionerModel.logits_at`: `input_ids` and `attention_mask` (B, T-1), which lack the last
        token, and `positions` (B, T-1), true where the next token is learned. And those tokens, (N,).
    """
    labels = next_labels(text["labels"])
    positions = labels != IGNORED
    inputs = {name: text[name][:, :-1] for name in ("input_ids", "attention_mask")}
    return inputs | {"positions": positions}, labels[positions]


def put_before(text: dict[str, torch.Tensor], before: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Put tokens before labelled texts, such as the words of their tags; these are read and not learned.

    Args:
        text: `input_ids`, `attention_mask` and `labels` (B, T), padded on the right.
        before: the tokens for each of the B texts, which may be none.

    Returns:
        The same, as long as the longest text is now.
    """
    most = max(map(len, before), default=0)
    if not most:
        return text
    device, (count, length) = text["input_ids"].device, text["input_ids"].shape
    front = torch.zeros(count, most, dtype=torch.long)
    for row, tokens in enumerate(before):
        front[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    lengths = torch.tensor([len(tokens) for tokens in before], device=device)[:, None]  # (B, 1)
    places = torch.arange(most + length, device=device)[None] - lengths  # (B, most+T), in the text
    source = places.clamp(0, length - 1)
    moved = {name: values.gather(1, source) for name, values in text.items()}
    filled = F.pad(front.to(device), (0, length))
    moved["input_ids"] = torch.where(places < 0, filled, moved["input_ids"])
    moved["attention_mask"] = torch.where(places < 0, 1, moved["attention_mask"]).masked_fill(places >= length, 0)
    moved["labels"] = moved["labels"].masked_fill((places < 0) | (places >= length), IGNORED)
    longest = int(moved["attention_mask"].sum(1).max())
    return {name: values[:, :longest] for name, values in moved.items()}


def token_loss(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0, reduction: str = "sum"
) -> torch.Tensor:
    """Compute the cross-entropy of tokens, in float32.

    Args:
        logits: (..., V).
        targets: tokens (...); those that are `IGNORED` have no loss.
        label_smoothing: share of the probability that is spread over the vocabulary.
        reduction: `sum` over all tokens, or `none` for the loss of each.
    """
    logits = logits.flatten(0, -2).float()
    return F.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing, reduction=reduction
    )


def label_generated(
    sequences: torch.Tensor,
    prompt_length: int,
    end: int | list[int] | None,
    prompt_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Label generated texts: every token after the prompt is learned, up to the end token, which is learned, too.

    Args:
        sequences: texts (B*K, T), prompt included; what follows an end token is padding.
        prompt_length: tokens of the prompt, T0.
        end: the end token, or several of them.
        prompt_mask: 0 where a prompt is padded on its left (B, T0). Such rows are moved to the left, because padding
            before a text would change its positions.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (B*K, T).
    """
    prompt, generated = sequences[:, :prompt_length], sequences[:, prompt_length:]
    ends = torch.isin(generated, torch.tensor([] if end is None else end).to(generated))
    padding = ends.cumsum(1) - ends.long() > 0
    mask = torch.ones_like(prompt)
    if prompt_mask is not None:
        mask = prompt_mask.to(mask).repeat_interleave(len(prompt) // len(prompt_mask), 0)
    text = {
        "input_ids": sequences,
        "attention_mask": torch.cat([mask, (~padding).long()], 1),
        "labels": torch.cat([torch.full_like(prompt, IGNORED), generated.masked_fill(padding, IGNORED)], 1),
    }
    if prompt_mask is not None:
        order = (1 - text["attention_mask"]).argsort(dim=1, stable=True)
        text = {name: values.gather(1, order) for name, values in text.items()}
    return text
