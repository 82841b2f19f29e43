"""Every setting of a run: one typed dataclass per job, saved beside its results. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from captioner.data.config import DataConfig
from captioner.errors import SettingError, check_positive, check_seed, check_shares
from captioner.grids import parse_grid, write_grid

LORA = ("lora_rank", "lora_alpha", "lora_dropout")
"""Settings of `ModelConfig` that only `tune="lora"` uses."""
SCRATCH = ("layers", "width", "heads", "dropout", "vocab_size")
"""Settings of `ModelConfig` that only a decoder from scratch uses."""


@dataclass(frozen=True)
class EncoderConfig:
    """Which encoder, and how an image is prepared for it."""

    encoder: str = "lookupvit_small_patch16_224"
    """timm name, `local-dir:FOLDER` of an encoder exported by `pretrain`, `hf-hub:OWNER/NAME`, or `shipped` for the
    encoder of the captioner that comes with this package."""
    image_size: int | None = None
    """Side of the image in pixels; `None` for the encoder's own."""
    crop_mode: Literal["squash", "center", "border"] = "squash"
    """How an image becomes a square: squashed whole, its centre cropped, or padded."""

    def __post_init__(self):
        check_positive(self, "image_size")


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """Which encoder and decoder, and how they are joined."""

    grid: str | None = None
    """Compressed grid such as `5x5`; `None` for the encoder's own (LookupViT: 5x5; other models: all their tokens)."""
    fusion: Literal["prefix", "cross_attention"] = "prefix"
    """Image tokens before the text, or attended to by every decoder layer."""
    decoder: str | None = None
    """Hub id or folder of a causal language model; `None` trains a small GPT-2 with its own tokenizer from scratch."""
    tune: Literal["full", "projector", "lora"] = "full"
    """Train decoder and projector, the projector alone, or the projector and low-rank updates of the decoder (LoRA)."""
    lora_rank: int = 16
    """Rank of LoRA's updates, put on every linear layer of the decoder but its head."""
    lora_alpha: float = 32.0
    """Scale of LoRA's updates, times their rank."""
    lora_dropout: float = 0.05
    """Dropout before LoRA's updates."""
    layers: int = 3
    """Layers of the decoder from scratch."""
    width: int = 384
    """Width of the decoder from scratch."""
    heads: int = 6
    """Attention heads of the decoder from scratch."""
    dropout: float = 0.1
    """Dropout of the decoder from scratch."""
    vocab_size: int = 6000
    """Byte-level BPE vocabulary of the decoder from scratch."""
    prompt: str = ""
    """Text that every caption continues, such as `A photo of`."""
    max_length: int = 40
    """Text tokens above which a caption is cut."""
    blind: bool = False
    """Zero the image tokens: the image-blind baseline, which shows what the decoder writes without an image."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "lora_rank", "lora_alpha", "layers", "width", "heads", "vocab_size", "max_length")
        check_shares(self, "dropout", "lora_dropout")
        parse_grid(self.grid)
        if self.decoder is None and self.width % self.heads:
            raise SettingError(f"width {self.width} is no multiple of the {self.heads} heads", "width", "heads")
        for name in LORA:
            if self.tune != "lora" and getattr(self, name) != getattr(ModelConfig, name):
                raise SettingError(f"{name} is set, but tune is '{self.tune}', not 'lora'", "tune")


@dataclass(frozen=True)
class ScstConfig:
    """Self-critical training: sampled captions, rewarded by how much better than a baseline they score."""

    samples: int = 5
    """Captions sampled for each image."""
    search: Literal["sample", "beam"] = "sample"
    """How they are found: drawn from the model's probabilities, or as the beams of one search."""
    baseline: Literal["mean", "greedy"] = "mean"
    """What a sample is compared with: the mean of the image's other samples, or its greedy caption."""
    bleu_weight: float = 0.0
    """Weight of BLEU-4 (0 to 1) in the reward, beside CIDEr-D (0 to 10) at weight 1."""

    def __post_init__(self):
        least = 2 if self.baseline == "mean" else 1
        if self.samples < least:
            raise SettingError(
                f"the {self.baseline} baseline needs at least {least} samples, not {self.samples}", "samples"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Train a caption decoder on a frozen encoder."""

    output: Path = Path("runs/train")
    """Folder of checkpoints, log, samples and the best model (`output/best`); stage scst uses `output/scst`."""
    stage: Literal["xe", "scst"] = "xe"
    """Cross-entropy, or self-critical training from a captioner that cross-entropy made."""
    init_from: str | None = None
    """Folder or hub id of the captioner to start from, or `shipped` for the one that comes with this package. It has
    its own model settings, which hold in place of `model`'s, except `tune` and LoRA's. `None` starts stage xe from
    scratch, and stage scst from `output/best`."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    scst: ScstConfig = field(default_factory=ScstConfig)

    grids: tuple[str, ...] = ()
    """Compressed grids such as `3x3 5x5 5x5 10x10`. Each step draws one of them, so that one decoder serves all. The
    model's own grid, at which it is validated, must be among them, and a token cache must hold them. Without any,
    every step uses the model's own."""
    epochs: float = 12.0
    """Passes over the training images."""
    batch_size: int = 32
    """Images per forward and process."""
    accumulation: int = 1
    """Forwards per optimiser step; the loss is weighted by tokens, so how a step is split does not matter."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Decay of matrices and embeddings; norms and biases are left undecayed."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly; then it falls as a cosine."""
    clip: float = 1.0
    """Largest gradient norm."""
    label_smoothing: float = 0.1
    """Share of the probability spread over the vocabulary."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward; `auto` takes bf16 on GPUs that have it."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass, to save memory."""
    seed: int = 0
    """Seed of weights, data order and dropout."""

    evaluate_every: float = 1.0
    """Epochs between validations (loss, CIDEr, sample captions)."""
    evaluate_images: int | None = None
    """Validation images used; `None` for all."""
    num_beams: int = 3
    """Beams of the captions generated in validation, and of the saved model."""
    max_new_tokens: int = 24
    """Longest generated caption in tokens, in validation and of the saved model."""
    patience: int | None = 5
    """Validations without a better CIDEr after which training stops; `None` never stops early."""

    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights in `output/best`; half precision halves the file."""
    log_every: int = 20
    """Optimiser steps between log lines."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate to log to, such as `tensorboard` or `wandb`."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; one is also written before and after each validation, and after a signal to stop."""
    save_steps: int | None = None
    """Optimiser steps between checkpoints, in addition."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that stay; the best model is saved apart from them."""
    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint in `output`, if there is one. `never` begins anew, and refuses an
    `output` with a model, a log or checkpoints. Anything else is the folder of a checkpoint to go on from."""

    def __post_init__(self):
        check_positive(self, "epochs", "batch_size", "accumulation", "learning_rate", "clip", "evaluate_every")
        check_positive(self, "evaluate_images", "num_beams", "max_new_tokens", "log_every", "patience")
        check_positive(self, "keep_checkpoints", "save_steps")
        check_seed(self)
        check_shares(self, "warmup", "label_smoothing")
        if self.data.streaming and self.stage == "scst":
            raise SettingError(
                "stage scst needs the captions of all images at once, which a stream does not give", "streaming"
            )
        if self.stage == "xe" and self.scst != ScstConfig():
            raise SettingError("settings of stage scst are given, but the stage is xe", "stage")
        names = tuple(write_grid(parse_grid(grid)) for grid in self.grids)
        object.__setattr__(self, "grids", names)  # as caches and checkpoints have them

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return self.output if self.stage == "xe" else self.output / "scst"

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others, such as `scst.samples`, to the reason."""
        unused: dict[str, str] = {}
        if self.stage == "xe":
            unused |= {f"scst.{f.name}": "the stage is xe" for f in fields(ScstConfig)}
        else:
            unused["label_smoothing"] = "the stage is scst, which learns from rewards"
        if self.model.tune != "lora":
            unused |= {f"model.{name}": f"tune is '{self.model.tune}', not 'lora'" for name in LORA}
        if self.init_from is not None or self.stage == "scst":
            names = {f.name for f in fields(ModelConfig)} - {"tune", *LORA}
            unused |= {f"model.{name}": "the captioner that training starts from has its own" for name in names}
        elif self.model.decoder is not None:
            unused |= {f"model.{name}": "it is for a decoder from scratch" for name in SCRATCH}
        if self.data.streaming:
            unused["data.restval"] = "a stream reads the rows of one split"
        else:
            unused |= {f"data.{name}": "the data are not streamed" for name in ("stream_buffer", "stream_rows")}
        return unused
