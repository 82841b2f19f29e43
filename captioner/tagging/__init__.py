"""Make a tag head for a vocabulary, on the tokens of any frozen encoder."""
