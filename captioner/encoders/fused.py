"""Convolutions of a frozen network on a CPU, with their batch norms folded in and their activations fused.

A frozen batch norm is a scale and a shift for each channel. The scale can be multiplied into the weights of the
convolution before it, and the shift added to its bias. oneDNN then computes convolution, bias and activation in one
pass over memory, with weights in the layout of its kernels. Memory, not arithmetic, limits the convolutions of small
networks, so this saves most of their time.

Letters: B images, C channels, H W pixels.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

ACTIVATIONS = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0])}
"""Activations that oneDNN computes with a convolution, by the names and arguments of torch's operators."""


class FusedConv(nn.Module):
    """A convolution, the batch norm after it and, if oneDNN has it, the activation after that.

    Args:
        conv: the convolution; a `Conv2dSame` pads as TensorFlow does.
        norm: the batch norm.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        bias = bias * scale if norm.bias is None else bias * scale + norm.bias
        self.register_buffer("weight", (conv.weight * scale[:, None, None, None]).detach())
        self.register_buffer("bias", bias.detach())
        self.stride, self.dilation, self.groups = list(conv.stride), list(conv.dilation), conv.groups
        self.padding = None if isinstance(conv, Conv2dSame) else list(conv.padding)
        act = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        self.attr, self.scalars = ACTIVATIONS.get(type(act), ("none", []))
        self.act = nn.Identity() if type(act) in ACTIVATIONS else act
        self.packed: dict[tuple, tuple[torch.Tensor, list[int]]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve x (B, C, H, W)."""
        key = (x.dtype, *x.shape[1:])
        if key not in self.packed:
            self.packed = {key: self.pack(x)}  # a network sees one size at a time
        weight, padding = self.packed[key]
        options = (padding, self.stride, self.dilation, self.groups)
        x = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *options, self.attr, self.scalars, "")
        return self.act(x)

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Return the weights in the layout for an input like x (B, C, H, W), and the padding."""
        weight, padding = self.weight, self.padding
        if padding is None:
            padding, margins = list[int](), list[int]()
            for size, kernel, stride, dilation in zip(
                x.shape[2:], weight.shape[2:], self.stride, self.dilation, strict=True
            ):
                total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
                # oneDNN pads both ends alike; zero weights before the kernel compensate for a longer padding at the end
                margins = [total % 2, 0, *margins]
                padding.append(-(-total // 2))
            weight = F.pad(weight, margins)
        weight = weight.contiguous(memory_format=torch.channels_last)
        options = (padding, self.stride, self.dilation, self.groups)
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *options, list(x.shape)), padding

    def _apply(self, fn: Any, recurse: bool = True) -> "FusedConv":
        self.packed = {}  # they have the dtype before
        return super()._apply(fn, recurse)


def fuse_convolutions(network: nn.Module, example: torch.Tensor) -> nn.Module:
    """Return a copy of a frozen network whose convolutions are fused with the batch norms that follow them.

    Args:
        network: the network, on a CPU.
        example: an input (B, C, H, W). The network runs on it to find which norm follows which convolution.

    Returns:
        The copy; the network itself if there is nothing to fuse or this torch cannot fuse.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return network
    fused = copy.deepcopy(network).eval().requires_grad_(False)
    pairs = follow(fused, example)
    if not pairs:
        return network
    parents = {id(child): (parent, name) for parent in fused.modules() for name, child in parent.named_children()}
    for conv, norm in pairs:
        for module, other in ((conv, FusedConv(conv, norm)), (norm, nn.Identity())):
            parent, name = parents[id(module)]
            setattr(parent, name, other)
    return fused


def follow(network: nn.Module, example: torch.Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Run a network; return each convolution whose output is the input of a batch norm, with that norm."""
    outputs: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: dict[int, int] = {}

    def convolved(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        outputs[id(output)] = (module, output)  # stored, so that no other tensor gets its id
        calls[id(module)] = calls.get(id(module), 0) + 1

    def normed(module: nn.Module, args: tuple) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if id(args[0]) in outputs:
            pairs.append((outputs[id(args[0])][0], module))

    hooks = []
    for module in network.modules():
        if type(module) in (nn.Conv2d, Conv2dSame) and (module.padding_mode, type(module.padding)) == ("zeros", tuple):
            hooks.append(module.register_forward_hook(convolved))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(normed))
    try:
        with torch.no_grad():
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(calls[id(module)] == 1 for module in pair)]


def fast_dtype() -> torch.dtype:
    """Return the dtype for encoders on this CPU: bfloat16 if it has matrix units for it (AMX), else float32.

    The bfloat16 instructions of AVX-512 alone save too little time to be worth the lower precision.
    """
    return torch.bfloat16 if torch.backends.cpu.get_cpu_capability() != "DEFAULT" and has_amx() else torch.float32


def has_amx() -> bool:
    """Return whether this CPU has matrix units for bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()
