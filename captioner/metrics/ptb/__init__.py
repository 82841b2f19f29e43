"""Penn Treebank tokenization of captions, as the official scores have it."""

from captioner.metrics.ptb.tokenizer import tokenize, tokenize_caption

__all__ = ["tokenize", "tokenize_caption"]
