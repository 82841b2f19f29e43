"""Encode images into the shards of a token cache, on all processes.

Letters: B images of a batch, V views of each, M image tokens, D their width.
"""

import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from safetensors.torch import save
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from captioner.data.token_cache import image_digest, image_places, image_size
from captioner.encoders import TokenEncoder
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.images import ImageError, open_image
from captioner.runs.digests import digest_text
from captioner.runs.files import open_whole
from captioner.runs.processes import leave_signals_to_main
from captioner.runs.progress import progress_bar

if TYPE_CHECKING:
    import datasets


@torch.inference_mode()
def token_shapes(
    encoder: TokenEncoder, input_size: Sequence[int], grids: dict[str, Grid | None]
) -> dict[str, tuple[int, int]]:
    """Find the shape (M, D) of an image's tokens at each grid, by encoding a black image.

    Args:
        input_size: channels, height and width of the images, in pixels.
        grids: the grids by name; `None` for the encoder's default.

    Raises:
        ValueError: the encoder does not take images of this size, or a grid is larger than its map.
    """
    blank = torch.zeros(1, *input_size, device=next(encoder.parameters()).device)
    shapes: dict[str, tuple[int, int]] = {}
    for name, grid in grids.items():
        _, tokens, width = encoder.encode(blank, grid).shape
        shapes[name] = (tokens, width)
    return shapes


BYTES = 2
"""Bytes of a number in half precision."""


def disk_bytes(images: int, views: int, shapes: dict[str, tuple[int, int]]) -> int:
    """Return the bytes that tokens take on disk.

    Args:
        shapes: tokens and width (M, D) at each grid.
    """
    return images * views * sum(tokens * width for tokens, width in shapes.values()) * BYTES


@dataclass(frozen=True)
class ViewSettings:
    """The views of each image, and the half precision of their tokens.

    Attributes:
        views: V, the number of views: the image, its mirror image, then random crops, each mirrored or not.
        min_crop: least share of the image in a random crop.
        seed: seed of the crops.
        dtype: `float16` or `bfloat16`.
    """

    views: int
    min_crop: float
    seed: int
    dtype: str


@dataclass(frozen=True)
class Job:
    """The images to encode.

    Attributes:
        table: the caption table.
        names: name of each image in the cache.
        shards: rows of the table whose images are encoded, by shard.
        shapes: tokens and width (M, D) of an image at each grid.
        views: views of each image.
    """

    table: "datasets.Dataset"
    names: list[str]
    shards: list[list[int]]
    shapes: dict[str, tuple[int, int]]
    views: ViewSettings

    @property
    def images(self) -> int:
        """Number of images to encode."""
        return sum(map(len, self.shards))


class ImageViews(Dataset):
    """A data set of the views of images.

    An item has the row, the size of the image in bytes, its digest, and the pixels (V, 3, H, W) or an error.
    """

    def __init__(self, job: Job, settings: dict):
        self.job, self.transform = job, create_transform(**settings)

    def __getitem__(self, row: int) -> tuple[int, int, str | None, torch.Tensor | str]:
        record = self.job.table[row]["image"]
        size, digest = image_size(record), image_digest(record)
        try:
            image = open_image(record)
        except ImageError as error:
            return row, size, digest, str(error)
        views = self.job.views
        rng = np.random.default_rng((views.seed, zlib.crc32(self.job.names[row].encode())))
        images = [make_view(image, view, views.min_crop, rng) for view in range(views.views)]
        return row, size, digest, torch.stack([self.transform(view) for view in images])


def make_view(image: Image.Image, view: int, min_crop: float, rng: np.random.Generator) -> Image.Image:
    """Return a view: 0 is the image, 1 its mirror image, and others are random crops, mirrored or not."""
    if view < 2:
        return ImageOps.mirror(image) if view else image
    side = rng.uniform(min_crop, 1) ** 0.5
    width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    crop = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def encode_shards(
    accelerator: Accelerator,
    encoder: TokenEncoder,
    job: Job,
    folder: Path,
    grids: dict[str, Grid | None],
    settings: dict,
    made_by: str,
    *,
    batch_size: int,
    workers: int,
) -> None:
    """Encode the images of this process, and write each shard when it is complete.

    An image that cannot be read is named on standard error, and in the shard with the reason.

    Args:
        accelerator: accelerator with the device and the precision of the forward.
        encoder: the frozen encoder.
        job: the images of this process.
        folder: folder of the cache.
        grids: compressed grids by name; `None` is the encoder's own.
        settings: timm's data settings, which prepare an image.
        made_by: digest of the manifest of the cache, which every shard contains.
        batch_size: images per forward.
        workers: image loading processes.

    Raises:
        ValueError: the tokens are not finite in half precision.
        OSError: the disk is full; finished shards stay.
    """
    size, dtype = batch_size, getattr(torch, job.views.dtype)
    batches = [shard[start : start + size] for shard in job.shards for start in range(0, len(shard), size)]
    dataset = ImageViews(job, settings)
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=leave_signals_to_main,
        )
    )
    places = image_places(job.table)
    bar = progress_bar(total=job.images, unit="img", desc="encoding", disable=not accelerator.is_main_process)
    for shard in job.shards:
        tokens: dict[str, list[torch.Tensor]] = {name: [] for name in grids}
        images, files, broken = [], [], []
        for batch in islice(loader, len(range(0, len(shard), size))):
            bar.update(len(batch))
            for row, count, _, content in batch:
                if isinstance(content, str):
                    broken.append([job.names[row], count, content])
                    tqdm.write(f"captioner cache: skipped {content}", file=sys.stderr)
            good = [encoded for encoded in batch if not isinstance(encoded[-1], str)]
            images += [[job.names[row], count] for row, count, *_ in good]
            files += [[places[row], digest] for row, _, digest, _ in good]
            if good:
                pixels = torch.stack([pixels for *_, pixels in good]).to(accelerator.device)  # (B, V, 3, H, W)
                for name, grid in grids.items():
                    with accelerator.autocast(), torch.inference_mode():
                        encoded = encoder.encode(pixels.flatten(0, 1), grid)  # (B*V, M, D)
                    tokens[name].append(encoded.to("cpu", dtype).unflatten(0, pixels.shape[:2]))
        whole = {name: torch.cat(parts) for name, parts in tokens.items() if parts}  # (n, V, M, D)
        if not all(part.isfinite().all() for part in whole.values()):
            raise SettingError(f"the encoder's tokens are not finite as {job.views.dtype}", "dtype")
        lists = {"images": images, "files": files, "broken": broken}
        header = {"made_by": made_by, **{name: json.dumps(content) for name, content in lists.items()}}
        digest = digest_text("\n".join(job.names[row] for row in shard))
        write_shard(folder / f"tokens-{digest}.safetensors", save(whole, header))
    bar.close()


def write_shard(path: Path, data: bytes) -> None:
    """Write a shard, completely or not at all.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        with open_whole(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise OSError(
            f"cannot write '{path}': {error.strerror or error}; the finished shards stay: make room and run the same "
            "command again"
        ) from None
