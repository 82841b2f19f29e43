"""Teachers: frozen networks, of timm, of transformers or in an ONNX file, whose outputs a student predicts.

Letters: B batch, S side of a view, K teacher classes, C teacher channels, (h, w) the teacher's map.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from captioner.encoders.registry import create_timm
from captioner.errors import SettingError
from captioner.hub import hub_options
from captioner.pretraining.config import TeacherConfig
from captioner.pretraining.targets import Targets
from captioner.runs.digests import digest_file, digest_tensors, digest_text

logger = logging.getLogger(__name__)

WEIGHTS = ("logit_weight", "pooled_weight", "grid_weight", "map_weight", "temperature")
"""Settings of a teacher that its outputs do not depend on."""


class Teacher(nn.Module):
    """Base of all teachers: prepares the views, then runs the network.

    `forward` returns those of these outputs that the network has: `logits` (B, K), `pooled` (B, C), `grid`
    (B, C, h, w) and `maps` (B, K, h, w), class probabilities of each cell.
    """

    def __init__(self, config: TeacherConfig):
        super().__init__()
        self.config, self.source = config, ""

    def set_range(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        """Set the mean and standard deviation of the input: the config's, else those the network was trained with."""
        mean, std = self.config.mean or mean, self.config.std or std
        if mean is None or std is None:
            logger.warning(
                "'%s' does not say the mean and std of its input: taking 0.5; or give both", self.config.name
            )
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values or (0.5,) * 3, dtype=torch.float32).view(3, 1, 1))

    @cached_property
    def stamp(self) -> str:
        """Name and digest of all that its outputs depend on: weights and settings, wherever its files are."""
        files, input_range = ("name", "checkpoint"), ("mean", "std")  # the range is among the tensors
        settings = {
            key: value for key, value in asdict(self.config).items() if key not in (*files, *input_range, *WEIGHTS)
        }
        tensors = digest_tensors(self.state_dict())
        return f"{Path(self.config.name).name} {digest_text(f'{settings} {self.source} {tensors}')}"

    def fits(self, name: str, options: dict[str, Any]) -> bool:
        """Return whether it is the timm network of this name, built with these options."""
        return False

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode."""
        return super().train(False)

    def outputs(self, pixels: torch.Tensor) -> Targets:
        """Return the network's outputs for prepared pixels (B, 3, S, S)."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it must implement outputs")

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> Targets:
        """Return the outputs for views (B, 3, S, S) with RGB pixels in [0, 1]."""
        size = self.config.image_size
        if size is not None and pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        if self.config.channel_order == "bgr":
            pixels = pixels.flip(1)
        pixels = (pixels - self.mean) / self.std
        return self.outputs(pixels.contiguous(memory_format=torch.channels_last))  # convolutions are faster so


class TimmTeacher(Teacher):
    """Any timm classifier or feature extractor."""

    def __init__(self, config: TeacherConfig):
        super().__init__(config)
        options = dict(config.options) | ({} if config.num_classes is None else {"num_classes": config.num_classes})
        self.model = create_timm(
            "teacher", config.name, "checkpoint", "name", pretrained=config.checkpoint is None, **options
        )
        if config.checkpoint is not None:
            self.load(config.checkpoint)
        known = self.model.pretrained_cfg
        self.set_range(known.get("mean"), known.get("std"))

    def load(self, path) -> None:
        """Load local weights; where batch norm was folded into the convolutions, it stays the identity."""
        try:
            weights = load_file(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"no teacher weights at '{path}'") from None
        except SafetensorError as error:
            raise ValueError(f"'{path}' is not a safetensors file: {error}") from None
        own = self.model.state_dict()
        if wrong := [k for k, v in weights.items() if k not in own or own[k].shape != v.shape]:
            raise SettingError(
                f"'{path}' does not fit {self.config.name} with {self.model.num_classes} classes: '{wrong[0]}' differs",
                *("checkpoint", "num_classes"),
            )
        norms = nn.modules.batchnorm._BatchNorm
        missing = [
            k for k in own if k not in weights and not isinstance(self.model.get_submodule(k.rpartition(".")[0]), norms)
        ]
        if missing:
            raise ValueError(f"'{path}' lacks weights of {self.config.name}: '{missing[0]}', {len(missing)} in all")
        self.model.load_state_dict(weights, strict=False)

    def fits(self, name: str, options: dict[str, Any]) -> bool:
        """Return whether it is this timm network, of RGB input, so that its weights can serve an encoder's part."""
        same = (self.model.pretrained_cfg["architecture"], dict(self.config.options)) == (name, options)
        return same and self.config.channel_order == "rgb"

    def outputs(self, pixels: torch.Tensor) -> Targets:
        """Return logits (if there are classes), pooled features and the feature map."""
        features = self.model.forward_features(pixels)
        pooled = self.model.forward_head(features, pre_logits=True)
        targets = {"pooled": pooled}
        if self.model.num_classes:
            targets["logits"] = self.model.get_classifier()(pooled)
        if features.ndim == 3:  # a ViT
            features = lay_out(features, getattr(self.model, "num_prefix_tokens", 0))
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            features = features.movedim(-1, 1)
        return targets | {"grid": features}


class TransformersTeacher(Teacher):
    """Any vision model that `transformers.AutoModel` loads: DINOv2, CLIP's or SigLIP's vision tower, Swin, ..."""

    def __init__(self, config: TeacherConfig):
        super().__init__(config)
        from transformers import AutoImageProcessor, AutoModel

        try:
            options = hub_options(config.name)
            model = AutoModel.from_pretrained(config.name, use_safetensors=True, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"no teacher at '{config.name}': {str(error).splitlines()[0]}") from None
        self.model = getattr(model, "vision_model", model)  # of an image-text model, the image half
        try:
            prepares = AutoImageProcessor.from_pretrained(config.name, **options)
        except (OSError, ValueError):  # it has none
            return self.set_range()
        if not getattr(prepares, "do_normalize", True):
            return self.set_range((0.0,) * 3, (1.0,) * 3)
        self.set_range(getattr(prepares, "image_mean", None), getattr(prepares, "image_std", None))

    def outputs(self, pixels: torch.Tensor) -> Targets:
        """Return the feature map, and the pooled feature where the model has one (else the map's mean)."""
        output = self.model(pixel_values=pixels)
        features = output.last_hidden_state
        if features.ndim == 3:
            features = lay_out(features, features.shape[1] - int(features.shape[1] ** 0.5) ** 2)
        pooled = getattr(output, "pooler_output", None)
        pooled = features.mean((2, 3)) if pooled is None else pooled.flatten(1)
        return {"pooled": pooled, "grid": features}


class OnnxTeacher(Teacher):
    """An ONNX file with named outputs, run in torch through onnx2torch."""

    def __init__(self, config: TeacherConfig):
        super().__init__(config)
        try:
            import onnx
            from google.protobuf.message import DecodeError
            from onnx2torch import convert
        except ImportError:
            raise ValueError("an ONNX teacher needs onnx2torch: pip install 'captioner[onnx]'") from None
        try:
            graph = onnx.load(config.name)
        except FileNotFoundError:
            raise FileNotFoundError(f"no teacher at '{config.name}'") from None
        except DecodeError as error:
            raise ValueError(f"'{config.name}' is not an ONNX file: {error}") from None
        self.output_names = [output.name for output in graph.graph.output]
        if absent := [name for name in (*config.nodes.values(), *config.maps) if name not in self.output_names]:
            raise ValueError(f"'{config.name}' has no output '{absent[0]}', only {', '.join(self.output_names)}")
        self.model = convert(graph)
        self.source = digest_file(Path(config.name))
        self.set_range()
        first, _, end = config.map_classes.partition(":")
        self.classes = slice(int(first) if first else None, int(end) if end else None)

    def outputs(self, pixels: torch.Tensor) -> Targets:
        """Return the named outputs, and the class maps merged over scales."""
        values = self.model(pixels)
        values = dict(zip(self.output_names, [values] if isinstance(values, torch.Tensor) else values, strict=True))
        targets = {kind: values[name] for kind, name in self.config.nodes.items()}
        if self.config.maps:
            scales = [self.probabilities(values[name]) for name in self.config.maps]
            targets["maps"] = torch.stack(scales).amax(0)
        return targets

    def probabilities(self, values: torch.Tensor) -> torch.Tensor:
        """Class probabilities of one scale (B, C, h, w), as (B, K, map_size, map_size)."""
        classes = values[:, self.classes]
        if self.config.map_objectness is not None:
            classes = classes * values[:, self.config.map_objectness, None]
        size = (self.config.map_size,) * 2
        if min(classes.shape[-2:]) >= self.config.map_size:
            return F.adaptive_max_pool2d(classes, size)
        return F.interpolate(classes, size=size, mode="nearest")


KINDS = {"timm": TimmTeacher, "transformers": TransformersTeacher, "onnx": OnnxTeacher}


def create_teacher(config: TeacherConfig) -> Teacher:
    """Build a frozen teacher.

    Raises:
        ValueError: there is no such network, or its weights or outputs are not those that the config names.
        FileNotFoundError: its file is missing.
    """
    return KINDS[config.kind](config).requires_grad_(False).eval().to(memory_format=torch.channels_last)


def lay_out(tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """Return the tokens of a ViT (B, prefix + N, C) as its square map (B, C, h, w)."""
    patches = tokens[:, prefix:]
    side = int(patches.shape[1] ** 0.5)
    return patches.mT.unflatten(-1, (side, -1))
