"""Start an STViT from the weights of the network that it changes: a ViT (DeiT) or a Swin of the same width.

Every layer takes the weights of the network's layer at the same depth. A layer in which semantic tokens are generated,
or image tokens recovered, takes them for its cross-attention, which thus starts as the network's own attention from
fewer queries. LayerScale starts at the network's own factor, or at 1 where it has none: trained layers count in full.

Types: timm's models share no class that declares their layers, so they are `Any` here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from captioner.encoders.from_vit import read_positions
from captioner.encoders.maps import resize_tokens
from captioner.encoders.registry import create_timm
from captioner.encoders.semantic import SemanticUnit
from captioner.errors import SettingError

Numbers = Sequence[float] | torch.Tensor


@torch.no_grad()
def init_from_deit(encoder: Any, source: str | nn.Module, mean: Numbers | None, std: Numbers | None) -> None:
    """Copy a ViT's weights into an `STViT`, in place; of a deeper ViT, layers are taken evenly from first to last.

    Raises:
        SettingError: the ViT's weights cannot be loaded, or do not fit the encoder.
    """
    vit: Any = create_timm("ViT", source, pretrained=True, num_classes=0) if isinstance(source, str) else source
    if not hasattr(vit, "blocks") or not hasattr(vit, "pos_embed") or not hasattr(vit.blocks[0], "attn"):
        raise misfit(vit, "it is not a ViT of attention blocks with positions")
    own = [layer for stage in encoder.stages for layer in layers_of(stage)]
    if len(vit.blocks) < len(own):
        raise misfit(vit, f"it has {len(vit.blocks)} layers, fewer than the encoder's {len(own)}")
    copy_patches(encoder, vit, mean, std)
    last = len(vit.blocks) - 1
    for i, layer in enumerate(own):
        copy_layer(layer, vit.blocks[round(i * last / max(len(own) - 1, 1))], vit)
    class_token, positions = read_positions(vit)
    encoder.pos_embed.copy_(resize_tokens(positions, encoder.pos_embed.shape[1:3]))
    if class_token is not None:
        encoder.cls_token.copy_(class_token)
    copy_parameters(encoder.norm, vit.norm.state_dict(), vit)


@torch.no_grad()
def init_from_swin(encoder: Any, source: str | nn.Module, mean: Numbers | None, std: Numbers | None) -> None:
    """Copy a Swin's weights into an `STViTSwin`, in place.

    Raises:
        SettingError: the Swin's weights cannot be loaded, or do not fit the encoder.
    """
    swin: Any = create_timm("Swin", source, pretrained=True, num_classes=0) if isinstance(source, str) else source
    if not hasattr(swin, "layers") or len(swin.layers) != 4 or not hasattr(swin.layers[0], "blocks"):
        raise misfit(swin, "it is not a Swin of four stages")
    copy_patches(encoder, swin, mean, std)
    copy_parameters(encoder.patch_embed.norm, swin.patch_embed.norm.state_dict(), swin)
    for number, (stage, theirs) in enumerate(zip(encoder.stages, swin.layers, strict=True)):
        parts = getattr(stage, "parts", [stage])
        own = [layer for part in parts for layer in layers_of(part)]
        if len(own) != len(theirs.blocks):
            raise misfit(swin, f"its stage {number + 1} has {len(theirs.blocks)} layers, the encoder's {len(own)}")
        first = getattr(parts[0], "stage", parts[0])
        copy_parameters(first.downsample, theirs.downsample.state_dict(), swin)
        for layer, block in zip(own, theirs.blocks, strict=True):
            copy_layer(layer, block, swin)
    copy_parameters(encoder.norm, swin.norm.state_dict(), swin)


def layers_of(part: Any) -> list[nn.Module]:
    """Return the layers of a part of an encoder, from first to last."""
    if isinstance(part, SemanticUnit):
        return [*part.generation, *part.blocks, *([] if part.recovery is None else [part.recovery])]
    if hasattr(part, "block"):
        return [part.block]
    return list(getattr(part, "stage", part).blocks)


def copy_patches(encoder: Any, network: Any, mean: Numbers | None, std: Numbers | None) -> None:
    """Copy the patch embedding, so scaled that it takes the encoder's input for the network's.

    Args:
        encoder: the STViT.
        network: the trained network.
        mean: mean of the network's input, for pixels in [0, 1]; `None` for what timm knows of it.
        std: standard deviation of the network's input, likewise.
    """
    mean = network.pretrained_cfg["mean"] if mean is None else mean
    std = network.pretrained_cfg["std"] if std is None else std
    conv = network.patch_embed.proj
    own_mean, own_std, mean, std = (
        torch.as_tensor(v, device=conv.weight.device).to(conv.weight.dtype).view(-1, 1, 1)
        for v in (encoder.default_cfg["mean"], encoder.default_cfg["std"], mean, std)
    )
    bias = (conv.weight * (own_mean - mean) / std).sum((1, 2, 3)) + (0 if conv.bias is None else conv.bias)
    copy_parameters(encoder.patch_embed.proj, {"weight": conv.weight * own_std / std, "bias": bias}, network)


def copy_layer(layer: Any, source: Any, network: Any) -> None:
    """Copy a trained layer's weights into a layer of the encoder: a ViT block, a block of Swin or a `CrossBlock`."""
    if layer.attn.num_heads != source.attn.num_heads:
        raise misfit(network, f"it has {source.attn.num_heads} heads where the encoder has {layer.attn.num_heads}")
    weights = source.state_dict()
    for kind in ("weight", "bias"):
        if (whole := weights.get(f"attn.qkv.{kind}")) is not None:
            weights |= {f"attn.{name}.{kind}": part for name, part in zip("qkv", whole.chunk(3), strict=True)}
    for number in (1, 2):
        weights.setdefault(f"ls{number}.gamma", torch.ones_like(weights["norm1.weight"]))
        if f"ls{number}.gamma" not in layer.state_dict() and not (weights[f"ls{number}.gamma"] == 1).all():
            raise misfit(network, "it has LayerScale where the encoder has none")
    copy_parameters(layer, weights, network)


def copy_parameters(module: nn.Module, weights: dict[str, torch.Tensor], network: nn.Module) -> None:
    """Copy weights into a module's parameters of the same names.

    Raises:
        SettingError: one is missing or has another shape.
    """
    for name, parameter in module.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            theirs = tuple(weights[name].shape) if name in weights else "missing"
            raise misfit(network, f"its '{name}' is {theirs}, the encoder's {tuple(parameter.shape)}")
        parameter.copy_(weights[name])


def misfit(network: nn.Module, reason: str) -> SettingError:
    """Return the error that explains why a network's weights do not fit the encoder."""
    return SettingError(
        f"{type(network).__name__} does not fit the encoder: {reason}", *("init_from", "encoder", "encoder_options")
    )
