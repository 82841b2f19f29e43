"""The decoding loops: our greedy and beam search, and transformers' `generate` for everything else."""

from captioner.generation.methods import CaptionGeneration
from captioner.generation.settings import check_room

__all__ = ["CaptionGeneration", "check_room"]
