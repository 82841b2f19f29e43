"""`captioner train`: train a caption decoder on a frozen encoder."""

from captioner.recipes import TRAIN
from captioner.training.config import TrainConfig

SETTINGS = TRAIN
"""Recipes by name; the first word of the command picks one, the options change it."""


def run(config: TrainConfig) -> int:
    """Train, and return the exit code."""
    from captioner.training.loop import train

    train(config)
    return 0
