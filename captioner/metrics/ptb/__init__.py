"""Penn Treebank tokenization of captions, as the official scores use it."""

from captioner.metrics.ptb.tokenizer import tokenize, tokenize_caption

__all__ = ["tokenize", "tokenize_caption"]
