"""Labels of texts: which tokens are learned, at which positions they are predicted, and the loss on them.

The logits at a position predict the next token. The label at a position is the token there if it is learned, or
`IGNORED`.

Letters: B texts, K of them for an image, T0 tokens of the prompt, T tokens, N tokens that are learned, V vocabulary.
"""

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
