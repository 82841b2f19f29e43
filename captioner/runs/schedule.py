"""The learning rate over a run."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup


def learning_rates(optimizer: torch.optim.Optimizer, peak: float, warmup: float, step: int, total: int) -> LambdaLR:
    """Schedule the learning rate from a step on: a function of the step and of this run's settings alone.

    It is therefore not restored from a checkpoint, whose learning rate or length may be what has to change.

    Args:
        optimizer: whose learning rate it is.
        peak: highest learning rate.
        warmup: share of the steps in which it rises linearly; then it falls as a cosine.
        step: steps done.
        total: steps of the run.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    return get_cosine_schedule_with_warmup(optimizer, int(warmup * total), total, last_epoch=step - 1)
