"""Captions, images and cached tokens: everything that is read from disk."""
