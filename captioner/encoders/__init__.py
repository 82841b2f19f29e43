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
from captioner.encoders.tore import MidwayTokens, Rectangle
from captioner.encoders.tore_networks import ToreLookupViT, ToreViT
from captioner.encoders.tosa import ToSA

__all__ = [
    "LookupViT",
    "MidwayTokens",
    "PooledEncoder",
    "PretrainedPart",
    "Rectangle",
    "STViT",
    "STViTSwin",
    "ToSA",
    "TokenEncoder",
    "TokenMaps",
    "ToreLookupViT",
    "ToreViT",
    "create_encoder",
    "describe_encoder",
    "frozen_encoder",
    "own_encoders",
    "rebuild_encoder",
    "unsaved_buffers",
]
