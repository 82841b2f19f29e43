"""The student in training: an encoder, and the heads through which it learns. The heads are not exported.

Letters: B batch, (r, c) compressed grid, D student width, C teacher channels, K classes, V caption words.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from captioner.encoders import TokenEncoder, TokenMaps
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.pretraining.config import PretrainConfig, TeacherConfig
from captioner.pretraining.targets import Targets


class TeacherHeads(nn.Module):
    """Predicts the outputs of one teacher from the student's tokens, and computes the losses.

    The summary predicts the teacher's class probabilities and pooled feature. Each token predicts the teacher's feature
    map at its place. Tokens and dense tokens predict the class map at their places. Running statistics standardise each
    channel of the teacher's features, so that all channels have the same weight.

    Args:
        config: the teacher, with the weights of the losses.
        dim: student width D.
        shapes: shape of each of the teacher's outputs, without the batch.
        dense: whether the student has dense tokens that can predict class maps.
    """

    def __init__(self, config: TeacherConfig, dim: int, shapes: dict[str, tuple[int, ...]], dense: bool):
        super().__init__()
        self.config = config
        self.weights = {
            "logits": config.logit_weight,
            "pooled": config.pooled_weight,
            "grid": config.grid_weight,
            "maps": config.map_weight,
        }
        learned = {name: shape for name, shape in shapes.items() if self.weights[name] > 0}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, shape[0]) for name, shape in learned.items()})
        if dense and "maps" in learned:  # checkpoints call this head by LookupViT's dense tokens
            self.heads["lookup"] = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, learned["maps"][0]))
        for name in ("maps", "lookup"):
            if name in self.heads:  # most classes are absent from most cells, so predictions start near 0
                head = self.heads[name]
                nn.init.constant_((head if name == "maps" else head[1]).bias, -5.0)
        if "grid" in learned:
            self.grid_norm = nn.BatchNorm2d(learned["grid"][0], affine=False, momentum=0.02)
        if "pooled" in learned:
            self.pooled_norm = nn.BatchNorm1d(learned["pooled"][0], affine=False, momentum=0.02)

    def forward(self, maps: TokenMaps, targets: Targets) -> dict[str, torch.Tensor]:
        """Return the unweighted losses (scalars), by output.

        Args:
            maps: the student's tokens of B views.
            targets: the teacher's outputs for the same views.
        """
        losses = {}
        if "logits" in self.heads:
            logits = self.heads["logits"](maps.summary)
            losses["logits"] = divergence(logits, targets["logits"], self.config.temperature)
        if "pooled" in self.heads:
            pooled = self.pooled_norm(targets["pooled"].float())
            losses["pooled"] = F.mse_loss(self.heads["pooled"](maps.summary).float(), pooled)
        if "grid" in self.heads:
            grid = (maps.tokens.shape[1], maps.tokens.shape[2])
            features = resize_map(self.grid_norm(targets["grid"].float()), grid).movedim(1, -1)  # (B, r, c, C)
            losses["grid"] = F.mse_loss(self.heads["grid"](maps.tokens).float(), features)
        if "maps" in self.heads:
            losses["maps"] = map_loss(self.heads["maps"](maps.tokens), targets["maps"])
        if "lookup" in self.heads:
            losses["maps"] = (losses["maps"] + map_loss(self.heads["lookup"](maps.dense), targets["maps"])) / 2
        return losses


class Student(nn.Module):
    """An encoder with the heads for its teachers, for class labels and for caption words.

    Args:
        encoder: the encoder to train.
        config: the run, with the weights of the losses.
        shapes: for each teacher, the shape of each of its outputs without the batch.
        num_classes: classes of the labels K; 0 for none.
        word_prior: mean target of each caption word (V,), if there are captions.
        tag_prior: mean target of each tag (T,), if there is a label file.

    Raises:
        SettingError: there are no teachers, labels or captions to learn from.
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        config: PretrainConfig,
        shapes: list[dict[str, tuple[int, ...]]],
        num_classes: int = 0,
        word_prior: np.ndarray | None = None,
        tag_prior: np.ndarray | None = None,
    ):
        super().__init__()
        self.encoder, self.config = encoder, config
        forward = encoder.forward_with_losses
        self.forward_with_losses = torch.compile(forward) if config.compile else forward
        cfg, dim = encoder.default_cfg, encoder.embed_dim
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1))
        self.teachers = nn.ModuleList(
            TeacherHeads(teacher, dim, outputs, encoder.has_dense_tokens)
            for teacher, outputs in zip(config.teachers, shapes, strict=True)
        )
        self.label_head = nn.Linear(dim, num_classes) if num_classes and config.label_weight > 0 else None
        self.word_head = prior_head(dim, word_prior) if word_prior is not None and config.word_weight > 0 else None
        self.tag_head = prior_head(dim, tag_prior) if tag_prior is not None and config.tag_weight > 0 else None
        heads = (self.label_head, self.word_head, self.tag_head)
        if heads == (None, None, None) and not any(teacher.heads for teacher in self.teachers):
            raise SettingError(
                "nothing to learn from: there are no teachers, class labels, captions or tags of a weight above 0",
                *("teachers", "label_weight", "captions", "tags"),
            )

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm's optimiser leaves undecayed: positions, the class token."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def forward(
        self,
        pixels: torch.Tensor,
        grid: Grid | None,
        targets: list[Targets],
        labels: torch.Tensor | None = None,
        words: torch.Tensor | None = None,
        tags: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of the student on views.

        Args:
            pixels: the views (B, 3, S, S), in [0, 1].
            grid: compressed grid; `None` for an encoder that does not choose its grid.
            targets: each teacher's outputs for the same views.
            labels: class probabilities (B, K); a row of zeros stands for an image without a label.
            words: share of captions with each word (B, V); a row of NaN stands for an image without captions.
            tags: probability of each tag (B, T); a row of NaN stands for an image without tags.

        Returns:
            `loss`, the weighted sum, and its unweighted parts, all scalars.
        """
        maps, own_losses = self.encode((pixels - self.mean) / self.std, grid)
        total, parts = sum(own_losses.values(), pixels.new_zeros(())), dict(own_losses)
        for number, (heads, target) in enumerate(zip(self.teachers, targets, strict=True)):
            for name, loss in heads(maps, target).items():
                total = total + heads.weights[name] * loss
                parts[name if number == 0 else f"{name}_{number + 1}"] = loss
        if self.label_head is not None:
            assert labels is not None, "a batch has class labels where these have a weight"
            known = labels.sum(1) > 0.5
            logits = self.label_head(maps.summary).float()
            loss = -(labels * logits.log_softmax(-1)).sum()  # a row of zeros adds nothing
            parts["labels"] = loss / known.sum().clamp(min=1)
            total = total + self.config.label_weight * parts["labels"]
        if self.word_head is not None:
            assert words is not None, "a batch has caption words where these have a weight"
            parts["words"] = multi_label_loss(self.word_head(maps.summary), words)
            total = total + self.config.word_weight * parts["words"]
        if self.tag_head is not None:
            assert tags is not None, "a batch has tags where these have a weight"
            parts["tags"] = multi_label_loss(self.tag_head(maps.summary), tags)
            total = total + self.config.tag_weight * parts["tags"]
        return {"loss": total, **parts}

    def encode(self, pixels: torch.Tensor, grid: Grid | None) -> tuple[TokenMaps, dict[str, torch.Tensor]]:
        """Encode normalised pixels (B, 3, S, S) into tokens at their places, and the encoder's own losses."""
        return self.forward_with_losses(pixels, grid)


def prior_head(dim: int, prior: np.ndarray) -> nn.Linear:
    """Return a linear layer (D -> V) whose bias alone predicts the mean of each target."""
    head = nn.Linear(dim, len(prior))
    head.bias.data.copy_(torch.logit(torch.from_numpy(prior).clamp(1e-4, 1 - 1e-4)))
    return head


def multi_label_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of targets (B, V) in [0, 1], summed over V, averaged over rows; rows of NaN do not count."""
    known = ~targets[:, 0].isnan()
    mask = known[:, None].float()
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.nan_to_num(), weight=mask, reduction="sum")
    return loss / known.sum().clamp(min=1)


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute the Kullback-Leibler divergence of softened class distributions (Hinton et al., 2015).

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        temperature: divides both logits.
    """
    student, teacher = (logits.float() / temperature for logits in (student, teacher))
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    return kl * temperature**2


def map_loss(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Compute the binary cross-entropy of a class map, summed over classes and averaged over cells.

    Args:
        logits: logits of the student (B, h, w, K).
        probabilities: probabilities of the teacher (B, K, H, W). A cell of the student that covers several cells takes
            their maximum for each class.
    """
    size = logits.shape[1:3]
    shrinks = min(probabilities.shape[-2:]) >= max(size)
    resize = F.adaptive_max_pool2d if shrinks else F.interpolate
    targets = resize(probabilities.float(), tuple(size)).movedim(1, -1)  # (B, h, w, K)
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.clamp(0, 1), reduction="none")
    return loss.sum(-1).mean()


def resize_map(feature_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resize a map (B, C, h, w) to (B, C, *grid): by averages to a smaller grid, bilinearly to a larger one."""
    if grid[0] <= feature_map.shape[-2] and grid[1] <= feature_map.shape[-1]:
        return F.adaptive_avg_pool2d(feature_map, tuple(grid))
    return F.interpolate(feature_map, size=tuple(grid), mode="bilinear")
