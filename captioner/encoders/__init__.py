"""Token-compressing image encoders; importing this package registers them with timm."""

from captioner.encoders.base import Grid, TokenEncoder, build_encoder, create_encoder, encoder_config
from captioner.encoders.lookupvit import LookupViT
from captioner.encoders.pooling import PooledEncoder

__all__ = ["Grid", "LookupViT", "PooledEncoder", "TokenEncoder", "build_encoder", "create_encoder", "encoder_config"]
