"""The learning rate over a run."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from captioner.pretraining.config import PretrainConfig
from captioner.training.config import TrainConfig


def learning_rates(
    optimizer: torch.optim.Optimizer, config: TrainConfig | PretrainConfig, step: int, total: int
) -> LambdaLR:
    """Schedule the learning rate from a step on: a function of the step and of this run's settings alone.

    It is therefore not restored from a checkpoint, whose learning rate or length may be what has to change.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.learning_rate
    return get_cosine_schedule_with_warmup(optimizer, int(config.warmup * total), total, last_epoch=step - 1)
