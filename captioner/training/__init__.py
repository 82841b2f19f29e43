"""Training of the decoder: the cross-entropy stage and the self-critical stage."""
