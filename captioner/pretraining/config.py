"""Every setting of encoder pretraining, saved beside its results. Imports nothing heavy."""

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec


def read_options(words: list[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` words; a value that is no Python literal is text.

    Raises:
        ValueError: a word is not of that form.
    """
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"'{word}' is not of the form KEY=VALUE")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


Options = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=read_options,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda options: [f"{key}={value}" for key, value in options.items()],
    ),
]
"""A dictionary as it is written on the command line: `depth=6 dynamic_img_size=True`."""


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen network whose outputs the student learns to predict."""

    name: str = "resnet18"
    """timm name, hub id or folder of a transformers vision model, or path of an ONNX file."""
    kind: Literal["timm", "transformers", "onnx"] = "timm"
    """Which of the three `name` is."""
    checkpoint: Path | None = None
    """timm: local safetensors weights; without them timm's pretrained ones are taken from the hub."""
    num_classes: int | None = None
    """Classes of the teacher's classifier; `None` for what it has."""
    options: Options = field(default_factory=dict)
    """timm: further keyword arguments of `timm.create_model`, such as `pad_type=same`."""

    image_size: int | None = None
    """Side in pixels at which the teacher sees the view; `None` for the view's own."""
    mean: tuple[float, float, float] | None = None
    """Mean of the teacher's input, for pixels in [0, 1]; `None` for what timm or transformers know of it, else 0.5."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the teacher's input, likewise; 1/255 each makes an input of 0 to 255."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """Order of the teacher's colour channels."""

    nodes: Options = field(default_factory=dict)
    """ONNX: which output is the class `logits` (B, K), the `pooled` feature (B, C), the `grid` feature (B, C, h, w);
    written `logits=NAME`."""
    maps: tuple[str, ...] = ()
    """ONNX: outputs (B, C, h, w) that hold class probabilities per cell; several scales are merged by their maximum."""
    map_classes: str = ":"
    """Channels of `maps` that are classes, FIRST:END, such as `5:85`."""
    map_objectness: int | None = None
    """Channel of `maps` that every class probability is multiplied with, as detectors have it."""
    map_size: int = 10
    """Side of the grid of cells to which `maps` are brought."""

    logit_weight: float = 0.2
    """Weight of the loss on class probabilities (Kullback-Leibler divergence)."""
    pooled_weight: float = 0.5
    """Weight of the loss on the pooled feature (mean square of standardised channels)."""
    grid_weight: float = 2.0
    """Weight of the loss on the feature map, resized to the student's grid (mean square of standardised channels)."""
    map_weight: float = 0.3
    """Weight of the loss on class maps (binary cross-entropy summed over classes)."""
    temperature: float = 2.0
    """Softens both class distributions before they are compared."""

    def __post_init__(self):
        first, colon, end = self.map_classes.partition(":")
        if not colon or not all(part.isdecimal() or not part for part in (first, end)):
            raise ValueError(f"map_classes is '{self.map_classes}'; write FIRST:END, such as 5:85")
        if unknown := set(self.nodes) - {"logits", "pooled", "grid"}:
            raise ValueError(f"a teacher has no '{unknown.pop()}'; nodes may name logits, pooled and grid")
        if self.kind == "onnx" and not self.nodes and not self.maps:
            raise ValueError(f"say which outputs of '{self.name}' to learn from, with nodes or maps")


AT_LEAST_ONE = ("image_size", "early_size", "late_size", "store_size", "views", "captions_repeat", "num_words")
AT_LEAST_ONE += ("batch_size", "workers", "probe_images", "log_every")
SHARES = ("train_stem", "early_share", "min_crop", "label_smoothing", "warmup", "ema")


@dataclass(frozen=True)
class PretrainConfig:
    """Make an encoder, from labels, from teachers and from the words of captions, over several compressed grids."""

    output: Path = Path("runs/pretrain")
    """Folder of the checkpoints, the log and the exported encoder."""
    encoder: str = "lookupvit_small_patch16_224"
    """timm name of the student, or `local-dir:FOLDER` to go on from an exported encoder."""
    encoder_options: Options = field(default_factory=dict)
    """Further keyword arguments of the encoder: `depth=6 drop_path_rate=0.1`. They replace all that a recipe has."""
    init_from: str | None = None
    """Start from the weights of a timm ViT of the same width (`local-dir:FOLDER` and `hf-hub:NAME` too). An encoder
    whose stem is a timm network (`--encoder-options stem=mobilenetv2_100`) starts from that network's instead, or,
    unless they are named here, from those of the teacher that is this network."""
    train_stem: float = 0.0
    """Share of the steps, the last ones, in which such a stem is trained with the rest; before, all of it but its last,
    linear layer stays as it began. Any other stem is trained all along."""
    grids: tuple[int, ...] = (3, 5, 7, 10)
    """Compressed grids, one drawn per step, so that one set of weights serves all; a repeated one comes more often."""
    image_size: int = 224
    """Side in pixels of the augmented view that student and teachers share."""
    early_size: int = 160
    """Side in pixels at which the student sees the view early on: cheaper, and most is learned on small views."""
    early_share: float = 0.0
    """Share of the steps that take `early_size`."""
    late_size: int | None = None
    """Side in pixels at which the student sees the view after that, as captioners then will; `None` for
    `image_size`."""

    images: tuple[str, ...] = ()
    """Folders (a subfolder is a class), parquet files or WebDataset .tar shards, by path or glob."""
    captions: str | None = None
    """Captioned images (see `captioner train --help`): their images are used, and their words are labels."""
    captions_repeat: int = 1
    """How often the captioned images come in an epoch."""
    captions_split: str = "train"
    """Split of the captioned images; never train on `val` or `test`."""
    store: Path | None = None
    """Folder of decoded images and teacher outputs, which runs may share; `None` for `output/store`."""
    store_size: int = 256
    """Side in pixels of a decoded image; one takes 3 bytes a pixel of disk."""
    views: int | None = None
    """Distinct views of an image, whose teacher outputs are kept on disk; `None` draws a fresh view every time."""
    min_crop: float = 0.35
    """Least share of the image in a random crop."""

    teachers: tuple[TeacherConfig, ...] = ()
    """Networks to distil from; none to learn from labels alone."""
    label_weight: float = 0.0
    """Weight of the cross-entropy on class labels, for images that have them."""
    label_smoothing: float = 0.1
    """Share of the label's probability spread over all classes."""
    mixup: float = 0.0
    """Alpha of mixup (labels only); teachers then see the mixed view too."""
    cutmix: float = 0.0
    """Alpha of cutmix, likewise."""
    num_words: int = 1000
    """Most frequent caption words to predict; used with `captions`."""
    word_weight: float = 0.03
    """Weight of the loss on caption words (binary cross-entropy, summed over words)."""
    words_from: Literal["captions", "teachers"] = "captions"
    """Whose words: an image's own captions', which are soon known by heart where images are few, or those that its
    teachers' outputs suggest, by a regression that has not seen the image's captions (and for every image)."""

    steps: int = 10_000
    """Optimiser steps in all."""
    batch_size: int = 128
    """Images per step and process."""
    optimizer: str = "adamw"
    """timm name of the optimiser."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decay of matrices and embeddings; norms and biases are left undecayed."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly; then it falls as a cosine."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then probed and exported; 0 for none."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of student and teachers; `auto` takes bf16 on GPUs that have it."""
    compile: bool = False
    """Compile the student with `torch.compile`."""
    workers: int = 4
    """Threads that decode images."""
    seed: int = 0
    """Seed of weights, data order, views and grids."""

    probe_train: str | None = None
    """Labelled images (as `images`) on which, at the end, a linear probe is fitted for each grid."""
    probe_val: str | None = None
    """Labelled images whose share classified right is reported: by the probe, by neighbours, by the label head."""
    probe_images: int = 10_000
    """Images the probe is fitted on, at most."""
    log_every: int = 50
    """Steps between log lines."""
    save_minutes: float = 5.0
    """Minutes between checkpoints."""
    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint in `output`, if there is one; `never` starts afresh, and refuses
    an `output` that has checkpoints; anything else is the folder of a checkpoint to go on from."""
    max_minutes: float | None = None
    """Stop after this many minutes with a checkpoint (a further run goes on); `None` runs to the end."""

    @property
    def student_size(self) -> int:
        """Side in pixels of the view as the student sees it at last."""
        return self.late_size or self.image_size

    def __post_init__(self):
        if not self.grids or min(self.grids) < 1:
            raise ValueError(f"grids are positive, not {self.grids}")
        for name in AT_LEAST_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is a share of 1, not {getattr(self, name)}")
        if bool(self.probe_train) != bool(self.probe_val):
            raise ValueError("a probe needs images to learn from and others to try it on: --probe-train, --probe-val")
        if self.words_from == "teachers" and not self.teachers:
            raise ValueError("--words-from teachers needs teachers to tell them: give --teachers")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs: --batch-size must be even, not {self.batch_size}")
        if (self.mixup or self.cutmix) and self.views is not None:
            raise ValueError("mixup and cutmix make a new view every time: leave --views unset, or both at 0")
        if (self.mixup or self.cutmix) and self.label_weight <= 0:
            raise ValueError("mixup and cutmix mix class labels: give --label-weight, or leave both at 0")
