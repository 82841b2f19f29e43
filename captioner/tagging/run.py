"""Make a tag head: read what is known of images, encode the images that no cache has, train, calibrate, score, save."""

import csv
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from captioner.data.cache_filling import fill
from captioner.data.encoding import ViewSettings
from captioner.data.label_files import ImageLabels, read_labels
from captioner.data.token_cache import TokenCache, grid_name
from captioner.encoders import TokenEncoder
from captioner.errors import SettingError
from captioner.grids import Grid, parse_grid
from captioner.metrics.files import read_references
from captioner.metrics.multilabel import score_labels
from captioner.runs.config import save_config
from captioner.runs.files import files_whole, open_whole
from captioner.tag_head import DESCRIPTION, WEIGHTS, TagConfig, TagHead
from captioner.tagging.config import TagsConfig
from captioner.tagging.data import (
    TokenReader,
    captioned_images,
    file_names,
    join_images,
    label_targets,
    labelled_images,
    mention_targets,
    owners,
)
from captioner.tagging.fit import Targets, calibrate, fit_head, pool_images, predict_logits
from captioner.tagging.vocabulary import make_vocabulary
from captioner.tags import TagVocabulary

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

VAL_SHARE = 0.1
"""Share of the images that is held out, where no others validate."""


@dataclasses.dataclass(frozen=True)
class TaggedImages:
    """Images, and what is known of them.

    Attributes:
        table: the n images, a caption table.
        val: whether an image is of the validation sets, bool (n,).
        vocabulary: the K tags.
        labels: 1 or 0 where a label says so, else NaN (n, K).
        mentions: share of the captions that mention each tag, NaN without captions (n, K).
    """

    table: "Dataset"
    val: np.ndarray
    vocabulary: TagVocabulary
    labels: np.ndarray
    mentions: np.ndarray


def make_head(
    config: TagsConfig, accelerator: Accelerator, encoder: TokenEncoder, source: dict, grid: Grid | None
) -> Path:
    """Make a tag head, and return its folder.

    Args:
        config: the settings.
        accelerator: has the device.
        encoder: the frozen encoder, on the device.
        source: its `encoder_fingerprint`.
        grid: compressed grid of the tokens, where the settings have none; `None` for the encoder's default.

    Raises:
        SettingError: a head is in the folder already, there are no images, or the caches are of another encoder.
        ValueError: the vocabulary, the labels or the captions cannot be used.
        OSError: a file cannot be read or written.
    """
    if (config.output / DESCRIPTION).exists() and not config.overwrite:
        raise SettingError(f"'{config.output}' holds a tag head", "overwrite", "output")
    images = read_images(config)
    grids: list[Grid | None] = [parse_grid(each) for each in config.grids] or [grid]
    tokens = TokenReader(open_caches(config, accelerator, encoder, source, grids, images.table), images.table)
    targets = Targets.of(images.labels, images.mentions, config.mention_weight)
    train, val = split_images(images, targets.known[tokens.usable[targets.known]], config.seed)
    warn_of_rare(images.vocabulary, targets, train)
    print(f"{len(train)} training and {len(val)} validation images, {len(images.vocabulary)} tags", flush=True)

    device = accelerator.device
    prefix_tokens = encoder.num_prefix_tokens
    head = TagHead(encoder.embed_dim, len(images.vocabulary), config.hidden, prefix_tokens, config.dropout).to(device)
    views = [pool_images(head, tokens, train, view, each, device) for each in grids for view in range(tokens.views)]
    whole = pool_images(head, tokens, val, 0, grids[0], device)
    epochs = fit_head(head, torch.stack(views, 1), targets, train, whole, val, config, device)
    logits = predict_logits(head, whole, device)
    head.cpu()
    head.scale, head.shift = calibrate(logits, targets, val)
    probabilities = np.zeros(logits.shape, np.float32)
    for fold in (0, 1):  # an image is scored by a calibration that did not see it
        mine = np.arange(len(val)) % 2 == fold
        scale, shift = calibrate(logits[~mine], targets, val[~mine])
        probabilities[mine] = (logits[mine] * scale + shift).sigmoid().numpy()

    scores = {
        kind: score_labels(probabilities, known[val], config.min_tag)
        for kind, known in (("labels", images.labels), ("mentions", images.mentions), ("both", targets.expected()))
        if not np.isnan(known[val]).all()
    }
    best = min(epochs, key=lambda epoch: epoch["val_loss"])["epoch"]
    costs = {"parameters": sum(p.numel() for p in head.parameters()), "multiplications": head.multiplications}
    for kind, found in scores.items():
        print(
            f"{kind} of {found.images} images: mAP {found.mean_ap:.3f}, micro AP {found.micro_ap:.3f}, "
            f"precision {found.precision:.3f} and recall {found.recall:.3f} at {config.min_tag}, "
            f"calibration error {found.calibration_error:.3f}"
        )
    print(
        f"best epoch {best} of {config.epochs}; the head has {costs['parameters'] / 1e6:.2f}M parameters, and takes as "
        "many multiplications for an image"
    )
    summary = {"images": {"train": len(train), "val": len(val)}, "tags": len(images.vocabulary), "best_epoch": best}
    summary |= costs | {kind: dataclasses.asdict(found) for kind, found in scores.items()} | {"epochs": epochs}
    settings = TagConfig(images.vocabulary, config.hidden, config.min_tag, config.max_tags)
    save(config, head, settings, source, [grid_name(encoder, each) for each in grids], summary)
    write_table(config.output / "tags.csv", images, probabilities, val, config.min_tag)
    print(f"tag head in '{config.output}'")
    return config.output


def read_images(config: TagsConfig) -> TaggedImages:
    """Read the images, make the vocabulary, and find out what is known.

    Raises:
        SettingError: there are no images, or no class of the labels is a tag.
        ValueError: the vocabulary, the labels or the captions cannot be used.
        OSError: a file cannot be read.
    """
    labels = read_labels(config.labels) if config.labels is not None else ImageLabels([], {})
    held_out = {Path(name).name for path in config.held_out for name in read_references(path).files.values()}
    val = captioned_images(config.val, config.val_split, held_out)
    skipped = held_out.union(*map(file_names, val)) - {""}
    train = captioned_images(config.captions, config.captions_split, skipped)
    further = labelled_images(config.images, labels, [*train, *val], skipped)
    tables = [*train, *([] if further is None else [further]), *val]
    if not tables[: len(tables) - len(val)]:
        raise SettingError("no images to train on: name captioned sets, or labels and folders of images", "captions")
    table = join_images(tables)
    captions = table["captions"][:]
    rows = sum(map(len, val))
    is_val = np.arange(len(table)) >= len(table) - rows
    seen = (text for group in captions[: len(table) - rows] for text in group)
    vocabulary = make_vocabulary(config.vocabulary, seen, labels.classes)
    mentions = mention_targets(captions, vocabulary)
    if config.labels is None:
        return TaggedImages(table, is_val, vocabulary, np.full_like(mentions, np.nan), mentions)
    found = label_targets(table, labels, vocabulary)
    labelled = int((~np.isnan(found)).any(1).sum())
    if not labelled:
        raise ValueError(f"none of the {len(labels.images)} images of '{config.labels}' is among the images")
    absent = len(set(labels.images) - held_out) - labelled
    if absent:
        logger.warning("%d of %d labelled images are not among the images", absent, len(labels.images))
    known = {name.casefold() for name in vocabulary.names}
    if lacking := [name for name in labels.classes if name.casefold() not in known]:
        logger.warning(
            "%d of the %d classes of '%s', such as '%s', are no tags of the vocabulary, and are not learned",
            *(len(lacking), len(labels.classes), config.labels, lacking[0]),
        )
    return TaggedImages(table, is_val, vocabulary, found, mentions)


def open_caches(
    config: TagsConfig,
    accelerator: Accelerator,
    encoder: TokenEncoder,
    source: dict,
    grids: list[Grid | None],
    table: "Dataset",
) -> list[TokenCache]:
    """Open the token caches; images that they lack are encoded into a further one, `output/tokens`.

    Raises:
        SettingError: a cache is of another encoder, or lacks a grid.
        OSError: the disk has not enough space.
    """
    names = [grid_name(encoder, each) for each in grids]
    caches = [TokenCache(folder, source, names) for folder in config.data.tokens]
    missing = np.flatnonzero(owners(caches, table) < 0)
    if len(missing):
        made = caches[0].manifest if caches else {}
        views = ViewSettings(
            made.get("views", 2), made.get("min_crop", 0.6), made.get("seed", 0), made.get("dtype", "float16")
        )
        folder = config.output / "tokens"
        options = {"batch_size": 32, "workers": config.data.workers}
        fill(accelerator, folder, table.select(missing), encoder, source, grids, views, **options)
        caches.append(TokenCache(folder, source, names))
    return caches


def split_images(images: TaggedImages, usable: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the rows that validate, of those that are usable.

    Raises:
        SettingError: there are too few images.
    """
    if images.val.any():
        train, val = usable[~images.val[usable]], usable[images.val[usable]]
    else:
        shuffled = np.random.default_rng(seed).permutation(usable)
        count = math.ceil(VAL_SHARE * len(usable))
        train, val = np.sort(shuffled[count:]), np.sort(shuffled[:count])
    if not len(train) or not len(val):
        raise SettingError(
            f"of {len(train)} training and {len(val)} validation images a tag is known and the image can be read, "
            "which is too few",
            *("captions", "labels"),
        )
    return train, val


def warn_of_rare(vocabulary: TagVocabulary, targets: Targets, train: np.ndarray) -> None:
    """Warn of tags that no training image has; the head cannot learn them."""
    seen = (targets.values[train] * targets.weights[train]).sum(0) > 0
    if absent := [name for name, found in zip(vocabulary.names, seen.tolist(), strict=True) if not found]:
        logger.warning("no training image has %d of the %d tags, such as '%s'", len(absent), len(vocabulary), absent[0])


def save(config: TagsConfig, head: TagHead, settings: TagConfig, source: dict, grids: list[str], scores: dict) -> None:
    """Write the head, its scores and the settings of the run into the output folder.

    Raises:
        OSError: the disk is full or not writable.
    """
    description = settings.to_dict() | {"width": head.width, "grids": grids, "source": source}
    with files_whole(config.output, "the tag head") as folder:
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
        (folder / "scores.json").write_text(json.dumps(scores, indent=1))
        save_file(head.state_dict(), folder / WEIGHTS)
        (folder / WEIGHTS).chmod((folder / DESCRIPTION).stat().st_mode)
    save_config(config, config.output)


def write_table(path: Path, images: TaggedImages, probabilities: np.ndarray, val: np.ndarray, threshold: float) -> None:
    """Write the scores of each tag on the validation images (n,) as CSV."""
    with open_whole(path) as file:
        writer = csv.writer(file)
        columns = ("images", "positives", "ap", "precision", "recall")
        kinds = {"label": images.labels[val], "mention": images.mentions[val]}
        writer.writerow(["tag", *(f"{kind}_{column}" for kind in kinds for column in columns)])
        for number, name in enumerate(images.vocabulary.names):
            row: list = [name]
            for known in kinds.values():
                found = score_labels(probabilities[:, [number]], known[:, [number]], threshold)
                row += [found.images, found.positives, *map(rounded, (found.mean_ap, found.precision, found.recall))]
            writer.writerow(row)


def rounded(value: float) -> float | str:
    """Return a score with four decimals, or an empty text for NaN."""
    return "" if math.isnan(value) else round(value, 4)
