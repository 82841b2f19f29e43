"""Token-compressing image encoders; importing this package registers them with timm."""

from captioner.encoders.base import PretrainedPart, TokenEncoder, TokenMaps
from captioner.encoders.lookupvit import LookupViT
from captioner.encoders.registry import (
    create_encoder,
    describe_encoder,
    frozen_encoder,
    own_encoders,
    rebuild_encoder,
)
from captioner.encoders.timm_models import PooledEncoder

__all__ = [
    "LookupViT",
    "PooledEncoder",
    "PretrainedPart",
    "TokenEncoder",
    "TokenMaps",
    "create_encoder",
    "describe_encoder",
    "frozen_encoder",
    "own_encoders",
    "rebuild_encoder",
]
