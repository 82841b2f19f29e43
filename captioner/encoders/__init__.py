"""Token-compressing image encoders; importing this package registers them with timm."""

from captioner.encoders.base import TokenEncoder
from captioner.encoders.lookupvit import LookupViT
from captioner.encoders.registry import build_encoder, create_encoder, encoder_config, frozen_encoder
from captioner.encoders.timm_models import PooledEncoder

__all__ = [
    "LookupViT",
    "PooledEncoder",
    "TokenEncoder",
    "build_encoder",
    "create_encoder",
    "encoder_config",
    "frozen_encoder",
]
