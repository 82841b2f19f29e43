"""Start a LookupViT from the weights of a ViT of the same width.

The patch embedding and the positions are copied. Each LookupViT block takes one block of the ViT: its attention and MLP
become the refinement block, and its attention weights also become those of information gathering, which then starts as
the ViT's own attention to the patches. The parts without a counterpart in the ViT (infusion, the lookup MLP) end in a
projection of zeros, so that they change nothing at first.

The types of timm's models are `Any` here, because timm has no base class that declares their layers.
"""

from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import nn

from captioner.encoders.maps import resize_tokens
from captioner.encoders.registry import create_timm
from captioner.errors import SettingError


def init_from_vit(encoder: Any, vit: Any) -> None:
    """Copy a ViT's weights into a LookupViT, in place.

    From a deeper ViT, evenly spaced blocks are taken, from the first to the last.

    Args:
        encoder: the LookupViT.
        vit: timm name of a ViT, which is loaded with pretrained weights, or a timm ViT itself.

    Raises:
        ValueError: the encoder has a conv stem, the ViT's weights cannot be loaded, or its width, heads, patch or depth
            do not fit the encoder.
    """
    if not isinstance(encoder.patch_embed, PatchEmbed):
        raise SettingError(
            "a LookupViT with a conv stem has no place for a ViT's patch embedding: give stem=patch", "encoder_options"
        )
    if isinstance(vit, str):
        vit = create_timm("ViT", vit, "init_from", pretrained=True, num_classes=0)
    check_fit(encoder, vit)
    with torch.no_grad():
        encoder.patch_embed.proj.load_state_dict(vit.patch_embed.proj.state_dict(), strict=False)
        copy_positions(encoder, vit)
        last = len(vit.blocks) - 1
        for i, block in enumerate(encoder.blocks):
            copy_block(block, vit.blocks[round(i * last / max(len(encoder.blocks) - 1, 1))])
        encoder.norm.load_state_dict(vit.norm.state_dict())


def check_fit(encoder: Any, vit: Any) -> None:
    """Refuse a ViT whose shapes differ from the encoder's.

    Raises:
        ValueError: a shape differs, or the ViT has other layers or fewer blocks.
    """
    if not hasattr(vit, "blocks") or not hasattr(vit, "patch_embed") or not hasattr(vit.blocks[0], "attn"):
        raise SettingError(f"{type(vit).__name__} is not a ViT of attention blocks", "init_from")
    ours, theirs = encoder.blocks[0].refine, vit.blocks[0]
    pairs = {
        "width": (encoder.embed_dim, vit.embed_dim),
        "attention heads": (ours.attn.num_heads, theirs.attn.num_heads),
        "MLP width": (ours.mlp.fc1.out_features, theirs.mlp.fc1.out_features),
        "patch": (tuple(encoder.patch_embed.patch_size), tuple(vit.patch_embed.patch_size)),
    }
    for what, (own, other) in pairs.items():
        if own != other:
            raise SettingError(f"the ViT's {what} is {other}, the encoder's {own}; they must be equal", "init_from")
    names = set(ours.state_dict()) ^ set(theirs.state_dict())
    if names:
        raise SettingError(
            f"the ViT's blocks are not those of the encoder: only one of them has '{min(names)}'", "init_from"
        )
    if len(vit.blocks) < len(encoder.blocks):
        raise SettingError(
            f"the ViT has {len(vit.blocks)} blocks, fewer than the encoder's {len(encoder.blocks)}", "init_from"
        )


def copy_positions(encoder: Any, vit: Any) -> None:
    """Copy the class token and the positional embedding, which is resized for the compressed tokens."""
    class_token, positions = read_positions(vit)
    encoder.pos_lookup.copy_(resize_tokens(positions, encoder.pos_lookup.shape[1:3]))
    encoder.pos_compressed.copy_(resize_tokens(positions, encoder.pos_compressed.shape[1:3]))
    if class_token is not None:
        encoder.cls_token.copy_(class_token)


def read_positions(vit: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return a ViT's class token (1, 1, D) with its position, `None` without one, and its positions (1, h, w, D)."""
    prefix = vit.pos_embed.shape[1] - vit.patch_embed.num_patches  # 1, or 0 where the class token has no position
    positions = vit.pos_embed[:, prefix:].unflatten(1, vit.patch_embed.grid_size)
    if vit.cls_token is None:
        return None, positions
    return vit.cls_token + (vit.pos_embed[:, :1] if prefix else 0), positions


def copy_block(block: Any, source: Any) -> None:
    """Fill a `LookupBlock` from a ViT's block."""
    block.refine.load_state_dict(source.state_dict())
    block.norm_compressed.load_state_dict(source.norm1.state_dict())
    block.norm_lookup.load_state_dict(source.norm1.state_dict())
    cross, attention = block.cross, source.attn
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    for layer, weight, bias in zip((cross.q, cross.k, cross.v), weights, biases, strict=True):
        layer.weight.copy_(weight)
        if layer.bias is not None:  # a key bias changes nothing
            layer.bias.copy_(bias)
    cross.proj.load_state_dict(attention.proj.state_dict())
    if not block.last:
        cross.infuse_v.load_state_dict(cross.v.state_dict())
        for layer in (cross.infuse_proj, block.lookup_mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
