"""Which tokens of a text are to be learned, and what is read before each of them.

Letters: B texts, T their tokens, N tokens to be said in all.
"""

import torch

IGNORED = -100
"""Label of text positions that carry no loss, as everywhere in transformers."""


def label_generated(prompt: torch.Tensor, sequences: torch.Tensor, end: int) -> dict[str, torch.Tensor]:
    """Arrange generated tokens as text to learn: prompt and what follows the end have no label.

    Args:
        prompt: what each began with (B, T0).
        sequences: what was generated (B, T1), padded with anything after the end token.
        end: the end token.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (B, T0 + T1).
    """
    ends = sequences == end
    after = ends.cumsum(1) - ends.long() > 0
    return {
        "input_ids": torch.cat([prompt, sequences], 1),
        "attention_mask": torch.cat([torch.ones_like(prompt), (~after).long()], 1),
        "labels": torch.cat([torch.full_like(prompt, IGNORED), sequences.masked_fill(after, IGNORED)], 1),
    }


def next_tokens(text: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Turn labelled text into what is to be read, and what is then to be said.

    Args:
        text: `input_ids`, `attention_mask` and `labels` (B, T).

    Returns:
        `input_ids` and `attention_mask` (B, T-1) of all but the last token, with `wanted` where the next one is to be
        said, as `CaptionerModel` takes them; and those next tokens (N,), as `cross_entropy` does.
    """
    labels = text["labels"][:, 1:]
    read = {name: text[name][:, :-1] for name in ("input_ids", "attention_mask")}
    return read | {"wanted": labels != IGNORED}, labels[labels != IGNORED]
