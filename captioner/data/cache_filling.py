"""Fill a token cache: list the missing images, check the disk space, and encode the images on all processes.

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
from captioner.data.sets import distinct_rows, join_sets
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
"""Most images in a shard; if a process is killed, it loses the images of one shard."""
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
        accelerator: accelerator of the processes, which share the shards.
        folder: folder of the cache; it is created if it does not exist.
        table: the images.
        encoder: the frozen encoder, on the device.
        source: fingerprint of the encoder, as `encoder_fingerprint` returns it.
        grids: compressed grids; `None` is the encoder's own.
        views: views of each image, and the number format of their tokens.
        batch_size: images per forward and process.
        workers: image loading processes per process.

    Returns:
        The number of images of the table that could not be read and are left out.

    Raises:
        ValueError: the encoder does not have a grid, or the folder holds something else.
        OSError: the disk has not enough space, or becomes full; finished shards stay.
    """
    named = {grid_name(encoder, grid): grid for grid in grids}
    shapes = token_shapes(encoder, source["image"]["input_size"], named)
    manifest = source | {"grids": {name: list(shape) for name, shape in sorted(shapes.items())}} | asdict(views)
    if accelerator.is_main_process:
        prepare_folder(folder, manifest)
        check_encoded(folder, table)
    accelerator.wait_for_everyone()
    job = plan(folder, table, shapes, views, accelerator.num_processes)
    accelerator.wait_for_everyone()  # each process makes its plan before any of them writes a shard
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
    """Join the tables of several splits and data sets into one table, with each image once.

    Raises:
        SettingError: different images have the same id and name.
    """
    table = join_sets(tables)
    rows = distinct_rows(table)
    return table.select(rows) if len(rows) < len(table) else table


def prepare_folder(folder: Path, manifest: dict) -> None:
    """Create a cache, or check that the cache in the folder is the same one.

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


def check_encoded(folder: Path, table: datasets.Dataset) -> None:
    """Refuse a table if the cache holds another image under the id and name of one of its images.

    Raises:
        SettingError: it does, or the image has changed.
    """
    if change := TokenCache(folder).find_change(table, image_names(table)):
        raise SettingError(f"{change}; a cache in a folder of its own can hold it", "output")


def plan(
    folder: Path, table: datasets.Dataset, shapes: dict[str, tuple[int, int]], views: ViewSettings, processes: int
) -> Job:
    """List the images that the cache lacks; an unreadable image is tried again if its size has changed."""
    cache, names = TokenCache(folder), image_names(table)
    tried = {name for name in cache.broken.keys() & set(names) if name not in cache.rows}
    sizes = {name: image_size(table[n]["image"]) for n, name in enumerate(names) if name in tried}
    done = cache.rows.keys() | {name for name, size in sizes.items() if cache.broken[name][0] == size}
    todo = [number for number, name in enumerate(names) if name not in done]
    share = math.ceil(len(todo) / processes)
    count = max(1, min(share, SHARD_IMAGES, SHARD_BYTES // disk_bytes(1, views.views, shapes)))
    return Job(table, names, [todo[start : start + count] for start in range(0, len(todo), count)], shapes, views)


def check_room(folder: Path, job: Job, images: int) -> None:
    """Print the disk space that the job needs, and refuse the job if the disk has less.

    Raises:
        OSError: the disk has not enough space.
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
            f"the disk of '{folder}' is too small: the tokens need {write_size(needed)}, and {write_size(free)} are "
            "free; use another disk, fewer grids or fewer views"
        )


def write_size(count: float) -> str:
    """Return a number of bytes as text with three digits: `27.6 kB`, `2.5 GB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
