"""Stems: the first layers of an encoder, which turn pixels into tokens.

Letters: B batch, C image channels, H W pixels, (h, w) the token grid, D width.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import timm
import torch
from timm.layers import HybridEmbed, PatchEmbed, to_2tuple
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from captioner.encoders.fused import fuse_convolutions
from captioner.encoders.registry import loading_options
from captioner.errors import SettingError


class NetworkStem(HybridEmbed):
    """The first stages of a timm network, down to the patch's stride, and a linear layer to the encoder's width.

    As in ViT's hybrids (Dosovitskiy et al., ICLR 2021, section 3.1), but from a small network. It is meant to start
    from trained weights (`init_stem`), so training does not change its running statistics.

    Args:
        name: timm name of the network, without a tag.
        img_size: image size in pixels.
        patch_size: stride in pixels at which a stage of the network must end.
        in_chans: image channels C.
        dim: the encoder's width D.
        options: further keyword arguments of the network.

    Raises:
        SettingError: timm has no such network, it cannot be cut there, or the options would load weights.
    """

    def __init__(
        self, name: str, img_size: int | tuple[int, int], patch_size: int, in_chans: int, dim: int, options: dict | None
    ):
        if not isinstance(name, str) or "." in name or not timm.is_model(name):
            raise SettingError(
                f"stem is '{name}'; LookupViT knows 'patch', 'conv' and the networks of timm, by name without a tag",
                "encoder_options",
            )
        options = options or {}
        if not isinstance(options, dict) or (asked := [*loading_options(options), *({"out_indices"} & options.keys())]):
            what = (
                f"may not hold '{asked[0]}'" if isinstance(options, dict) else f"must be a dictionary, not '{options}'"
            )
            raise SettingError(f"the options of a stem {what}", "encoder_options")
        make = partial(timm.create_model, name, features_only=True, feature_cls="getter", in_chans=in_chans, **options)
        try:
            network = make()
            strides = network.feature_info.reduction()
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            reason = (str(error).splitlines() or ["wrong options"])[0]
            raise SettingError(f"timm cannot cut the stem '{name}' into stages: {reason}", "encoder_options") from None
        if not hasattr(network.model, "forward_intermediates"):
            raise SettingError(f"timm cannot cut the stem '{name}' into stages", "encoder_options")
        if patch_size not in strides:
            raise SettingError(
                f"stem '{name}' has strides {strides}, none of which is the patch, {patch_size} px", "encoder_options"
            )
        stage = max(i for i, stride in enumerate(strides) if stride == patch_size)
        sizes = {"feature_size": [side // patch_size for side in to_2tuple(img_size)], "feature_ratio": patch_size}
        formats = {"output_fmt": "NHWC", "strict_img_size": False}
        super().__init__(make(out_indices=(stage,)), img_size, **sizes, in_chans=in_chans, embed_dim=dim, **formats)
        self.name, self.options = name, options
        self.images_at_a_time: int | None = None
        self.register_buffer("scale", torch.ones(in_chans, 1, 1))
        self.register_buffer("shift", torch.zeros(in_chans, 1, 1))
        self.backbone.eval()

    def train(self, mode: bool = True) -> "NetworkStem":
        """Switch training mode; the network stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn pixels (B, C, H, W) into tokens (B, h, w, D)."""
        if self.images_at_a_time is not None and len(x) > self.images_at_a_time:
            return torch.cat([self(part) for part in x.split(self.images_at_a_time)])
        x = x * self.scale + self.shift
        return super().forward(x.contiguous(memory_format=torch.channels_last))  # far faster on CPUs

    def optimize_for_inference(self, example: torch.Tensor, dtype: torch.dtype) -> "NetworkStem":
        """Return a copy of a frozen stem that computes the same tokens faster on a CPU; or the stem itself.

        Args:
            example: pixels (B, C, H, W) of the usual size.
            dtype: dtype in which the copy will compute.
        """
        stem = cast("NetworkStem", fuse_convolutions(self, example))
        if stem is not self:  # few images at a time, so that the layers' outputs fit into the caches of the CPU
            stem.images_at_a_time = 4 if dtype == torch.float32 else 16
        return stem


def init_stem(
    stem: NetworkStem,
    network: nn.Module,
    own: dict,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
) -> None:
    """Copy a trained network's first stages into a stem, in place, and scale its input to that of the network.

    Args:
        stem: the stem.
        network: a timm network of the stem's name.
        own: `mean` and `std` of the encoder's input, for pixels in [0, 1].
        mean: mean of the network's input, likewise.
        std: standard deviation of the network's input, likewise.

    Raises:
        SettingError: the network's weights do not fit the stem.
    """
    own_mean, own_std, mean, std = (
        torch.as_tensor(v, device="cpu").view(-1, 1, 1) for v in (own["mean"], own["std"], mean, std)
    )
    weights, trained = stem.backbone.model.state_dict(), network.state_dict()
    if wrong := [key for key, value in weights.items() if key not in trained or trained[key].shape != value.shape]:
        raise SettingError(
            f"{type(network).__name__} does not fit the stem '{stem.name}': '{wrong[0]}' differs",
            *("init_from", "encoder_options"),
        )
    stem.backbone.model.load_state_dict({key: trained[key] for key in weights})
    stem.scale.copy_(own_std / std)
    stem.shift.copy_((own_mean - mean) / std)


def create_stem(
    stem: str, img_size: int | tuple[int, int], patch_size: int, in_chans: int, dim: int, options: dict | None = None
) -> nn.Module:
    """Build the stem that turns pixels (B, C, H, W) into lookup tokens (B, h, w, D).

    - `patch`: a linear layer per patch, as in ViT.
    - `conv`: three overlapping convolutions (Xiao et al., NeurIPS 2021, arXiv 2106.14881). They are narrow, and add a
      tenth to the FLOPs of six blocks of LookupViT-Ti at 5x5.
    - any other: the first stages of the timm network of that name, see `NetworkStem`.

    Raises:
        SettingError: the stem is unknown, or its strides do not make the patch.
    """
    if stem not in ("patch", "conv"):
        return NetworkStem(stem, img_size, patch_size, in_chans, dim, options)
    if options:
        raise SettingError(f"a stem of '{stem}' takes no options, only a network does", "encoder_options")
    if stem == "patch":
        return PatchEmbed(img_size, patch_size, in_chans, dim, output_fmt="NHWC", flatten=False, strict_img_size=False)
    first = patch_size // 4
    if first * 4 != patch_size:
        raise SettingError(
            f"a conv stem has strides {first}, 2, 2, which do not make a patch of {patch_size} px", "encoder_options"
        )
    backbone = ConvStem(
        in_chans,
        channels=(dim // 6, dim // 3, dim),
        kernel_size=(2 * first - 1, 3, 3),
        stride=(first, 2, 2),
        padding=(first - 1, 1, 1),
        act_layer=nn.GELU,
    )
    backbone.num_features = dim  # with this and the sizes, HybridEmbed does not run the backbone to find them
    sizes = {"feature_size": [side // patch_size for side in to_2tuple(img_size)], "feature_ratio": patch_size}
    options = {"in_chans": in_chans, "embed_dim": dim, "output_fmt": "NHWC", "strict_img_size": False}
    return HybridEmbed(backbone, img_size, **sizes, **options, proj=False)
