"""Every setting of encoder pretraining, saved beside its results. Imports nothing heavy."""

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec

from captioner.errors import SettingError, check_positive, check_seed, check_shares


def read_options(words: list[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` words; a value that is not a Python literal is text.

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


MAPS = ("map_classes", "map_objectness", "map_size", "map_weight")
"""Settings of `TeacherConfig` that only a teacher with `maps` uses."""


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen network whose outputs the student learns to predict."""

    name: str = "resnet18"
    """timm name, hub id or folder of a transformers vision model, or path of an ONNX file."""
    kind: Literal["timm", "transformers", "onnx"] = "timm"
    """What `name` stands for: a timm model, a transformers model, or an ONNX file."""
    checkpoint: Path | None = None
    """timm: safetensors file of weights. Without it, timm's pretrained weights come from the hub."""
    num_classes: int | None = None
    """timm: classes of the teacher's classifier; `None` for the model's own."""
    options: Options = field(default_factory=dict)
    """timm: further keyword arguments of `timm.create_model`, such as `pad_type=same`."""

    image_size: int | None = None
    """Side in pixels to which a view is resized for the teacher; `None` leaves it as it is."""
    mean: tuple[float, float, float] | None = None
    """Mean of the teacher's input, for pixels in [0, 1]; `None` for that of the timm or transformers model, and 0.5
    where there is none."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the teacher's input, likewise. 1/255 for each channel makes an input of 0 to 255."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """Order of the teacher's colour channels."""

    nodes: Options = field(default_factory=dict)
    """ONNX: names of the outputs that hold the class `logits` (B, K), the `pooled` feature (B, C) and the `grid`
    feature (B, C, h, w), written `logits=NAME`."""
    maps: tuple[str, ...] = ()
    """ONNX: names of outputs (B, C, h, w) that hold class probabilities for each cell. Several scales are merged by
    their maximum."""
    map_classes: str = ":"
    """Channels of `maps` that stand for classes, written FIRST:END, such as `5:85`; `:` for all."""
    map_objectness: int | None = None
    """Channel of `maps` by which every class probability is multiplied, as detectors have it; `None` for none."""
    map_size: int = 10
    """Side of the grid of cells to which `maps` are resized."""

    logit_weight: float = 0.2
    """Weight of the loss on class probabilities (Kullback-Leibler divergence)."""
    pooled_weight: float = 0.5
    """Weight of the loss on the pooled feature (mean square of standardised channels)."""
    grid_weight: float = 2.0
    """Weight of the loss on the feature map, resized to the student's grid (mean square of standardised channels)."""
    map_weight: float = 0.3
    """Weight of the loss on class maps (binary cross-entropy summed over classes)."""
    temperature: float = 2.0
    """Temperature that softens both class distributions before they are compared."""

    def __post_init__(self) -> None:
        first, colon, end = self.map_classes.partition(":")
        if not colon or not all(part.isdecimal() or not part for part in (first, end)):
            raise SettingError(
                f"map_classes '{self.map_classes}' is not of the form FIRST:END, such as 5:85", "map_classes"
            )
        check_positive(self, "image_size", "num_classes", "map_size", "temperature")
        if unknown := set(self.nodes) - {"logits", "pooled", "grid"}:
            raise SettingError(f"a teacher has no '{unknown.pop()}'; nodes may name logits, pooled and grid", "nodes")
        if self.kind == "onnx" and not self.nodes and not self.maps:
            raise SettingError(f"no output of the teacher '{self.name}' is named to learn from", "nodes", "maps")
        if self.kind != "onnx" and self.nodes:
            raise SettingError(f"nodes are set, but the teacher '{self.name}' is of kind {self.kind}, not onnx", "kind")
        if self.kind != "timm" and self.checkpoint is not None:
            raise SettingError(
                f"a checkpoint is set, but the teacher '{self.name}' is of kind {self.kind}, not timm", "kind"
            )

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others to the reason."""
        unused: dict[str, str] = {}
        if self.kind != "timm":
            reason = f"the teacher is of kind {self.kind}, not timm"
            unused |= dict.fromkeys(("checkpoint", "num_classes", "options"), reason)
        if self.kind != "onnx":
            reason = f"the teacher is of kind {self.kind}, not onnx"
            unused |= dict.fromkeys(("nodes", "maps", *MAPS), reason)
        elif not self.maps:
            unused |= dict.fromkeys(MAPS, "the teacher has no maps")
        return unused


@dataclass(frozen=True)
class PretrainConfig:
    """Train an encoder on class labels, outputs of teachers and words of captions, at several compressed grids."""

    output: Path = Path("runs/pretrain")
    """Folder of the checkpoints, the log and the exported encoder."""
    encoder: str = "lookupvit_small_patch16_224"
    """Encoder to train, the student: a timm name, or `local-dir:FOLDER` to continue with an exported encoder."""
    encoder_options: Options = field(default_factory=dict)
    """Keyword arguments of the encoder, such as `depth=6 drop_path_rate=0.1`. They replace all those of the recipe."""
    init_from: str | None = None
    """timm ViT of the same width to start from (`local-dir:FOLDER` and `hf-hub:NAME`, too). An encoder whose stem is a
    timm network (`stem=mobilenetv2_100` among its options) starts from that network. With `None`, such a stem takes its
    weights from the teacher that is the same network."""
    train_stem: float = 0.0
    """Share of the steps, at the end of the run, in which a stem that is a timm network is trained with the rest.
    Before them, only its last, linear layer is trained. Any other stem is trained in every step."""
    grids: tuple[int, ...] = (3, 5, 7, 10)
    """Sides of the compressed grids. Each step draws one, so that one set of weights serves all; a repeated one is
    drawn more often."""
    image_size: int = 224
    """Side in pixels of the augmented view of an image, which student and teachers share."""
    early_size: int = 160
    """Side in pixels of the student's view in the first steps. Small views are cheaper, and teach most of it."""
    early_share: float = 0.0
    """Share of the steps that use `early_size`."""
    late_size: int | None = None
    """Side in pixels of the student's view in the other steps, and of the images of captioners with this encoder;
    `None` for `image_size`."""

    images: tuple[str, ...] = ()
    """Folders (a subfolder is a class), parquet files or WebDataset .tar shards, as paths or glob patterns. An image
    that is among the captioned images, too, is taken once."""
    captions: tuple[str, ...] = ()
    """Sets of captioned images, each in any form that `captioner train` reads: more images, and words to learn."""
    captions_repeat: int = 1
    """Number of times that each captioned image is drawn in an epoch."""
    captions_split: str = "train"
    """Split of the captioned images. Never train on `val` or `test`."""
    held_out: tuple[Path, ...] = ()
    """Annotation files of images that are never used, for example those of a validation set. Images are known by the
    names of their files. COCO captions, or the test split of Karpathy's."""
    store: Path | None = None
    """Folder of decoded images and teachers' outputs, which several runs may share; `None` for `output/store`."""
    store_size: int = 256
    """Side in pixels of a decoded image. It takes 3 bytes of disk for each pixel."""
    views: int | None = None
    """Number of fixed views of each image, for which the teachers' outputs are stored on disk; `None` draws a new view
    every time."""
    min_crop: float = 0.35
    """Smallest share of the image's area in a random crop."""

    teachers: tuple[TeacherConfig, ...] = ()
    """Networks to distil from; without any, the encoder learns from labels alone."""
    label_weight: float = 0.0
    """Weight of the cross-entropy on class labels. Images without a label have none."""
    label_smoothing: float = 0.1
    """Share of the label's probability that is spread over all classes."""
    mixup: float = 0.0
    """Alpha of mixup, which mixes pairs of views and their class labels. Teachers see the mixed views."""
    cutmix: float = 0.0
    """Alpha of CutMix, which mixes pairs by rectangles."""
    num_words: int = 1000
    """Number of words to predict: the most frequent ones of the captions."""
    word_weight: float = 0.03
    """Weight of the loss on caption words (binary cross-entropy, summed over words)."""
    words_from: Literal["captions", "teachers"] = "captions"
    """Where an image's words come from. `captions`: from its own captions, which an encoder learns by heart where
    images are few. `teachers`: from a regression on the teachers' outputs, fitted on the captions of other images;
    every image then has words."""

    tags: Path | None = None
    """Label file: JSON with `classes` and, for each image's file name, the numbers of its classes; or COCO's
    `instances_*.json`."""
    tag_weight: float = 0.1
    """Weight of the loss on tags (binary cross-entropy, summed over classes); used with `tags`."""
    tags_from: Literal["labels", "teachers"] = "teachers"
    """Where tags come from. `labels`: the label file, for its images alone. `teachers`: a regression from the teachers'
    outputs, fitted on the labels of other images; it gives tags for every image."""

    steps: int = 10_000
    """Optimiser steps in all."""
    batch_size: int = 128
    """Images per step and process."""
    optimizer: str = "adamw"
    """timm name of the optimiser."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Weight decay of matrices and embeddings. Norms and biases have none."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly. After them it falls as a cosine."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then probed and exported in their place; 0 for
    none."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of student and teachers; `auto` takes bf16 on GPUs that have it."""
    compile: bool = False
    """Compile the student with `torch.compile`."""
    workers: int = 4
    """Threads that decode images."""
    seed: int = 0
    """Seed of weights, data order, views and grids."""

    probe_train: str | None = None
    """Labelled images, in the forms that `images` takes. At the end of the run a linear probe is fitted on them for
    each grid."""
    probe_val: str | None = None
    """Labelled images on which the accuracy of the probe, of nearest neighbours and of the label head is measured."""
    probe_images: int = 10_000
    """Largest number of images that the probe is fitted on."""
    log_every: int = 50
    """Steps between log lines."""
    save_minutes: float = 5.0
    """Minutes between checkpoints."""
    resume: str = "auto"
    """`auto` continues from the newest undamaged checkpoint in `output`, if there is one. `never` starts anew, and
    refuses an `output` that holds an encoder, a log or checkpoints. Anything else is the folder of a checkpoint to
    continue from."""
    max_minutes: float | None = None
    """Stop with a checkpoint after this many minutes; the same command then continues the run. `None` runs to the
    end."""

    @property
    def student_size(self) -> int:
        """Side in pixels of the student's view at the end of the run."""
        return self.late_size or self.image_size

    def __post_init__(self) -> None:
        if not self.grids or min(self.grids) < 1:
            raise SettingError(f"grids must be positive, not {self.grids}", "grids")
        check_seed(self)
        check_positive(self, "image_size", "early_size", "late_size", "store_size", "views", "captions_repeat")
        check_positive(self, "num_words", "batch_size", "workers", "probe_images", "log_every", "learning_rate", "clip")
        check_shares(self, "train_stem", "early_share", "min_crop", "label_smoothing", "warmup", "ema")
        if bool(self.probe_train) != bool(self.probe_val):
            raise SettingError("a probe needs images to be fitted on and others to measure", "probe_train", "probe_val")
        if self.words_from == "teachers" and not self.teachers:
            raise SettingError("words cannot come from teachers, as there are none", "words_from")
        if self.tags is not None and self.tag_weight > 0 and self.tags_from == "teachers" and not self.teachers:
            raise SettingError("tags cannot come from teachers, as there are none", "tags_from")
        if self.mixup or self.cutmix:
            if self.batch_size % 2:
                raise SettingError(f"mixup and cutmix mix pairs, and batch_size {self.batch_size} is odd", "batch_size")
            if self.views is not None:
                raise SettingError("mixup and cutmix make a new view every time, and views are fixed", "views", "mixup")
            if self.label_weight <= 0:
                raise SettingError("mixup and cutmix mix class labels, which have no weight", "label_weight")

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others, such as `teachers.0.maps`, to the reason."""
        unused = {f"teachers.{n}.{name}": why for n, t in enumerate(self.teachers) for name, why in t.unused().items()}
        words = ("num_words", "words_from")
        if self.tags is None:
            unused |= dict.fromkeys(("tag_weight", "tags_from"), "there is no label file, tags")
        if not self.captions:
            unused |= dict.fromkeys(
                ("captions_repeat", "captions_split", "word_weight", *words), "there are no captions"
            )
        elif self.word_weight <= 0:
            unused |= dict.fromkeys(words, "caption words have no weight")
        if not self.early_share:
            unused["early_size"] = "no step takes it: early_share is 0"
        if self.label_weight <= 0:
            unused["label_smoothing"] = "class labels have no weight"
        if self.probe_train is None:
            unused["probe_images"] = "there is no probe"
        return unused
