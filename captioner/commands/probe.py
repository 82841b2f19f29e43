"""`captioner probe`: measure what a linear map reads off the tokens of frozen encoders."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from captioner.errors import SettingError, check_positive
from captioner.grids import parse_grid

if TYPE_CHECKING:
    from captioner.data.label_files import ImageLabels
    from captioner.data.token_cache import TokenCache
    from captioner.pretraining.probe_images import Features, ProbeImage, ProbeTargets


@dataclass(frozen=True)
class ProbeConfig:
    """Compare frozen encoders: which words of captions, and which classes of objects, can be read off their tokens?

    A ridge regression is fitted on some images and measured on others. No decoder is trained.
    """

    encoders: tuple[str, ...] = ("shipped",)
    """Encoders to compare: `shipped`, timm names with a tag, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`."""
    grids: tuple[str, ...] = ()
    """Compressed grids such as `3x3 5x5`. Without any, each encoder's own (all tokens of a stock model) or, with a
    token cache, all that the cache holds."""
    image_size: int | None = None
    """Side of the square image in pixels; `None` for each encoder's own."""
    crop_mode: Literal["squash", "center", "border"] = "squash"
    """How an image becomes a square: `squash` resizes all of it, `center` crops its centre, `border` pads it."""
    tokens: Path | None = None
    """Folder that `captioner cache` wrote. Image tokens are read from it, and no image is opened or encoded."""

    captions: tuple[str, ...] = ()
    """Sets of captioned images, each in any form that `captioner train` reads, for the words."""
    train_split: str = "train"
    """Split of `captions` to fit on."""
    val_split: str = "val"
    """Split to measure on."""
    val_captions: tuple[str, ...] = ()
    """Sets of captioned images to measure on; without any, those of `captions`."""
    num_words: int = 300
    """Number of words: the most frequent ones of the captions to fit on."""

    labels: Path | None = None
    """Label file, for the classes: JSON with `classes` and, for each image's file name, the numbers of its classes; or
    COCO's `instances_*.json`. Images are known by the names of their files."""
    images: tuple[str, ...] = ()
    """Folders or parquet files of images, as paths or glob patterns; the labelled ones among them are used, beside the
    captioned ones."""
    held_out: tuple[Path, ...] = ()
    """Annotation files of images to measure on: COCO captions, or the test split of Karpathy's. The probe is never
    fitted on them, nor on those of the validation split. Without either, a fifth of the images is held out."""
    num_images: int = 10_000
    """Largest number of images to fit on, and to measure on."""

    output: Path | None = None
    """JSON file for all figures, also those of each word and class."""
    overwrite: bool = False
    """Replace the file if it exists."""
    batch_size: int = 32
    """Images per batch."""
    workers: int = 2
    """Processes that load images."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision in which the encoder computes."""
    seed: int = 0
    """Seed of an encoder that has no trained weights."""

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "num_words", "num_images", "batch_size")
        if self.workers < 0:
            raise SettingError(f"workers must not be negative, but is {self.workers}", "workers")
        for grid in self.grids:
            parse_grid(grid)

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others to the reason."""
        unused: dict[str, str] = {}
        if not self.captions:
            words = ("train_split", "val_split", "val_captions", "num_words")
            unused |= dict.fromkeys(words, "there are no captions")
        if self.labels is None:
            unused["images"] = "there is no label file, labels"
        if self.tokens is not None:
            settings = ("encoders", "image_size", "crop_mode", "images", "batch_size", "workers", "mixed_precision")
            unused |= dict.fromkeys(settings, "tokens are read from the cache")
        return unused


SETTINGS = ProbeConfig


def run(config: ProbeConfig) -> int:
    """Probe, and return the exit code."""
    probe(config)
    return 0


def probe(config: ProbeConfig) -> list[dict[str, Any]]:
    """Run the probing job: print the table, and write the file that the settings name.

    Returns:
        A record for each encoder and grid: `encoder`, `grid`, `tokens`, `width`, and what `probe_labels` and
        `probe_words` return, as `labels` and `words`.

    Raises:
        ValueError: there is nothing to probe for, an encoder or grid does not exist, or no image is held out.
        OSError: a file is missing, or cannot be written.
    """
    from captioner.data.label_files import read_labels
    from captioner.data.token_cache import TokenCache, read_manifest
    from captioner.pretraining.probe_images import read_cache
    from captioner.runs.files import open_whole

    if not config.captions and config.labels is None:
        raise SettingError("there are neither captions nor labels to probe for", "captions", "labels")
    if config.output and config.output.exists() and not config.overwrite:
        raise SettingError(f"'{config.output}' exists", "overwrite")
    labels = read_labels(config.labels) if config.labels else None
    records: list[dict[str, Any]] = []
    if config.tokens is not None:
        manifest = read_manifest(config.tokens)
        names = config.grids or tuple(manifest["grids"])
        cache = TokenCache(config.tokens, grids=names)
        images = find_images(config, labels, cache)
        targets = find_targets(config, labels, images)
        for name, features in zip(names, read_cache(cache, images, names), strict=True):
            records.append({"encoder": manifest["encoder"], "grid": name} | measure(features, targets))
    else:
        images = find_images(config, labels)
        targets = find_targets(config, labels, images)
        for encoder in config.encoders:
            for name, features in encode(config, encoder, images):
                records.append({"encoder": encoder, "grid": name} | measure(features, targets))
    print(format_table(records))
    if config.output:
        with open_whole(config.output) as file:
            json.dump({"settings": asdict(config), "probes": records}, file, indent=1, default=plain, allow_nan=False)
        print(f"figures written to {config.output}")
    return records


def find_images(
    config: ProbeConfig, labels: "ImageLabels | None", cache: "TokenCache | None" = None
) -> list["ProbeImage"]:
    """Collect the images to fit and to measure on; see `ProbeImages`."""
    from captioner.pretraining.batches import read_held_out
    from captioner.pretraining.probe_images import ProbeImages

    found = ProbeImages(read_held_out(config.held_out), cache)
    for name in config.captions:
        found.add_captioned(name, config.train_split, held_out=False)
    for name in config.val_captions or config.captions:
        found.add_captioned(name, config.val_split, held_out=True)
    if labels is not None and cache is not None:
        found.add_cached(cache, labels)
    elif labels is not None:
        for name in config.images:
            found.add_labelled(name, labels)
    images = found.split(config.num_images)
    if not images:
        raise SettingError(f"none of the images is labelled in '{config.labels}'", "images", "labels")
    return images


def encode(config: ProbeConfig, name: str, images: list["ProbeImage"]) -> list[tuple[str, "Features"]]:
    """Encode the images with one encoder; returns the name of each grid and the features."""
    import torch

    from captioner.data.token_cache import grid_name
    from captioner.encoders import frozen_encoder
    from captioner.pretraining.probe_images import encode_images
    from captioner.processing import image_settings

    torch.manual_seed(config.seed)
    encoder = frozen_encoder(name).to("cuda" if torch.cuda.is_available() else "cpu")
    settings = image_settings(encoder.default_cfg, config.image_size, config.crop_mode)
    grids = [parse_grid(grid) for grid in config.grids or (None,)]
    features = encode_images(
        encoder,
        images,
        settings,
        grids,
        batch_size=config.batch_size,
        workers=config.workers,
        precision=config.mixed_precision,
    )
    return [(grid_name(encoder, grid), found) for grid, found in zip(grids, features, strict=True)]


def find_targets(
    config: ProbeConfig, labels: "ImageLabels | None", images: list["ProbeImage"]
) -> dict[str, "ProbeTargets"]:
    """Find what the images are probed for, `labels` and `words`, before any image is encoded.

    Raises:
        ValueError: no image is left to fit on, or to measure on.
    """
    import torch

    from captioner.pretraining.probe_images import captioned_targets, labelled_targets

    targets = {}
    if labels is not None and config.labels is not None:
        targets["labels"] = labelled_targets(labels, images, config.labels)
    if config.captions:
        targets["words"] = captioned_targets(images, config.num_words)
    for found in targets.values():
        found.divide(torch.ones(len(images), dtype=torch.bool))
    return targets


def measure(features: "Features", targets: dict[str, "ProbeTargets"]) -> dict[str, Any]:
    """Fit and measure the probes of one encoder at one grid; returns their figures.

    Raises:
        SettingError: of the images that could be read, none is left to fit on, or to measure on.
    """
    from captioner.pretraining.ridge_probe import probe_labels, probe_words

    record: dict[str, Any] = {"tokens": features.shape[0], "width": features.shape[1]}
    record["features"] = features.pooled.shape[1]
    for kind, found in targets.items():
        parts = found.divide(~features.pooled[:, 0].isnan())
        fit, held_out = ((features.pooled[found.places[part]], found.targets[part]) for part in parts)
        record[kind] = (probe_labels if kind == "labels" else probe_words)(fit, held_out, found.names)
    return record


def format_table(records: list[dict[str, Any]]) -> str:
    """Return the table of figures, for a terminal."""
    columns = {"labels": ("mAP", "micro AP"), "words": ("R2", "mAP")}
    used = [(kind, name) for kind, names in columns.items() if kind in records[0] for name in names]
    rows = [["encoder", "grid", "tokens", *(f"{name} of {kind}" for kind, name in used)]]
    for record in records:
        tokens = f"{record['tokens']} x {record['width']}"
        rows.append([record["encoder"], record["grid"], tokens, *(str(record[kind][name]) for kind, name in used)])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for kind, each in (("labels", "per class"), ("words", "per word")):
        if found := records[0].get(kind):
            counts = f"fitted on {found['fitted']:,} images, measured on {found['measured']:,}"
            lines.append(f"{kind}: {len(found[each])}, {counts}")
    return "\n".join([*lines, "in brackets: 95% intervals over the images"])


def plain(value: Any) -> Any:
    """Return a value of the records, or of the settings, for JSON."""
    from captioner.pretraining.ridge_probe import Measured

    return value.to_dict() if isinstance(value, Measured) else str(value)
