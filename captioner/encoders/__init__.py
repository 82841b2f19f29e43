"""Token-compressing image encoders; importing this package registers them with timm."""

from captioner.encoders.base import PretrainedPart, TokenEncoder, TokenMaps, unsaved_buffers
from captioner.encoders.lookupvit import LookupViT
from captioner.encoders.registry import (
    create_encoder,
    describe_encoder,
    frozen_encoder,
    own_encoders,
    rebuild_encoder,
)
from captioner.encoders.stvit import STViT
from captioner.encoders.stvit_swin import STViTSwin
from captioner.encoders.timm_models import PooledEncoder

__all__ = [
    "LookupViT",
    "PooledEncoder",
    "PretrainedPart",
    "STViT",
    "STViTSwin",
    "TokenEncoder",
    "TokenMaps",
    "create_encoder",
    "describe_encoder",
    "frozen_encoder",
    "own_encoders",
    "rebuild_encoder",
    "unsaved_buffers",
]
