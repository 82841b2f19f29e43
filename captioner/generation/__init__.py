"""The decoding loops: our greedy and beam search, and transformers' `generate` for everything else."""

from captioner.generation.call import generate_texts
from captioner.generation.settings import check_room

__all__ = ["check_room", "generate_texts"]
