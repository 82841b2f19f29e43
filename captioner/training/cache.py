"""Fill a token cache: every picture of a caption table through the frozen encoder, once, on every process.

Letters: B pictures of a batch, V views of each, M image tokens, D their width.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from PIL import Image, ImageOps
from safetensors.torch import save
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from captioner.data.token_cache import (
    MANIFEST,
    SOURCE,
    TokenCache,
    encoder_fingerprint,
    grid_name,
    manifest_digest,
    picture_names,
    picture_size,
    read_manifest,
)
from captioner.encoders import TokenEncoder, encoder_config, frozen_encoder
from captioner.evaluation import read_split
from captioner.grids import Grid, parse_grid
from captioner.images import ImageError, open_image
from captioner.pipeline import load
from captioner.processes import leave_signals_to_main, start_processes
from captioner.processing import image_settings
from captioner.progress import progress_bar
from captioner.training.config import CacheConfig
from captioner.whole_files import open_whole

if TYPE_CHECKING:
    import datasets

SHARD_PICTURES = 512
"""Most pictures in a shard: what a kill costs each process."""
SHARD_BYTES = 64 * 2**20
"""Size of a shard above which it holds fewer pictures."""
BYTES = 2
"""Bytes of a number in half precision."""


@dataclass
class Job:
    """What a run has to do: pictures by row of the table, in shards, and what their tokens look like."""

    table: "datasets.Dataset"
    names: list[str]
    shards: list[list[int]]
    shapes: dict[str, tuple[int, int]]

    @property
    def pictures(self) -> int:
        """Pictures still to encode."""
        return sum(map(len, self.shards))


def fill_cache(config: CacheConfig) -> Path:
    """Run the caching job and return the cache's folder.

    Raises:
        ValueError: no data, no such encoder or grid, or the folder holds the tokens of another one.
        OSError: the disk has not the room, or was filled midway; finished shards are kept.
    """
    accelerator = start_processes(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    encoder, source = open_encoder(config, accelerator)
    grids = {grid_name(encoder, grid): grid for grid in map(parse_grid, config.grids or (None,))}
    shapes = token_shapes(encoder, source["image"]["input_size"], grids)
    manifest = make_manifest(config, source, shapes)
    with accelerator.main_process_first():  # the others find the table cached
        table = read_splits(config)
    if accelerator.is_main_process:
        prepare_folder(config.output, manifest)
    accelerator.wait_for_everyone()
    job = plan(config, table, shapes, accelerator.num_processes)
    accelerator.wait_for_everyone()  # every process plans on the same shards, before any writes one
    if accelerator.is_main_process:
        check_room(config, job, len(table))
    accelerator.wait_for_everyone()

    start = time.monotonic()
    mine = Job(table, job.names, job.shards[accelerator.process_index :: accelerator.num_processes], shapes)
    failed = encode_shards(accelerator, encoder, config, mine, grids, source["image"], manifest_digest(manifest))
    failed = sum(gather_object([failed]))
    seconds = time.monotonic() - start
    if accelerator.is_main_process:
        cache = TokenCache(config.output)
        size = sum(path.stat().st_size for path in config.output.iterdir())
        print(
            f"tokens of {len(cache.rows)} pictures in '{config.output}', {size / 1e9:.3g} GB; {job.pictures} encoded "
            f"in {seconds:.0f} s" + (f", {failed} of them could not be read and are left out" if failed else "")
        )
    accelerator.end_training()
    return config.output


def open_encoder(config: CacheConfig, accelerator: Accelerator) -> tuple[TokenEncoder, dict]:
    """Build the frozen encoder and say what decides its tokens, as `encoder_fingerprint` does."""
    if config.captioner is not None:
        captioner = load(config.captioner, str(accelerator.device))
        encoder, settings = captioner.model.encoder, captioner.processor.image
        description = captioner.model.config.encoder_config
    else:
        encoder = frozen_encoder(config.model.encoder).to(accelerator.device)
        settings = image_settings(encoder.default_cfg, config.model.image_size, config.model.crop_mode)
        description = encoder_config(config.model.encoder, encoder)
    return encoder, encoder_fingerprint(encoder, description, settings)


@torch.inference_mode()
def token_shapes(
    encoder: TokenEncoder, input_size: Sequence[int], grids: dict[str, Grid | None]
) -> dict[str, tuple[int, int]]:
    """Find the shape (M, D) of a picture's tokens at each grid, by encoding a blank one.

    Raises:
        ValueError: the encoder has not such a grid.
    """
    blank = torch.zeros(1, *input_size, device=next(encoder.parameters()).device)
    return {name: tuple(encoder.encode(blank, grid).shape[1:]) for name, grid in grids.items()}


def make_manifest(config: CacheConfig, source: dict, shapes: dict[str, tuple[int, int]]) -> dict:
    """Say everything that decides the content of a cache, apart from which pictures are in it."""
    options = {"views": config.views, "min_crop": config.min_crop, "seed": config.seed, "dtype": config.dtype}
    return source | {"grids": {name: list(shape) for name, shape in sorted(shapes.items())}} | options


def read_splits(config: CacheConfig) -> "datasets.Dataset":
    """Read all splits as one table, each picture once."""
    import datasets

    table = datasets.concatenate_datasets([read_split(config.data, split) for split in config.splits])
    first: dict[str, int] = {}
    for number, name in enumerate(picture_names(table)):
        if first.setdefault(name, number) != number:
            one, other = table[first[name]]["image"], table[number]["image"]
            if picture_size(one) != picture_size(other):
                raise ValueError(
                    f"the splits hold different pictures under one id and name, '{name}' ('{one['path']}' and "
                    f"'{other['path']}'); cache each split in a folder of its own"
                )
    return table.select(sorted(first.values())) if len(first) < len(table) else table


def prepare_folder(folder: Path, manifest: dict) -> None:
    """Start a cache, or check that the one that is there can be gone on with.

    Raises:
        ValueError: the folder holds another cache, or something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):  # of a run that was killed
        left.unlink()
    if not (folder / MANIFEST).exists():
        if any(folder.iterdir()):
            raise ValueError(f"'{folder}' is neither empty nor a token cache; choose another folder with --output")
        with open_whole(folder / MANIFEST) as file:
            json.dump(manifest, file, indent=1)
    elif (found := read_manifest(folder)) != manifest:
        TokenCache(folder).check({key: manifest[key] for key in SOURCE})
        keys = [key for key in manifest if manifest[key] != found.get(key)]
        one, other = ({**made, "grids": " and ".join(made.get("grids", ()))} for made in (found, manifest))
        what = ", ".join(f"{key.replace('_', '-')} {one.get(key)}, not {other[key]}" for key in keys)
        raise ValueError(f"the token cache '{folder}' was made with {what}; choose another folder with --output")


def plan(config: CacheConfig, table: "datasets.Dataset", shapes: dict[str, tuple[int, int]], processes: int) -> Job:
    """List what is not in the cache yet; a picture that could not be read is tried again once its size changes."""
    cache, names = TokenCache(config.output), picture_names(table)
    tried = {name for name in cache.broken.keys() & set(names) if name not in cache.rows}
    sizes = {name: picture_size(table[n]["image"]) for n, name in enumerate(names) if name in tried}
    done = cache.rows.keys() | {name for name, size in sizes.items() if cache.broken[name][0] == size}
    todo = [number for number, name in enumerate(names) if name not in done]
    share = math.ceil(len(todo) / processes)
    count = max(1, min(share, SHARD_PICTURES, SHARD_BYTES // disk_bytes(1, config.views, shapes)))
    return Job(table, names, [todo[start : start + count] for start in range(0, len(todo), count)], shapes)


def disk_bytes(pictures: int, views: int, shapes: dict[str, tuple[int, int]]) -> int:
    """Return the bytes that tokens take on disk.

    Args:
        shapes: tokens and width (M, D) at each grid.
    """
    return pictures * views * sum(tokens * width for tokens, width in shapes.values()) * BYTES


def check_room(config: CacheConfig, job: Job, pictures: int) -> None:
    """Print what the job will take, and refuse it when the disk has not the room.

    Raises:
        OSError: the disk has not the room.
    """
    needed, free = disk_bytes(job.pictures, config.views, job.shapes), shutil.disk_usage(config.output).free
    tokens = ", ".join(f"{name}: {m} tokens of width {d}" for name, (m, d) in job.shapes.items())
    print(
        f"{job.pictures} of {pictures} pictures to encode ({tokens}; views: {config.views}): {needed / 1e9:.3g} GB "
        f"of disk, {free / 1e9:.3g} GB are free",
        flush=True,
    )
    if needed > free:
        raise OSError(
            f"'{config.output}' lacks the room: the tokens take {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            "choose another disk with --output, or fewer --grids or --views"
        )


class PictureViews(Dataset):
    """The views of each picture as pixels (V, 3, H, W) with the picture's size in bytes, or its error."""

    def __init__(self, config: CacheConfig, job: Job, settings: dict):
        self.config, self.job, self.transform = config, job, create_transform(**settings)

    def __getitem__(self, row: int) -> tuple[int, int, torch.Tensor | str]:
        record = self.job.table[row]["image"]
        size = picture_size(record)
        try:
            picture = open_image(record)
        except ImageError as error:
            return row, size, str(error)
        rng = np.random.default_rng((self.config.seed, zlib.crc32(self.job.names[row].encode())))
        views = [make_view(picture, view, self.config.min_crop, rng) for view in range(self.config.views)]
        return row, size, torch.stack([self.transform(view) for view in views])


def make_view(picture: Image.Image, view: int, min_crop: float, rng: np.random.Generator) -> Image.Image:
    """Return view 0, the picture; 1, its mirror image; or a further one, a random crop, mirrored or not."""
    if view < 2:
        return ImageOps.mirror(picture) if view else picture
    side = rng.uniform(min_crop, 1) ** 0.5
    width, height = max(1, round(picture.width * side)), max(1, round(picture.height * side))
    left, top = rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)
    crop = picture.crop((left, top, left + width, top + height))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def encode_shards(
    accelerator: Accelerator,
    encoder: TokenEncoder,
    config: CacheConfig,
    job: Job,
    grids: dict[str, Grid | None],
    settings: dict,
    made_by: str,
) -> int:
    """Encode the pictures of this process and write each shard when it is whole; returns how many were unreadable.

    Raises:
        ValueError: the tokens are not finite in half precision.
        OSError: the disk is full; finished shards are kept.
    """
    size, dtype = config.batch_size, getattr(torch, config.dtype)
    batches = [shard[start : start + size] for shard in job.shards for start in range(0, len(shard), size)]
    dataset = PictureViews(config, job, settings)
    options = {"num_workers": config.data.workers, "collate_fn": list, "worker_init_fn": leave_signals_to_main}
    loader = iter(DataLoader(dataset, batch_sampler=batches, **options))
    bar = progress_bar(total=job.pictures, unit="img", desc="encoding", disable=not accelerator.is_main_process)
    failed = 0
    for shard in job.shards:
        tokens: dict[str, list[torch.Tensor]] = {name: [] for name in grids}
        images, broken = [], []
        for batch in islice(loader, len(range(0, len(shard), size))):
            bar.update(len(batch))
            for row, count, content in batch:
                if isinstance(content, str):
                    broken.append([job.names[row], count, content])
                    tqdm.write(f"captioner cache: skipped {content}", file=sys.stderr)
            good = [(row, count, pixels) for row, count, pixels in batch if not isinstance(pixels, str)]
            images += [[job.names[row], count] for row, count, _ in good]
            if good:
                pixels = torch.stack([pixels for *_, pixels in good]).to(accelerator.device)  # (B, V, 3, H, W)
                for name, grid in grids.items():
                    with accelerator.autocast(), torch.inference_mode():
                        encoded = encoder.encode(pixels.flatten(0, 1), grid)  # (B*V, M, D)
                    tokens[name].append(encoded.to("cpu", dtype).unflatten(0, pixels.shape[:2]))
        failed += len(broken)
        whole = {name: torch.cat(parts) for name, parts in tokens.items() if parts}  # (n, V, M, D)
        if not all(part.isfinite().all() for part in whole.values()):
            raise ValueError(f"the encoder's tokens are not finite as {config.dtype}; use --dtype bfloat16")
        header = {"made_by": made_by, "images": json.dumps(images), "broken": json.dumps(broken)}
        digest = hashlib.blake2b("\n".join(job.names[row] for row in shard).encode(), digest_size=8).hexdigest()
        write_shard(config.output / f"tokens-{digest}.safetensors", save(whole, header))
    bar.close()
    return failed


def write_shard(path: Path, data: bytes) -> None:
    """Write a shard, whole or not at all.

    Raises:
        OSError: the disk is full or not writable, with what to do.
    """
    try:
        with open_whole(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise OSError(
            f"cannot write '{path}': {os.strerror(error.errno)}; the finished shards are kept: make room and run the "
            "same command again"
        ) from None
