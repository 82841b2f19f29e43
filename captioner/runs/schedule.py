"""The learning rate over a run."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup


def learning_rates(optimizer: torch.optim.Optimizer, peak: float, warmup: float, step: int, total: int) -> LambdaLR:
    """Schedule the learning rate from a step on. It depends only on the step and the settings of this run.

    A checkpoint does not restore it, so that a resumed run may have another learning rate or another length.

    Args:
        optimizer: the optimiser.
        peak: highest learning rate.
        warmup: share of the steps in which the rate rises linearly; then it falls as a cosine.
        step: steps done.
        total: steps of the run.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    return get_cosine_schedule_with_warmup(optimizer, int(warmup * total), total, last_epoch=step - 1)
