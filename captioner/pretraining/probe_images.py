"""The images of a probe: which of them it is fitted on, which it is measured on, and their pooled features.

Letters: n images, B images of a batch, M image tokens, D their width, F features.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from captioner.data.label_files import ImageLabels
from captioner.data.readers import read_captions
from captioner.data.token_cache import TokenCache, image_names
from captioner.encoders import TokenEncoder, rebuild_encoder
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.images import ImageError, open_image
from captioner.pretraining.image_store import file_name, file_path, open_source
from captioner.pretraining.words import CaptionWords, word_shares
from captioner.runs.processes import leave_signals_to_main
from captioner.runs.progress import progress_bar

logger = logging.getLogger(__name__)

PARTS = 5
"""Where no image is held out, one of this many parts of the images is."""


@dataclass
class ProbeImage:
    """An image of a probe.

    Attributes:
        source: the image, as `open_image` takes it, or its name in a token cache.
        name: name of its file, empty where it has none.
        held_out: whether it is measured on, and never fitted on.
        captions: its captions; empty where it has none.
    """

    source: Any
    name: str
    held_out: bool
    captions: list[str] = field(default_factory=list)


class ProbeImages:
    """Collects the images of a probe, each once.

    Args:
        held_out: names of image files that are measured on, and never fitted on.
        cache: token cache of the images, in which each image is then found by its name.
    """

    def __init__(self, held_out: Iterable[str] = (), cache: TokenCache | None = None):
        self.held_out, self.cache = set(held_out), cache
        self.images: dict[Any, ProbeImage] = {}
        self.missing = 0

    def add_captioned(self, name: str, split: str, held_out: bool) -> None:
        """Add a split of a set of captioned images.

        Args:
            name: the set, in any form that `read_captions` reads.
            split: its split.
            held_out: whether these images are measured on.

        Raises:
            ValueError: the set cannot be read or has no such split, or a token cache lacks all of its images.
        """
        table = read_captions(name, split)
        cached = image_names(table) if self.cache is not None else None
        lacking = 0
        for row, (image, captions) in enumerate(zip(table["image"][:], table["captions"][:], strict=True)):
            source, key = image, file_path(image) or (name, split, row)
            if cached is not None and self.cache is not None:
                source = key = cached[row]
                if source not in self.cache.rows:
                    lacking += 1
                    continue
            found = self.images.setdefault(key, ProbeImage(source, file_name(image), False))
            if held_out and found.name:
                self.held_out.add(found.name)
            if held_out or not found.captions:
                found.held_out, found.captions = held_out, captions
        if lacking == len(table):
            raise SettingError(f"the token cache holds no image of '{name}', split '{split}'", "tokens")
        if lacking:
            logger.warning("'%s', split '%s': left out %d images that the token cache lacks", name, split, lacking)

    def add_labelled(self, name: str, labels: ImageLabels) -> None:
        """Add the images of a folder or of parquet files that a label file names.

        Args:
            name: a folder or a glob pattern.
            labels: the label file's content.

        Raises:
            ValueError: the images cannot be read.
            OSError: there are none.
        """
        for image, _ in open_source(name).items:
            if file_name(image) in labels.images:
                key = file_path(image) or (name, file_name(image))
                self.images.setdefault(key, ProbeImage(image, file_name(image), False))

    def add_cached(self, cache: TokenCache, labels: ImageLabels) -> None:
        """Add the images of a token cache that a label file names."""
        for row in cache.rows:  # "image id, space, file name"; both may contain spaces
            parts = row.split(" ")
            endings = (" ".join(parts[place:]) for place in range(1, len(parts)))
            if name := next((ending for ending in endings if ending in labels.images), None):
                self.images.setdefault(row, ProbeImage(row, name, False))

    def split(self, most: int) -> list[ProbeImage]:
        """Return the images, with at most `most` to fit on and as many to measure on, spread evenly.

        An image with the name of one that is held out is held out, too. Where none is, a fifth of them is, by name.
        """
        images = list(self.images.values())
        chosen = bool(self.held_out) or any(image.held_out for image in images)
        for place, image in enumerate(images):
            image.held_out |= image.name in self.held_out
            if not chosen:
                image.held_out = zlib.crc32((image.name or str(place)).encode()) % PARTS == 0
        parts = [[image for image in images if image.held_out == held_out] for held_out in (False, True)]
        return [part[n] for part in parts for n in spread(len(part), most)]


def spread(count: int, most: int) -> list[int]:
    """Return up to `most` of the numbers from 0 to `count` - 1, spread evenly."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


class Pixels(Dataset):
    """A data set of images: each item is a number and the pixels (3, H, W), or the text of the error."""

    def __init__(self, images: Sequence[ProbeImage], settings: dict):
        self.images, self.transform = images, create_transform(**settings)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor | str]:
        try:
            return number, self.transform(open_image(self.images[number].source))
        except ImageError as error:
            return number, str(error)


def pool(tokens: torch.Tensor, encoder: TokenEncoder) -> torch.Tensor:
    """Pool tokens (B, M, D) into features (B, F): the class token, if any, and mean and maximum of the grid."""
    grid = tokens[:, encoder.num_prefix_tokens :].float()
    parts = [tokens[:, 0].float()] if encoder.has_class_token else []
    return torch.cat([*parts, grid.mean(1), grid.amax(1)], 1)


@dataclass(frozen=True)
class Features:
    """Features of the images of a probe at one grid.

    Attributes:
        shape: tokens and their width (M, D).
        pooled: the features (n, F); those of an image that could not be read are NaN.
    """

    shape: tuple[int, int]
    pooled: torch.Tensor


def encode_images(
    encoder: TokenEncoder,
    images: Sequence[ProbeImage],
    settings: dict,
    grids: Sequence[Grid | None],
    *,
    batch_size: int = 32,
    workers: int = 0,
    precision: str = "no",
) -> list[Features]:
    """Encode images at each grid, and pool their tokens.

    Args:
        encoder: the frozen encoder, on its device.
        images: the n images.
        settings: timm's data settings, which prepare an image.
        grids: the grids; `None` for the encoder's own.
        batch_size: images per forward.
        workers: image loading processes.
        precision: `no` for the encoder's own, or `bf16`.

    Raises:
        SettingError: a grid is larger than the encoder's map.
    """
    device = next(encoder.parameters()).device
    encoder = encoder.to(memory_format=torch.channels_last)  # makes convolutions several times as fast
    loader = DataLoader(
        Pixels(images, settings), batch_size, num_workers=workers, collate_fn=list, worker_init_fn=leave_signals_to_main
    )
    shapes: list[tuple[int, int]] = [(0, 0)] * len(grids)
    pooled: dict[int, torch.Tensor] = {}
    for items in progress_bar(loader, desc="encoding", unit="batch"):
        good = [(number, pixels) for number, pixels in items if not isinstance(pixels, str)]
        for _, error in items:
            if isinstance(error, str):
                logger.warning("left out: %s", error)
        if not good:
            continue
        places = [number for number, _ in good]
        pixels = torch.stack([pixels for _, pixels in good]).to(device, memory_format=torch.channels_last)
        for n, grid in enumerate(grids):
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                tokens = encoder.encode(pixels, grid)  # (B, M, D)
            found = pool(tokens, encoder).cpu()
            shapes[n] = (tokens.shape[1], tokens.shape[2])
            rows = pooled.setdefault(n, torch.full((len(images), found.shape[1]), float("nan")))
            rows[places] = found
    if not pooled:
        raise ValueError("no image can be opened")
    return [Features(shape, pooled[n]) for n, shape in enumerate(shapes)]


def read_cache(cache: TokenCache, images: Sequence[ProbeImage], grids: Sequence[str]) -> list[Features]:
    """Pool the cached tokens of images, without views, at each grid.

    Args:
        cache: the cache, opened with these grids.
        images: the n images, whose `source` is their name in it.
        grids: names of the grids.
    """
    made = {"name": cache.manifest["encoder"], "kwargs": cache.manifest["arguments"]}
    encoder = rebuild_encoder(made)  # it says which tokens stand before the grid
    rows = torch.tensor([cache.rows[image.source] for image in images])
    found = []
    for grid in grids:
        pooled = torch.cat([pool(shard[:, 0], encoder) for shard in cache.shards[grid]])  # view 0 is the image itself
        tokens, width = cache.manifest["grids"][grid]
        found.append(Features((tokens, width), pooled[rows]))
    return found


@dataclass(frozen=True)
class ProbeTargets:
    """What people said of images.

    Attributes:
        what: `labels` or `captions`, for error messages.
        names: names of the V targets: classes or words.
        places: places of the images that have targets (m,), among the images of the probe.
        targets: their targets (m, V): 1 for each class, or the share of the captions with each word.
        held_out: whether each image is measured on (m,).
    """

    what: str
    names: list[str]
    places: torch.Tensor
    targets: torch.Tensor
    held_out: torch.Tensor

    def divide(self, usable: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of the m images to fit on, and which to measure on.

        Args:
            usable: whether each image of the probe can be used (n,).

        Raises:
            SettingError: there are none to measure on, or fewer than two to fit on.
        """
        usable = usable[self.places]
        fit, held_out = (torch.where(usable & part)[0] for part in (~self.held_out, self.held_out))
        if not len(held_out):
            raise SettingError(f"no image with {self.what} is held out to measure on", "held_out")
        if len(fit) < 2:
            raise SettingError(f"fewer than two images with {self.what} are left to fit on", "held_out")
        return fit, held_out


def labelled_targets(labels: ImageLabels, images: Sequence[ProbeImage], path: Path) -> ProbeTargets:
    """Find the labels of images by the names of their files.

    Args:
        labels: the label file's content.
        images: the n images.
        path: the label file's path, for the error.

    Raises:
        ValueError: no image is labelled, or two labelled images have one name.
    """
    found = {place: image for place, image in enumerate(images) if image.name in labels.images}
    names = Counter(image.name for image in found.values())
    if not names:
        raise SettingError(f"none of the images is labelled in '{path}'", "images", "labels")
    name, count = names.most_common(1)[0]
    if count > 1:
        raise ValueError(f"two images are named '{name}', so that a label file cannot tell them apart")
    targets = torch.zeros(len(found), len(labels.classes))
    for row, image in enumerate(found.values()):
        targets[row, labels.images[image.name]] = 1
    return ProbeTargets("labels", list(labels.classes), torch.tensor(list(found)), targets, held_out(found.values()))


def captioned_targets(images: Sequence[ProbeImage], size: int) -> ProbeTargets:
    """Find the share of each image's captions with each of the most frequent words of the images to fit on.

    Args:
        images: the n images, some of them with captions.
        size: number of words.

    Raises:
        SettingError: the captions have no words.
    """
    found = {place: image for place, image in enumerate(images) if image.captions}
    words = CaptionWords([image.captions for image in found.values() if not image.held_out], size).words
    if not words:
        raise SettingError("the captions to fit on have no words of a-z", "captions")
    shares = torch.from_numpy(word_shares([image.captions for image in found.values()], words))
    return ProbeTargets("captions", words, torch.tensor(list(found)), shares, held_out(found.values()))


def held_out(images: Iterable[ProbeImage]) -> torch.Tensor:
    """Return whether each image is held out (m,)."""
    return torch.tensor([image.held_out for image in images], dtype=torch.bool)
