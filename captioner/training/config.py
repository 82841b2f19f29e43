"""Every setting of a run: one typed dataclass per job, saved beside its results. Imports nothing heavy."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from captioner.data.config import DataConfig
from captioner.errors import ConflictError, SettingError, check_positive, check_seed, check_shares
from captioner.grids import parse_grid, write_grid

LORA = ("lora_rank", "lora_alpha", "lora_dropout")
"""Settings of `ModelConfig` that only `tune="lora"` uses."""
SCRATCH = ("layers", "width", "heads", "dropout", "vocab_size")
"""Settings of `ModelConfig` that only a decoder from scratch uses."""


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder, and how an image is prepared for it."""

    encoder: str = "lookupvit_small_patch16_224"
    """timm name, `local-dir:FOLDER` of an encoder that `captioner pretrain` exported, `hf-hub:OWNER/NAME`, or `shipped`
    for the encoder of the captioner that comes with this package."""
    image_size: int | None = None
    """Side of the square image in pixels; `None` for the encoder's own."""
    crop_mode: Literal["squash", "center", "border"] = "squash"
    """How an image becomes a square: `squash` resizes all of it, `center` crops its centre, `border` pads it."""

    def __post_init__(self) -> None:
        check_positive(self, "image_size")


def changed(settings: Any, defaults: Any) -> list[str]:
    """Return the names of the settings that differ from the defaults."""
    return [part.name for part in fields(defaults) if getattr(settings, part.name) != getattr(defaults, part.name)]


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The encoder and the decoder, and how they are joined."""

    grid: str | None = None
    """Compressed grid such as `5x5`; `None` for the encoder's own (LookupViT: 5x5; other models: all their tokens)."""
    fusion: Literal["prefix", "cross_attention"] = "prefix"
    """`prefix` puts the image tokens before the text; with `cross_attention`, every decoder layer attends to them."""
    decoder: str | None = None
    """Hub id or folder of a causal language model; or the folder of a captioner, such as one of stage text, whose
    decoder is taken. `None` trains a small GPT-2 from scratch, with a tokenizer of its own."""
    tune: Literal["full", "projector", "lora"] = "full"
    """What is trained: `full` means projector and decoder, `projector` the projector alone, and `lora` the projector
    and low-rank updates of the decoder."""
    lora_rank: int = 16
    """Rank of LoRA's updates. Every linear layer of the decoder has one, except its head."""
    lora_alpha: float = 32.0
    """LoRA's updates are multiplied by this number, divided by their rank."""
    lora_dropout: float = 0.05
    """Dropout on the input of LoRA's updates."""
    layers: int = 3
    """Layers of a decoder from scratch."""
    width: int = 384
    """Width of a decoder from scratch."""
    heads: int = 6
    """Attention heads of a decoder from scratch."""
    dropout: float = 0.1
    """Dropout of a decoder from scratch."""
    vocab_size: int = 6000
    """Size of the vocabulary (byte-level BPE) of a decoder from scratch."""
    tags: Path | None = None
    """Folder of a trained tag head, which `captioner tags` made for this encoder. Its tags become part of the
    captioner. Stage text takes the file of a vocabulary, too, such as `tags.json` of a head of another encoder."""
    prompt: str = ""
    """Text that every caption continues, such as `A photo of`."""
    max_length: int = 40
    """Tokens of a training caption, with start token and prompt, above which it is cut."""
    blind: bool = False
    """Zero the image tokens: this trains the image-blind baseline, which writes captions without seeing the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "lora_rank", "lora_alpha", "layers", "width", "heads", "vocab_size", "max_length")
        check_shares(self, "dropout", "lora_dropout")
        parse_grid(self.grid)
        if self.decoder is None and self.width % self.heads:
            raise SettingError(f"width {self.width} is no multiple of the {self.heads} heads", "width", "heads")
        for name in LORA:
            if self.tune != "lora" and getattr(self, name) != getattr(ModelConfig, name):
                raise ConflictError(f"{name} is set, but tune is '{self.tune}', not 'lora'", "tune", name)


@dataclass(frozen=True)
class ScstConfig:
    """Self-critical training: captions are rewarded by how much better than a baseline they score."""

    samples: int = 5
    """Captions generated for each image."""
    search: Literal["sample", "beam"] = "sample"
    """How they are generated: `sample` draws them from the model's probabilities, `beam` takes the beams of one
    search."""
    baseline: Literal["mean", "greedy"] = "mean"
    """What a caption is compared with: the `mean` of the image's other captions, or its `greedy` caption."""
    bleu_weight: float = 0.0
    """Weight of BLEU-4 (0 to 1) in the reward. CIDEr-D (0 to 10) has the weight 1."""
    meteor_weight: float = 0.0
    """Weight in the reward of a score close to METEOR (0 to 1), without synonyms and paraphrases."""
    object_weight: float = 0.0
    """Weight in the reward of naming the right objects (F1, 0 to 1): those that the references name."""
    objects: Path | None = None
    """Vocabulary of the objects for `object_weight`: a file, or the folder of a tag head. `None` takes the captioner's
    tags."""
    xe_weight: float = 0.0
    """Weight of cross-entropy on human texts beside the rewards: a token of theirs is learned as one of a sample whose
    reward is this much above the baseline. The texts are those of stage xe."""

    def __post_init__(self) -> None:
        least = 2 if self.baseline == "mean" else 1
        if self.samples < least:
            raise SettingError(
                f"the {self.baseline} baseline needs at least {least} samples, not {self.samples}", "samples"
            )
        for name in ("bleu_weight", "meteor_weight", "object_weight", "xe_weight"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise SettingError(f"{name} must be 0 or more, not {value}", name)


@dataclass(frozen=True)
class InputConfig:
    """What the decoder reads in training: image tokens, object tags, both or neither, so that each works alone."""

    tag_dropout: float = 0.3
    """Share of the texts that are learned without any of their tags."""
    single_tag_dropout: float = 0.0
    """Largest share of single tags that are left out. For each text, the share is drawn between 0 and this one."""
    tag_spread: float = 0.0
    """For each batch of images, the least probability of a tag is drawn within this distance of the captioner's own, so
    that more or fewer tags may be given later."""
    image_dropout: float = 0.0
    """Share of the captions that are learned without their image: the image tokens are zeros."""
    text_share: float = 0.0
    """Share of sentences of `data.text` among the texts that are learned by cross-entropy, on average over the steps.
    They have no image, and the tags that their own words mention."""

    def __post_init__(self) -> None:
        check_shares(self, "tag_dropout", "single_tag_dropout", "tag_spread", "image_dropout", "text_share")
        if self.text_share == 1:
            raise SettingError(
                "text_share 1 leaves no captions of images; stage text learns from text alone", "text_share"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Train a caption decoder on a frozen encoder."""

    output: Path = Path("runs/train")
    """Folder of the checkpoints, the log, the samples and the best model (`output/best`). Stage text writes into
    `output/text`, and stage scst into `output/scst`."""
    stage: Literal["text", "xe", "scst"] = "xe"
    """`text` teaches the decoder language from sentences without images; `xe` trains on images by cross-entropy; `scst`
    continues a trained captioner with self-critical training."""
    init_from: str | None = None
    """Captioner to start from: a folder, a hub id, or `shipped` for the one that comes with this package. It has its
    own model settings, so that only `tune` and LoRA's can be set beside it. With `None`, stage text starts from
    scratch; stage xe with the decoder of `output/text/best` if there is one, else from scratch; and stage scst from
    `output/best`."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    scst: ScstConfig = field(default_factory=ScstConfig)
    inputs: InputConfig = field(default_factory=InputConfig)

    grids: tuple[str, ...] = ()
    """Compressed grids such as `3x3 5x5 5x5 10x10`. Each step draws one of them, so that one decoder serves all; a
    repeated one is drawn more often. The model's own grid, at which it is validated, must be among them, and a token
    cache must hold them all. Without any, every step uses the model's own."""
    epochs: float = 12.0
    """Passes over the training images, or in stage text over the sentences."""
    batch_size: int = 32
    """Images per forward pass and process; in stage text, sentences."""
    accumulation: int = 1
    """Forward passes per optimiser step. All tokens of a step have the same weight, however it is divided."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of matrices and embeddings. Norms and biases have none."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly. After them it falls as a cosine."""
    clip: float = 1.0
    """Largest gradient norm."""
    label_smoothing: float = 0.1
    """Share of the probability that is spread over the vocabulary."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; `auto` takes bf16 on GPUs that have it."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: this takes less memory and more time."""
    seed: int = 0
    """Seed of weights, data order and dropout."""

    evaluate_every: float = 1.0
    """Epochs between validations (loss, CIDEr, sample captions)."""
    evaluate_images: int | None = None
    """Number of validation images of each data set that are used; `None` for all."""
    num_beams: int = 3
    """Beams of the search in validation, and of the saved model."""
    max_new_tokens: int = 24
    """Longest generated caption in tokens, in validation and for the saved model."""
    patience: int | None = 5
    """Training stops after this many validations without a better CIDEr (in stage text, a lower loss); `None` never
    stops early."""

    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights in `output/best`. Half precision halves the size of the file."""
    log_every: int = 20
    """Optimiser steps between log lines."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate to log to, such as `tensorboard` or `wandb`."""
    save_minutes: float = 10.0
    """Minutes between checkpoints. One is also written before and after each validation, and when a signal stops the
    run."""
    save_steps: int | None = None
    """Optimiser steps between further checkpoints; `None` for none."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that stay on disk. The best model is saved apart from them."""
    resume: str = "auto"
    """`auto` continues from the newest undamaged checkpoint in `output`, if there is one. `never` starts anew, and
    refuses an `output` that holds a model, a log or checkpoints. Anything else is the folder of a checkpoint to
    continue from."""

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size", "accumulation", "learning_rate", "clip", "evaluate_every")
        check_positive(self, "evaluate_images", "num_beams", "max_new_tokens", "log_every", "patience")
        check_positive(self, "keep_checkpoints", "save_steps")
        check_seed(self)
        check_shares(self, "warmup", "label_smoothing")
        if self.data.streaming and self.stage != "xe":
            raise SettingError(
                f"stage {self.stage} needs the captions of all images at once, which a stream does not give",
                "streaming",
            )
        if self.stage == "text" and self.model.tune == "projector":
            raise SettingError("stage text trains the decoder, but tune is 'projector'", "tune")
        if self.stage != "scst" and (given := changed(self.scst, ScstConfig())):
            fact = f"settings of stage scst are given, but the stage is {self.stage}"
            raise ConflictError(fact, "stage", *(f"scst.{name}" for name in given))
        names = tuple(write_grid(parse_grid(grid)) for grid in self.grids)
        object.__setattr__(self, "grids", names)  # as caches and checkpoints have them

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return self.output if self.stage == "xe" else self.output / self.stage

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others, such as `scst.samples`, to the reason."""
        unused: dict[str, str] = {}
        if self.stage == "scst":
            unused["label_smoothing"] = "the stage is scst, which learns from rewards"
        else:
            unused |= {f"scst.{f.name}": f"the stage is {self.stage}" for f in fields(ScstConfig)}
        if self.stage == "text":
            without = ["data.tokens", "data.weights", "data.captions_per_image", "data.workers", "model.blind"]
            without += ["inputs.image_dropout", "inputs.text_share", "inputs.tag_spread"]
            unused |= dict.fromkeys(without, "stage text takes the captions of all sets once, and no image")
        elif not self.inputs.text_share:
            unused["data.text"] = "inputs.text_share is 0"
        if self.model.tune != "lora":
            unused |= {f"model.{name}": f"tune is '{self.model.tune}', not 'lora'" for name in LORA}
        if self.init_from is not None or self.stage == "scst":
            own = {f.name for f in fields(ModelConfig)} - {"tune", *LORA}
            unused |= {f"model.{name}": "the captioner that training starts from has its own" for name in own}
        elif self.model.decoder is not None:
            unused |= {f"model.{name}": "it is for a decoder from scratch" for name in SCRATCH}
        if self.data.streaming:
            unused["data.restval"] = "a stream reads the rows of one split"
        else:
            unused |= {f"data.{name}": "the data are not streamed" for name in ("stream_buffer", "stream_rows")}
        return unused
