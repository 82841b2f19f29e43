"""Image captioning when cost per image matters: a frozen LookupViT, a projector, any Hugging Face decoder.

Public names are imported when first touched, so that `import captioner` stays light.
"""

from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.configuration import CaptionerConfig as CaptionerConfig
    from captioner.data.readers import read_captions as read_captions
    from captioner.encoders import LookupViT as LookupViT
    from captioner.encoders import PooledEncoder as PooledEncoder
    from captioner.encoders import TokenEncoder as TokenEncoder
    from captioner.encoders import create_encoder as create_encoder
    from captioner.images import ImageError as ImageError
    from captioner.images import open_image as open_image
    from captioner.inference import Caption as Caption
    from captioner.inference import Captioner as Captioner
    from captioner.inference import caption as caption
    from captioner.inference import load as load
    from captioner.modeling import CaptionerModel as CaptionerModel
    from captioner.modeling import Projector as Projector
    from captioner.processing import CaptionerProcessor as CaptionerProcessor
    from captioner.transformers_auto import ImageToTextPipeline as ImageToTextPipeline
    from captioner.transformers_auto import register as register

with suppress(PackageNotFoundError):  # in a clone that is not installed, the command line and `__getattr__` say so
    __version__ = version("captioner")

_HOME = {
    "Caption": "inference",
    "Captioner": "inference",
    "CaptionerConfig": "configuration",
    "CaptionerModel": "modeling",
    "CaptionerProcessor": "processing",
    "ImageError": "images",
    "ImageToTextPipeline": "transformers_auto",
    "LookupViT": "encoders",
    "PooledEncoder": "encoders",
    "Projector": "modeling",
    "TokenEncoder": "encoders",
    "caption": "inference",
    "create_encoder": "encoders",
    "load": "inference",
    "open_image": "images",
    "read_captions": "data.readers",
    "register": "transformers_auto",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'captioner' has no attribute '{name}'")
    if "__version__" not in globals():
        raise ImportError("captioner is not installed here: run `pip install .` in its folder first")
    return getattr(import_module(f"captioner.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
