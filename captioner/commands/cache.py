"""Fill a token cache: every image of a caption table through the frozen encoder, once, on every process.

Letters: B images of a batch, V views of each, M image tokens, D their width.
"""

import json
import math
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from captioner.data.config import SourceConfig
from captioner.data.encoding import Job, disk_bytes, encode_shards, token_shapes
from captioner.data.readers import read_split
from captioner.data.token_cache import (
    MANIFEST,
    SOURCE,
    TokenCache,
    encoder_fingerprint,
    grid_name,
    image_names,
    image_size,
    manifest_digest,
    read_manifest,
)
from captioner.encoders import TokenEncoder, encoder_config, frozen_encoder
from captioner.grids import parse_grid
from captioner.inference import load
from captioner.processing import image_settings
from captioner.runs.files import open_whole
from captioner.runs.processes import start_processes
from captioner.training.config import EncoderConfig

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class CacheConfig:
    """Encode images once and keep their tokens on disk, for training and evaluation to read (`--data.tokens`)."""

    output: Path = Path("runs/tokens")
    """Folder of the cache; one that exists is gone on with."""
    data: SourceConfig = field(default_factory=SourceConfig)
    splits: tuple[str, ...] = ("train", "val")
    """Splits to encode; others may be added to the same folder later."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    captioner: str | None = None
    """Folder or hub id of a captioner, to take its encoder and preprocessing in place of `--model`."""
    grids: tuple[str, ...] = ()
    """Compressed grids such as `3x3 5x5`; without any, the model's own."""
    views: int = 1
    """Views of each image: itself, its mirror image, then random crops, each mirrored or not. Training draws one."""
    min_crop: float = 0.6
    """Least share of the image in a random crop."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Half precision of the tokens on disk."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the encoder's forward."""
    batch_size: int = 32
    """Images per forward and process."""
    seed: int = 0
    """Seed of the random crops, and of an encoder without trained weights (as `captioner train --seed`)."""

    def __post_init__(self):
        if self.views < 1 or self.batch_size < 1 or not self.splits:
            raise ValueError("a cache needs at least one split, one view and one image per batch")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop is a share of the image, above 0 and up to 1, not {self.min_crop}")


SHARD_IMAGES = 512
"""Most images in a shard: what a kill costs each process."""
SHARD_BYTES = 64 * 2**20
"""Size of a shard above which it holds fewer images."""


SETTINGS = CacheConfig


def run(config: CacheConfig) -> int:
    """Fill the cache, and return the exit code."""
    fill_cache(config)
    return 0


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
    mine = replace(job, shards=job.shards[accelerator.process_index :: accelerator.num_processes])
    failed = encode_shards(accelerator, encoder, mine, config.output, grids, source["image"], manifest_digest(manifest))
    failed = sum(gather_object([failed]))
    seconds = time.monotonic() - start
    if accelerator.is_main_process:
        cache = TokenCache(config.output)
        size = sum(path.stat().st_size for path in config.output.iterdir())
        print(
            f"tokens of {len(cache.rows)} images in '{config.output}', {size / 1e9:.3g} GB; {job.images} encoded "
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


def make_manifest(config: CacheConfig, source: dict, shapes: dict[str, tuple[int, int]]) -> dict:
    """Say everything that decides the content of a cache, apart from which images are in it."""
    options = {"views": config.views, "min_crop": config.min_crop, "seed": config.seed, "dtype": config.dtype}
    return source | {"grids": {name: list(shape) for name, shape in sorted(shapes.items())}} | options


def read_splits(config: CacheConfig) -> "datasets.Dataset":
    """Read all splits as one table, each image once."""
    import datasets

    table = datasets.concatenate_datasets([read_split(config.data, split) for split in config.splits])
    first: dict[str, int] = {}
    for number, name in enumerate(image_names(table)):
        if first.setdefault(name, number) != number:
            one, other = table[first[name]]["image"], table[number]["image"]
            if image_size(one) != image_size(other):
                raise ValueError(
                    f"the splits hold different images under one id and name, '{name}' ('{one['path']}' and "
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
    """List what is not in the cache yet; an image that could not be read is tried again once its size changes."""
    cache, names = TokenCache(config.output), image_names(table)
    tried = {name for name in cache.broken.keys() & set(names) if name not in cache.rows}
    sizes = {name: image_size(table[n]["image"]) for n, name in enumerate(names) if name in tried}
    done = cache.rows.keys() | {name for name, size in sizes.items() if cache.broken[name][0] == size}
    todo = [number for number, name in enumerate(names) if name not in done]
    share = math.ceil(len(todo) / processes)
    count = max(1, min(share, SHARD_IMAGES, SHARD_BYTES // disk_bytes(1, config.views, shapes)))
    return Job(
        table,
        names,
        [todo[start : start + count] for start in range(0, len(todo), count)],
        shapes,
        config.views,
        config.min_crop,
        config.seed,
        config.dtype,
        config.batch_size,
        config.data.workers,
    )


def check_room(config: CacheConfig, job: Job, images: int) -> None:
    """Print what the job will take, and refuse it when the disk has not the room.

    Raises:
        OSError: the disk has not the room.
    """
    needed, free = disk_bytes(job.images, config.views, job.shapes), shutil.disk_usage(config.output).free
    tokens = ", ".join(f"{name}: {m} tokens of width {d}" for name, (m, d) in job.shapes.items())
    print(
        f"{job.images} of {images} images to encode ({tokens}; views: {config.views}): {needed / 1e9:.3g} GB "
        f"of disk, {free / 1e9:.3g} GB are free",
        flush=True,
    )
    if needed > free:
        raise OSError(
            f"'{config.output}' lacks the room: the tokens take {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            "choose another disk with --output, or fewer --grids or --views"
        )
