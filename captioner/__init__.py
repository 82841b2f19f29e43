"""Image captioning when cost per image matters: a frozen LookupViT, a projector, any Hugging Face decoder.

Public names are imported when first touched, so that `import captioner` stays light.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("captioner")

_HOME = {
    "Caption": "pipeline",
    "Captioner": "pipeline",
    "CaptionerConfig": "modeling",
    "CaptionerModel": "modeling",
    "CaptionerProcessor": "processing",
    "ImageError": "images",
    "ImageToTextPipeline": "pipeline",
    "LookupViT": "encoders",
    "PooledEncoder": "encoders",
    "Projector": "modeling",
    "TokenEncoder": "encoders",
    "caption": "pipeline",
    "create_encoder": "encoders",
    "load": "pipeline",
    "open_image": "images",
    "read_captions": "data.captions",
}

__all__ = ["__version__", "register", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'captioner' has no attribute '{name}'")
    register()
    return getattr(import_module(f"captioner.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def register() -> None:
    """Register the encoders with timm, and model, processor and `image-to-text` pipeline with transformers."""
    import_module("captioner.registration")
