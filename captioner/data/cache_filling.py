"""Filling a token cache: what is missing in it, whether that fits on the disk, and encoding it on every process.

Letters: V views of an image, M image tokens, D their width.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import datasets
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from captioner.data.encoding import Job, ViewSettings, disk_bytes, encode_shards, token_shapes
from captioner.data.token_cache import (
    MANIFEST,
    SOURCE,
    TokenCache,
    grid_name,
    image_names,
    image_size,
    manifest_digest,
    read_manifest,
)
from captioner.encoders import TokenEncoder
from captioner.errors import SettingError
from captioner.grids import Grid
from captioner.runs.files import open_whole

SHARD_IMAGES = 512
"""Most images in a shard: what a kill costs each process."""
SHARD_BYTES = 64 * 2**20
"""Size of a shard above which it holds fewer images."""


def fill(
    accelerator: Accelerator,
    folder: Path,
    table: datasets.Dataset,
    encoder: TokenEncoder,
    source: dict,
    grids: Sequence[Grid | None],
    views: ViewSettings,
    *,
    batch_size: int,
    workers: int,
) -> int:
    """Encode the images of a table that a cache lacks; every process calls this.

    Args:
        accelerator: shares out the shards.
        folder: folder of the cache; it is made where it does not exist.
        table: the images.
        encoder: the frozen encoder, on the device.
        source: what decides its tokens, as `encoder_fingerprint` returns it.
        grids: compressed grids; `None` is the encoder's own.
        views: views of each image, and the number format of their tokens.
        batch_size: images per forward and process.
        workers: image loading processes per process.

    Returns:
        The number of images of the table that could not be read and are left out.

    Raises:
        ValueError: a grid that the encoder does not have, or a folder that holds something else.
        OSError: the disk has not the room, or is full midway; finished shards stay.
    """
    named = {grid_name(encoder, grid): grid for grid in grids}
    shapes = token_shapes(encoder, source["image"]["input_size"], named)
    manifest = source | {"grids": {name: list(shape) for name, shape in sorted(shapes.items())}} | asdict(views)
    if accelerator.is_main_process:
        prepare_folder(folder, manifest)
    accelerator.wait_for_everyone()
    job = plan(folder, table, shapes, views, accelerator.num_processes)
    accelerator.wait_for_everyone()  # every process plans on the same shards, before any of them writes one
    if accelerator.is_main_process:
        check_room(folder, job, len(table))
    accelerator.wait_for_everyone()

    start = time.monotonic()
    mine = replace(job, shards=job.shards[accelerator.process_index :: accelerator.num_processes])
    digest = manifest_digest(manifest)
    options = {"batch_size": batch_size, "workers": workers}
    encode_shards(accelerator, encoder, mine, folder, named, source["image"], digest, **options)
    accelerator.wait_for_everyone()
    left_out = 0
    if accelerator.is_main_process:
        cache = TokenCache(folder)
        left_out = sum(name not in cache.rows for name in job.names)
        size = sum(path.stat().st_size for path in folder.iterdir())
        seconds = time.monotonic() - start
        print(f"tokens of {len(cache.rows)} images in '{folder}', {write_size(size)}; this run took {seconds:.0f} s")
        if left_out:
            print(
                f"captioner cache: {left_out} of {len(table)} images could not be read and are left out",
                file=sys.stderr,
            )
    return broadcast_object_list([left_out])[0]


def join_tables(tables: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """Join the tables of several splits into one, each image once.

    Raises:
        ValueError: different images have one id and name.
    """
    table = datasets.concatenate_datasets(list(tables))
    first: dict[str, int] = {}
    for number, name in enumerate(image_names(table)):
        if first.setdefault(name, number) != number:
            one, other = table[first[name]]["image"], table[number]["image"]
            if image_size(one) != image_size(other):
                raise SettingError(
                    f"the splits hold different images under one id and name, '{name}' ('{one['path']}' and "
                    f"'{other['path']}'); a cache of each split in a folder of its own can hold them",
                    "splits",
                    "output",
                )
    return table.select(sorted(first.values())) if len(first) < len(table) else table


def prepare_folder(folder: Path, manifest: dict) -> None:
    """Start a cache, or check that the one in the folder can be filled further.

    Raises:
        ValueError: the folder holds another cache, or something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):  # of a run that was killed
        left.unlink()
    if not (folder / MANIFEST).exists():
        if any(folder.iterdir()):
            raise SettingError(f"'{folder}' is neither empty nor a token cache", "output")
        with open_whole(folder / MANIFEST) as file:
            json.dump(manifest, file, indent=1)
    elif (found := read_manifest(folder)) != manifest:
        if difference := TokenCache(folder).difference({key: manifest[key] for key in SOURCE}):
            raise SettingError(difference, "output")
        keys = [key for key in manifest if manifest[key] != found.get(key)]
        one, other = ({**made, "grids": " and ".join(made.get("grids", ()))} for made in (found, manifest))
        what = ", ".join(f"{key} {one.get(key)}, not {other[key]}" for key in keys)
        raise SettingError(f"the token cache '{folder}' was made with {what}", "output")


def plan(
    folder: Path, table: datasets.Dataset, shapes: dict[str, tuple[int, int]], views: ViewSettings, processes: int
) -> Job:
    """List the images that the cache lacks; one that could not be read is tried again once its size changes."""
    cache, names = TokenCache(folder), image_names(table)
    tried = {name for name in cache.broken.keys() & set(names) if name not in cache.rows}
    sizes = {name: image_size(table[n]["image"]) for n, name in enumerate(names) if name in tried}
    done = cache.rows.keys() | {name for name, size in sizes.items() if cache.broken[name][0] == size}
    todo = [number for number, name in enumerate(names) if name not in done]
    share = math.ceil(len(todo) / processes)
    count = max(1, min(share, SHARD_IMAGES, SHARD_BYTES // disk_bytes(1, views.views, shapes)))
    return Job(table, names, [todo[start : start + count] for start in range(0, len(todo), count)], shapes, views)


def check_room(folder: Path, job: Job, images: int) -> None:
    """Print the disk that the job will take, and refuse it where the disk has not so much left.

    Raises:
        OSError: the disk has not the room.
    """
    needed, free = disk_bytes(job.images, job.views.views, job.shapes), shutil.disk_usage(folder).free
    tokens = ", ".join(f"{name}: {m} tokens of width {d}" for name, (m, d) in job.shapes.items())
    print(
        f"{job.images} of {images} images to encode ({tokens}; views: {job.views.views}): {write_size(needed)} "
        f"of disk, {write_size(free)} are free",
        flush=True,
    )
    if needed > free:
        raise OSError(
            f"the disk of '{folder}' has not the room: the tokens take {write_size(needed)}, {write_size(free)} are "
            "free; another disk, fewer grids or fewer views would do"
        )


def write_size(count: float) -> str:
    """Write a number of bytes with three digits: `27.6 kB`, `2.5 GB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
