"""`captioner cache`: put every image of a caption table through the frozen encoder, once, on every process."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from captioner.data.config import SourceConfig
from captioner.errors import ConflictError, SettingError, check_positive, check_seed
from captioner.grids import Grid, parse_grid
from captioner.training.config import EncoderConfig, changed

if TYPE_CHECKING:
    import torch

    from captioner.encoders import TokenEncoder
    from captioner.tagging.config import TagsConfig


@dataclass(frozen=True)
class CacheConfig:
    """Encode images once and store their tokens on disk, where training and evaluation read them (`--data.tokens`)."""

    output: Path = Path("runs/tokens")
    """Folder of the cache. If it exists, only images that it lacks are encoded."""
    data: SourceConfig = field(default_factory=SourceConfig)
    splits: tuple[str, ...] = ("train", "val")
    """Splits to encode; of several data sets, some may lack a split. Others can be added to the same folder later."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    captioner: str | None = None
    """Folder or hub id of a captioner, or `shipped`. Its encoder, preprocessing and grid are used, in place of those of
    `--model.*`."""
    grids: tuple[str, ...] = ()
    """Compressed grids such as `3x3 5x5`. Without any, the model's own is used."""
    views: int = 1
    """Views of each image: first the image, then its mirror image, then random crops, each mirrored or not. A training
    step draws one of them."""
    min_crop: float = 0.6
    """Smallest share of the image's area in a random crop."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Half-precision format in which tokens are stored."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision in which the encoder computes."""
    batch_size: int = 32
    """Images per batch and process."""
    seed: int = 0
    """Seed of the random crops, and of an encoder that has no trained weights; `captioner train` must then have the
    same."""

    def __post_init__(self) -> None:
        check_positive(self, "views", "batch_size")
        check_seed(self)
        if not self.splits:
            raise SettingError("there is no split to encode", "splits")
        if not 0 < self.min_crop <= 1:
            raise SettingError(
                f"min_crop is a share of the image, above 0 and up to 1, not {self.min_crop}", "min_crop"
            )
        if self.captioner is not None and (names := changed(self.model, EncoderConfig())):
            fact = "an encoder is set beside a captioner, which has its own encoder"
            raise ConflictError(fact, "captioner", *(f"model.{name}" for name in names))
        for grid in self.grids:
            parse_grid(grid)

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others to the reason."""
        unused: dict[str, str] = {}
        if self.captioner is not None:
            unused |= {f"model.{part.name}": "the captioner has its own" for part in fields(EncoderConfig)}
        if self.views < 3:
            unused["min_crop"] = "the first two views are no random crops"
        return unused


SETTINGS = CacheConfig


def run(config: CacheConfig) -> int:
    """Fill the cache, and return the exit code: 1 where images are left out."""
    return 1 if fill_cache(config) else 0


def fill_cache(config: CacheConfig) -> int:
    """Run the caching job; returns the number of images that could not be read and are left out.

    Raises:
        ValueError: there are no data, no such encoder or no such grid, or the folder holds something else.
        OSError: the disk has not enough space, or becomes full; finished shards stay.
    """
    from accelerate.utils import set_seed

    from captioner.data.cache_filling import fill, join_tables
    from captioner.data.encoding import ViewSettings
    from captioner.data.sets import read_sets
    from captioner.runs.files import check_folder
    from captioner.runs.processes import start_processes

    check_folder(config.output)
    accelerator = start_processes(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    encoder, source, own = open_encoder(config, accelerator.device)
    with accelerator.main_process_first():  # the other processes then find the table cached
        several = len(config.data.root) > 1
        tables = [table for split in config.splits for table in read_sets(config.data, split, some=several)]
        table = join_tables([table for table in tables if table is not None])
    left_out = fill(
        accelerator,
        config.output,
        table,
        encoder,
        source,
        [parse_grid(grid) for grid in config.grids] or [own],
        ViewSettings(config.views, config.min_crop, config.seed, config.dtype),
        batch_size=config.batch_size,
        workers=config.data.workers,
    )
    accelerator.end_training()
    return left_out


def open_encoder(
    config: "CacheConfig | TagsConfig", device: "torch.device"
) -> tuple["TokenEncoder", dict, Grid | None]:
    """Build the frozen encoder on a device.

    Returns:
        The encoder; its fingerprint, as `encoder_fingerprint` returns it; and the grid of its captioner, `None` for the
        encoder's default.
    """
    from captioner.data.fingerprint import encoder_fingerprint
    from captioner.encoders import describe_encoder, frozen_encoder
    from captioner.inference import load
    from captioner.processing import image_settings

    if config.captioner is not None:
        captioner = load(config.captioner, str(device))
        model = captioner.model
        source = encoder_fingerprint(model.encoder, model.config.encoder_config, captioner.processor.image)
        return model.encoder, source, model.config.grid
    encoder = frozen_encoder(config.model.encoder).to(device)
    settings = image_settings(encoder.default_cfg, config.model.image_size, config.model.crop_mode)
    return encoder, encoder_fingerprint(encoder, describe_encoder(config.model.encoder), settings), None
