"""Training: the encoder's pretraining, the decoder's cross-entropy and self-critical stages."""
