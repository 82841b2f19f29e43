"""`captioner pretrain`: make an encoder."""

from captioner.pretraining.config import PretrainConfig
from captioner.recipes import PRETRAIN

SETTINGS = PRETRAIN
"""Recipes by name; the first word of the command picks one, the options change it."""


def run(config: PretrainConfig) -> int:
    """Pretrain, and return the exit code."""
    from captioner.pretraining.loop import pretrain

    pretrain(config)
    return 0
