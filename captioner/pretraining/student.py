"""The student in training: an encoder with the heads it learns through, which are thrown away afterwards.

Letters: B batch, g compressed grid side, D student width, C teacher channels, K classes, V caption words.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from captioner.encoders import TokenEncoder
from captioner.pretraining.config import PretrainConfig, TeacherConfig
from captioner.pretraining.targets import Targets


class TeacherHeads(nn.Module):
    """What the student says to one teacher, and how far off it is.

    The class token predicts the teacher's class probabilities and pooled feature, each compressed token the teacher's
    feature map at its place, compressed and lookup tokens the classes present there. Teacher features are standardised
    per channel by running statistics, so that every channel counts alike.

    Args:
        dim: student width D.
        shapes: shape of each of the teacher's outputs, without the batch.
        lookup: whether the student has lookup tokens that can predict class maps.
    """

    def __init__(self, config: TeacherConfig, dim: int, shapes: dict[str, tuple[int, ...]], lookup: bool):
        super().__init__()
        self.config = config
        self.weights = {
            "logits": config.logit_weight,
            "pooled": config.pooled_weight,
            "grid": config.grid_weight,
            "maps": config.map_weight,
        }
        wanted = {name: shape for name, shape in shapes.items() if self.weights[name] > 0}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, shape[0]) for name, shape in wanted.items()})
        if lookup and "maps" in wanted:
            self.heads["lookup"] = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, wanted["maps"][0]))
        for name in ("maps", "lookup"):
            if name in self.heads:  # most cells hold nothing of a class: start there
                head = self.heads[name]
                nn.init.constant_((head if name == "maps" else head[1]).bias, -5.0)
        if "grid" in wanted:
            self.grid_norm = nn.BatchNorm2d(wanted["grid"][0], affine=False, momentum=0.02)
        if "pooled" in wanted:
            self.pooled_norm = nn.BatchNorm1d(wanted["pooled"][0], affine=False, momentum=0.02)

    def forward(
        self, summary: torch.Tensor, places: torch.Tensor, lookup: torch.Tensor | None, targets: Targets
    ) -> dict[str, torch.Tensor]:
        """Return the losses, unweighted, by output.

        Args:
            summary: class token (B, D).
            places: compressed tokens as a map (B, g, g, D).
            lookup: lookup tokens as a map (B, h, w, D).
            targets: what the teacher said.
        """
        losses = {}
        grid = places.shape[1:3]
        if "logits" in self.heads:
            losses["logits"] = divergence(self.heads["logits"](summary), targets["logits"], self.config.temperature)
        if "pooled" in self.heads:
            wanted = self.pooled_norm(targets["pooled"].float())
            losses["pooled"] = F.mse_loss(self.heads["pooled"](summary).float(), wanted)
        if "grid" in self.heads:
            wanted = resize_map(self.grid_norm(targets["grid"].float()), grid).movedim(1, -1)  # (B, g, g, C)
            losses["grid"] = F.mse_loss(self.heads["grid"](places).float(), wanted)
        if "maps" in self.heads:
            losses["maps"] = map_loss(self.heads["maps"](places), targets["maps"])
        if "lookup" in self.heads:
            losses["maps"] = (losses["maps"] + map_loss(self.heads["lookup"](lookup), targets["maps"])) / 2
        return losses


class Student(nn.Module):
    """An encoder with the heads for its teachers, for class labels and for caption words.

    Args:
        shapes: for each teacher, the shape of each of its outputs without the batch.
        num_classes: classes of the labels K; 0 for none.
        word_prior: mean target of each caption word (V,), if there are captions.

    Raises:
        ValueError: there is nothing to learn from.
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        config: PretrainConfig,
        shapes: list[dict[str, tuple[int, ...]]],
        num_classes: int = 0,
        word_prior: np.ndarray | None = None,
    ):
        super().__init__()
        self.encoder, self.config = encoder, config
        cfg, dim = encoder.default_cfg, encoder.embed_dim
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1))
        self.has_lookup = hasattr(encoder, "forward_streams")
        self.teachers = nn.ModuleList(
            TeacherHeads(teacher, dim, outputs, self.has_lookup)
            for teacher, outputs in zip(config.teachers, shapes, strict=True)
        )
        self.label_head = nn.Linear(dim, num_classes) if num_classes and config.label_weight > 0 else None
        self.word_head = None
        if word_prior is not None and config.word_weight > 0:
            self.word_head = nn.Linear(dim, len(word_prior))
            prior = torch.from_numpy(word_prior).clamp(1e-4, 1 - 1e-4)
            self.word_head.bias.data.copy_(torch.logit(prior))
        if self.label_head is None and self.word_head is None and not any(heads.heads for heads in self.teachers):
            raise ValueError(
                "nothing to learn from: give --teachers, or a --label-weight, or --captions, above 0 weight"
            )

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that timm's optimiser leaves undecayed: positions, the class token."""
        model = self.encoder.timm_model
        names = getattr(model, "no_weight_decay", set)()
        prefix = "encoder." if model is self.encoder else "encoder.model."
        return {prefix + name for name in names}

    def forward(
        self,
        pixels: torch.Tensor,
        grid: int,
        targets: list[Targets],
        labels: torch.Tensor | None = None,
        words: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compare the student on views (B, 3, S, S) in [0, 1] with everything that is known about them.

        Args:
            grid: side g of the compressed grid.
            targets: what each teacher said about the same views.
            labels: class probabilities (B, K); a row of zeros has no label.
            words: share of captions with each word (B, V); a row of NaN has no captions.

        Returns:
            `loss`, the weighted sum, and its unweighted parts, all scalars.
        """
        summary, places, lookup = self.look((pixels - self.mean) / self.std, grid)
        total, parts = pixels.new_zeros(()), {}
        for number, (heads, target) in enumerate(zip(self.teachers, targets, strict=True)):
            for name, loss in heads(summary, places, lookup, target).items():
                total = total + heads.weights[name] * loss
                parts[name if number == 0 else f"{name}_{number + 1}"] = loss
        if self.label_head is not None:
            known = labels.sum(1) > 0.5
            loss = -(labels * self.label_head(summary).float().log_softmax(-1)).sum()  # a row of zeros adds nothing
            parts["labels"] = loss / known.sum().clamp(min=1)
            total = total + self.config.label_weight * parts["labels"]
        if self.word_head is not None:
            known = ~words[:, 0].isnan()
            loss = F.binary_cross_entropy_with_logits(
                self.word_head(summary).float(), words.nan_to_num(), weight=known[:, None].float(), reduction="sum"
            )
            parts["words"] = loss / known.sum().clamp(min=1)
            total = total + self.config.word_weight * parts["words"]
        return {"loss": total, **parts}

    def look(self, pixels: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Encode pixels into a summary (B, D), tokens as a map (B, g, g, D) and lookup tokens (B, h, w, D).

        An encoder that does not compress hands on its own map; without a class token, the map's mean is the summary.
        """
        if self.has_lookup:
            tokens, lookup = self.encoder.forward_streams(pixels, (grid, grid))
            side = int(lookup.shape[1] ** 0.5)
            return tokens[:, 0], tokens[:, 1:].unflatten(1, (grid, grid)), lookup.unflatten(1, (side, side))
        tokens = self.encoder.forward_tokens(pixels)
        prefix = getattr(self.encoder, "num_prefix_tokens", 0)
        side = int((tokens.shape[1] - prefix) ** 0.5)
        places = tokens[:, prefix:].unflatten(1, (side, side))
        return tokens[:, 0] if prefix else places.mean((1, 2)), places, None


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of softened class distributions (Hinton et al., 2015), both as logits (B, K)."""
    student, teacher = (logits.float() / temperature for logits in (student, teacher))
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    return kl * temperature**2


def map_loss(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of a class map, summed over classes and averaged over cells.

    Args:
        logits: the student's (B, h, w, K).
        probabilities: the teacher's (B, K, H, W); a cell that covers several takes the most probable.
    """
    size = logits.shape[1:3]
    shrinks = min(probabilities.shape[-2:]) >= max(size)
    resize = F.adaptive_max_pool2d if shrinks else F.interpolate
    wanted = resize(probabilities.float(), tuple(size)).movedim(1, -1)  # (B, h, w, K)
    loss = F.binary_cross_entropy_with_logits(logits.float(), wanted.clamp(0, 1), reduction="none")
    return loss.sum(-1).mean()


def resize_map(feature_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Bring a map (B, C, h, w) to (B, C, *grid): averaged when it shrinks, bilinear when it grows."""
    if grid[0] <= feature_map.shape[-2] and grid[1] <= feature_map.shape[-1]:
        return F.adaptive_avg_pool2d(feature_map, tuple(grid))
    return F.interpolate(feature_map, size=tuple(grid), mode="bilinear")
