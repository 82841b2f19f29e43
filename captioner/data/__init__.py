"""Read captions, images and cached tokens from disk."""
