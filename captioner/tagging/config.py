"""Every setting of the training of a tag head, saved beside it. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from captioner.errors import SettingError, check_positive, check_shares
from captioner.grids import parse_grid
from captioner.training.config import EncoderConfig


@dataclass(frozen=True)
class TagDataConfig:
    """The image tokens that are stored already, and how images are loaded."""

    tokens: tuple[Path, ...] = ()
    """Folders that `captioner cache` wrote. Images that they lack are encoded, and their tokens stored in
    `output/tokens`."""
    workers: int = 2
    """Processes that load images."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise SettingError(f"workers must not be negative, but is {self.workers}", "workers")


@dataclass(frozen=True)
class TagsConfig:
    """Make a tag head: it names what is in an image, in words of your own, from the tokens of a frozen encoder."""

    vocabulary: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VOCABULARY")] = ()
    """The tags. A file: JSON with `words`, which maps each name to the phrases that mention it; a JSON list of names;
    or plain text with one name in each line. `words:300`: the 300 most frequent nouns of the captions, after the
    classes of the label file. Several are joined."""
    output: Path = Path("runs/tags")
    """Folder of the head (`tags.json`, `model.safetensors`) and of its scores (`scores.json`, `tags.csv`)."""
    overwrite: bool = False
    """Replace a head that is in `output`."""
    captions: tuple[str, ...] = ()
    """Sets of captioned images, each in any form that `captioner train` reads. What a caption mentions is a tag of its
    image."""
    captions_split: str = "train"
    """Split of the captioned images. Never train on `val` or `test`."""
    labels: Path | None = None
    """Label file: JSON with `classes` and, for each image's file name, the numbers of its classes; or COCO's
    `instances_*.json`. A class is the tag of the same name."""
    images: tuple[str, ...] = ()
    """Folders of further images of the label file, which have no captions."""
    val: tuple[str, ...] = ()
    """Sets of captioned images that choose the best epoch, calibrate the head and score it. Without any, they are a
    tenth of the training images, which then train nothing."""
    val_split: str = "val"
    """Split of these images."""
    held_out: tuple[Path, ...] = ()
    """Annotation files of images that are never used, for example those of a test set. Images are known by the names of
    their files."""
    data: TagDataConfig = field(default_factory=TagDataConfig)
    model: EncoderConfig = field(default_factory=EncoderConfig)
    captioner: str | None = None
    """Folder or hub id of a captioner, or `shipped`. Its encoder, preprocessing and grid are used, in place of those of
    `model`."""
    grids: tuple[str, ...] = ()
    """Compressed grids such as `5x5 3x3 10x10`. Training draws one for each image, so that one head serves all. The
    first is that of validation. Without any, the model's own is used."""

    hidden: int = 512
    """Width of the hidden layer of the head."""
    epochs: int = 25
    """Passes over the training images; the best one is kept."""
    batch_size: int = 256
    """Images in a step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of matrices."""
    dropout: float = 0.5
    """Share of the channels that training drops before each linear layer."""
    mention_weight: float = 1.0
    """Weight of what captions mention, where a label is known, too. A label has the weight 1."""
    min_tag: float = 0.35
    """Probability from which a captioner with this head names a tag, unless it is told otherwise."""
    max_tags: int = 6
    """Most tags that it names, the most probable ones."""
    seed: int = 0
    """Seed of the weights, the data order and the held-out images."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden", "epochs", "batch_size", "learning_rate", "mention_weight", "max_tags")
        check_shares(self, "dropout", "min_tag")
        for grid in self.grids:
            parse_grid(grid)
        if self.captioner is not None and self.model != EncoderConfig():
            raise SettingError("an encoder is set beside a captioner, which has its own encoder", "captioner")
        if self.images and self.labels is None:
            raise SettingError("the images without captions have no labels either", "labels", "images")

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others to the reason."""
        unused: dict[str, str] = {}
        if self.captioner is not None:
            unused |= {f"model.{part.name}": "the captioner has its own" for part in fields(EncoderConfig)}
        if not self.captions and not self.val:
            unused |= dict.fromkeys(("mention_weight",), "there are no captions")
        if not self.captions:
            unused["captions_split"] = "there are no captioned sets"
        if not self.val:
            unused["val_split"] = "a tenth of the training images validates"
        return unused
