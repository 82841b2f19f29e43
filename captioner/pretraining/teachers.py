"""Teachers: frozen networks of timm, of transformers or in an ONNX file. A student predicts their outputs.

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
from captioner.errors import SettingError, first_line
from captioner.hub import hub_options
from captioner.pretraining.config import TeacherConfig
from captioner.pretraining.targets import Targets
from captioner.runs.digests import digest_file, digest_tensors, digest_text
from captioner.transformers_versions import LOADING_ERRORS

logger = logging.getLogger(__name__)

WEIGHTS = ("logit_weight", "pooled_weight", "grid_weight", "map_weight", "temperature")
"""Settings of a teacher that do not change its outputs."""


class Teacher(nn.Module):
    """Base class of all teachers: it prepares the views and runs the network.

    `forward` returns the outputs that the network has, out of `logits` (B, K), `pooled` (B, C), `grid` (B, C, h, w) and
    `maps` (B, K, h, w), the class probabilities of each cell.
    """

    def __init__(self, config: TeacherConfig):
        super().__init__()
        self.config, self.source = config, ""

    def set_range(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        """Set mean and standard deviation of the input.

        Args:
            mean: mean that the network was trained with, for pixels in [0, 1]; the setting `mean` comes before it.
            std: standard deviation, likewise.
        """
        mean, std = self.config.mean or mean, self.config.std or std
        if mean is None or std is None:
            logger.warning(
                "the mean and std of the input of '%s' are unknown, so 0.5 is taken; set both if they differ",
                self.config.name,
            )
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values or (0.5,) * 3, dtype=torch.float32).view(3, 1, 1))

    @cached_property
    def stamp(self) -> str:
        """Name and digest of everything that its outputs depend on: weights and settings, but not paths of files."""
        files, input_range = ("name", "checkpoint"), ("mean", "std")  # the range is among the tensors
        settings = {
            key: value for key, value in asdict(self.config).items() if key not in (*files, *input_range, *WEIGHTS)
        }
        tensors = digest_tensors(self.state_dict())
        return f"{Path(self.config.name).name} {digest_text(f'{settings} {self.source} {tensors}')}"

    def fits(self, name: str, options: dict[str, Any]) -> bool:
        """Return whether this teacher is the timm network of this name, built with these options."""
        return False

    def train(self, mode: bool = True) -> "Teacher":
        """Do nothing: a teacher stays in eval mode."""
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
        return self.outputs(pixels.contiguous(memory_format=torch.channels_last))  # makes convolutions faster


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

    def load(self, path: Path) -> None:
        """Load weights from a file. Batch norms may be missing: folded into the convolutions, they stay the identity.

        Raises:
            FileNotFoundError: there is no such file.
            SettingError: the weights are those of another network.
            ValueError: the file is not safetensors, or lacks weights.
        """
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
        """Return whether this teacher is this timm network with RGB input, so that an encoder can take its weights."""
        same = (self.model.pretrained_cfg["architecture"], dict(self.config.options)) == (name, options)
        return same and self.config.channel_order == "rgb"

    def outputs(self, pixels: torch.Tensor) -> Targets:
        """Return `pooled`, `grid`, and `logits` if the network has classes."""
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
            model = AutoModel.from_pretrained(config.name, use_safetensors=True, trust_remote_code=False, **options)
        except LOADING_ERRORS as error:
            raise ValueError(f"no teacher at '{config.name}': {first_line(error)}") from None
        self.model = getattr(model, "vision_model", model)  # the image encoder of an image-text model
        try:
            prepares = AutoImageProcessor.from_pretrained(config.name, trust_remote_code=False, **options)
        except (OSError, ValueError):  # the model has no image processor
            return self.set_range()
        if not getattr(prepares, "do_normalize", True):
            return self.set_range((0.0,) * 3, (1.0,) * 3)
        self.set_range(getattr(prepares, "image_mean", None), getattr(prepares, "image_std", None))

    def outputs(self, pixels: torch.Tensor) -> Targets:
        """Return `grid`, and `pooled`: the model's own pooled feature, or the mean of the map if it has none."""
        output = self.model(pixel_values=pixels)
        features = output.last_hidden_state
        if features.ndim == 3:
            features = lay_out(features, features.shape[1] - int(features.shape[1] ** 0.5) ** 2)
        pooled = getattr(output, "pooler_output", None)
        pooled = features.mean((2, 3)) if pooled is None else pooled.flatten(1)
        return {"pooled": pooled, "grid": features}


class OnnxTeacher(Teacher):
    """An ONNX file with named outputs, which onnx2torch runs in torch."""

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
        """Return the outputs in `nodes`, and `maps`, merged over scales by their maximum."""
        values = self.model(pixels)
        values = dict(zip(self.output_names, [values] if isinstance(values, torch.Tensor) else values, strict=True))
        targets = {kind: values[name] for kind, name in self.config.nodes.items()}
        if self.config.maps:
            scales = [self.probabilities(values[name]) for name in self.config.maps]
            targets["maps"] = torch.stack(scales).amax(0)
        return targets

    def probabilities(self, values: torch.Tensor) -> torch.Tensor:
        """Return the class probabilities (B, K, map_size, map_size) of one scale (B, C, h, w)."""
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
        ValueError: there is no such network, or it lacks the weights or outputs that the config names.
        FileNotFoundError: a file does not exist.
    """
    return KINDS[config.kind](config).requires_grad_(False).eval().to(memory_format=torch.channels_last)


def lay_out(tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """Return the tokens of a ViT (B, prefix + N, C) as a square map (B, C, h, w), without the prefix."""
    patches = tokens[:, prefix:]
    side = int(patches.shape[1] ** 0.5)
    return patches.mT.unflatten(-1, (side, -1))
