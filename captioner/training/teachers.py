"""Teachers: frozen networks whose class probabilities, pooled features and feature maps a student predicts."""

import logging

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from captioner.training.encoder_config import TeacherConfig

logger = logging.getLogger(__name__)


class Teacher(nn.Module):
    """A frozen timm model; `forward` returns `logits` (B, K), `pooled` (B, C) and `grid` (B, C, h, w)."""

    def __init__(self, config: TeacherConfig):
        super().__init__()
        self.config = config
        options = {"num_classes": config.num_classes, **config.options}
        if not timm.is_model(config.name):
            raise ValueError(f"no teacher named '{config.name}' in timm")
        self.model = timm.create_model(config.name, pretrained=config.checkpoint is None, **options)
        if config.checkpoint is not None:
            self._load()
        self.model.requires_grad_(False)
        self.channels = self.model.num_features
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1))
        self.eval()

    def _load(self) -> None:
        path = self.config.checkpoint
        try:
            weights = load_file(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"no teacher weights at '{path}'") from None
        except SafetensorError as error:
            raise ValueError(f"'{path}' is not a safetensors file: {error}") from None
        own = self.model.state_dict()
        wrong = [k for k, v in weights.items() if k not in own or own[k].shape != v.shape]
        if wrong:
            raise ValueError(
                f"'{path}' does not fit {self.config.name} with {self.config.num_classes} classes: "
                f"'{wrong[0]}' differs; check --teacher.name and --teacher.num-classes"
            )
        # weights exported with batch norm folded into the convolutions lack it: it then stays the identity
        missing = [
            k for k in own if k not in weights and not isinstance(self._owner(k), nn.modules.batchnorm._BatchNorm)
        ]
        if missing:
            raise ValueError(
                f"'{path}' lacks weights of {self.config.name}: '{missing[0]}' and {len(missing) - 1} more"
            )
        self.model.load_state_dict(weights, strict=False)

    def _owner(self, key: str) -> nn.Module:
        return self.model.get_submodule(key.rpartition(".")[0])

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Look at views (B, 3, S, S) with pixels in [0, 1]."""
        size = self.config.image_size
        if size is not None and pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        features = self.model.forward_features((pixels - self.mean) / self.std)
        pooled = self.model.forward_head(features, pre_logits=True)
        logits = self.model.get_classifier()(pooled)
        if features.ndim == 3:  # a ViT: drop class and register tokens, lay the patches out
            patches = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
            features = patches.mT.unflatten(-1, (int(patches.shape[1] ** 0.5), -1))
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            features = features.movedim(-1, 1)
        return {"logits": logits, "pooled": pooled, "grid": features}
