"""Every setting of encoder pretraining, saved beside its results. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TeacherConfig:
    """A network whose outputs the student learns to predict; any timm model."""

    name: str
    """timm name of the teacher."""
    checkpoint: Path | None = None
    """Local safetensors weights; without them timm's pretrained ones are taken from the hub."""
    num_classes: int = 1000
    """Classes of the teacher's classifier."""
    options: dict[str, str] = field(default_factory=dict)
    """Further keyword arguments of `timm.create_model`, such as `pad_type same`."""
    image_size: int | None = None
    """Side in pixels at which the teacher sees the view; `None` for the view's own."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of the teacher's input, for pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of the teacher's input, for pixels in [0, 1]."""
    grid_weight: float = 4.0
    """Weight of the loss on the teacher's feature map, resized to the student's grid."""
    pooled_weight: float = 1.0
    """Weight of the loss on the teacher's pooled feature."""
    logit_weight: float = 0.2
    """Weight of the loss on the teacher's class probabilities."""
    temperature: float = 2.0
    """Softens both class distributions before they are compared."""


@dataclass(frozen=True)
class PretrainConfig:
    """Make an encoder: distil it from a teacher, and from the words of captions, over several compressed grids."""

    output: Path = Path("runs/pretrain")
    """Folder of the checkpoints, the log and the exported encoder."""
    encoder: str = "lookupvit_small_patch16_224"
    """timm name of the student, or `local-dir:FOLDER` to go on from an exported encoder."""
    encoder_options: dict[str, int | float] = field(default_factory=dict)
    """Further keyword arguments of the encoder, such as `depth 6` or `drop_path_rate 0.1`."""
    grids: tuple[int, ...] = (3, 5, 7, 10)
    """Compressed grids, one drawn per step, so that one set of weights serves all."""
    image_size: int = 224
    """Side in pixels of the augmented view that student and teacher share."""
    early_size: int = 160
    """Side in pixels of the view early on: small views cost less, and most is learned on them."""
    early_share: float = 0.0
    """Share of the steps that take views of `early_size`."""

    images: tuple[str, ...] = ()
    """Folders of images or parquet files (globs allowed); a source named twice counts twice."""
    captions: str | None = None
    """Captioned images (see `captioner train --help`): their images are used, and their words are labels."""
    captions_repeat: int = 1
    """How often the captioned images count in an epoch."""
    captions_split: str = "train"
    """Split of the captioned images; never train on `val` or `test`."""

    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig("mobilenetv2_100"))
    num_words: int = 1000
    """Most frequent caption words to predict; used with `captions`."""
    word_weight: float = 0.03
    """Weight of the loss on caption words (binary cross-entropy, summed over words)."""
    min_crop: float = 0.4
    """Least share of the picture in a random crop."""

    steps: int = 10_000
    """Optimiser steps in all."""
    batch_size: int = 64
    """Images per step and process."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Decay of matrices; norms, biases and embeddings are left undecayed."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly; then it falls as a cosine."""
    clip: float = 1.0
    """Largest gradient norm."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the student's and teacher's forward."""
    workers: int = 2
    """Data loading processes per training process."""
    seed: int = 0
    """Seed of weights, data order, views and grids."""

    log_every: int = 50
    """Steps between log lines."""
    save_minutes: float = 5.0
    """Minutes between checkpoints."""
    resume: bool = True
    """Go on from the newest checkpoint in `output`, if there is one."""
    max_minutes: float | None = None
    """Stop after this many minutes with a checkpoint (a further run goes on); `None` runs to the end."""

    def __post_init__(self):
        if min(self.grids) < 1:
            raise ValueError(f"grids are positive, not {self.grids}")
