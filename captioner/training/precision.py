"""The number format of a run."""

import torch


def pick_precision(wanted: str) -> str:
    """Resolve `auto`: bf16 on GPUs that have it, else none."""
    if wanted != "auto":
        return wanted
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
