"""Captioning files and folders: find the images, caption them, write each result as soon as it is there."""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from captioner.grids import parse_grid
from captioner.images import SUFFIXES
from captioner.runs.progress import progress_bar

CSV_COLUMNS = ["path", "caption", "logprob", "error"]


@dataclass(frozen=True)
class CaptionConfig:
    """Caption images."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = ()
    """Images, folders (searched through), glob patterns; `-` reads an image or paths from standard input."""
    output: Path | None = None
    """File to write, format by ending: .jsonl, .csv or .txt; without it, `path<TAB>caption` lines are printed."""
    resume: bool = False
    """Go on with an output file that exists: images captioned in it are left out, those that failed are tried again.
    Give the model, grid and beams it was begun with: the file does not say."""
    overwrite: bool = False
    """Replace an output file that exists."""
    model: str | None = None
    """Folder or hub id of the captioner; `None` for the shipped one."""
    device: str | None = None
    """Where to run, such as cuda, cuda:1, mps or cpu; `None` picks the best there is."""
    grid: str | None = None
    """Compressed grid such as 3x3 or 10x10: fewer tokens are cheaper; `None` for the model's own."""
    batch_size: int = 16
    """Images per batch."""
    num_beams: int | None = None
    """Beams of the search; `None` for the model's own."""
    max_new_tokens: int | None = None
    """Longest caption in tokens; `None` for the model's own."""

    def __post_init__(self):
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with the output, --overwrite replaces it: choose one")
        if (self.resume or self.overwrite) and self.output is None:
            raise ValueError("--resume and --overwrite are about the file that --output names: name it")
        for name in ("batch_size", "num_beams", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")


SETTINGS = CaptionConfig


def run(config: CaptionConfig) -> int:
    """Caption, and return the exit code: 1 where images are left out."""
    return 1 if caption_files(config) else 0


def caption_files(config: CaptionConfig) -> int:
    """Run the captioning job; returns how many images could not be captioned.

    Raises:
        ValueError: no input, an unknown output format, an output that exists, a model or device that cannot be had.
        FileNotFoundError: no input holds an image.
        OSError: the output cannot be written; what is in it stays.
    """
    done, failed_before = read_done(config)
    check_writable(config.output)
    found, empty = find_images(config.inputs)
    images = [(name, source) for name, source in found if not {name, escape(name)} & done]
    for reason in empty:
        print(f"captioner caption: skipped: {reason}", file=sys.stderr)
    if not images:
        print(f"captioner caption: all {len(found)} images are captioned in '{config.output}'", file=sys.stderr)
        return len(empty)
    grid = parse_grid(config.grid)
    from captioner.inference import load

    captioner = load(config.model, config.device)
    options = {"num_beams": config.num_beams, "max_new_tokens": config.max_new_tokens}
    results = captioner.stream(
        (source for _, source in images),
        batch_size=config.batch_size,
        grid=grid,
        **{name: value for name, value in options.items() if value is not None},
    )
    failed = 0
    with open_writer(config.output, bool(done | failed_before)) as write:
        for (name, _), result in zip(images, progress_bar(results, total=len(images), unit="img"), strict=True):
            result.path = name
            if result.error is None or name not in failed_before:
                write(result.as_dict())
            if result.error is not None:
                failed += 1
                tqdm.write(f"captioner caption: skipped: {result.error}", file=sys.stderr)
    if failed:
        print(f"captioner caption: {failed} of {len(images)} images could not be captioned", file=sys.stderr)
    if config.output is not None:
        before = f", beside {len(done)} from before" * bool(done)
        print(f"captioner caption: {len(images) - failed} captions in '{config.output}'{before}", file=sys.stderr)
    return failed + len(empty)


def find_images(inputs: Sequence[str]) -> tuple[list[tuple[str, str | bytes]], list[str]]:
    """Resolve inputs to images as (name, path or bytes), in the order given, folders sorted.

    Returns:
        The images, and what is to be said of folders and patterns that hold none.

    Raises:
        ValueError: there are no inputs.
        FileNotFoundError: no input holds an image.
    """
    if not inputs and sys.stdin is not None and not sys.stdin.isatty():
        inputs = ("-",)
    if not inputs:
        raise ValueError("no images: name files, folders or patterns, or - for standard input")
    images: list[tuple[str, str | bytes]] = []
    empty: list[str] = []
    for item in inputs:
        if item == "-":
            if not (found := read_standard_input()):
                empty.append("standard input is empty; name files, folders or patterns")
            images += found
        elif Path(item).is_dir():
            found = sorted(str(p) for p in Path(item).rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
            if not found:
                empty.append(f"no images in the folder '{item}'")
            images += [(path, path) for path in found]
        elif glob.has_magic(item) and not Path(item).exists():
            found = sorted(path for path in glob.glob(item, recursive=True) if Path(path).is_file())
            if not found:
                empty.append(f"no file matches '{item}'")
            images += [(path, path) for path in found]
        else:
            images.append((item, item))
    if not images:
        raise FileNotFoundError("; ".join(empty))
    return images, empty


def read_standard_input() -> list[tuple[str, str | bytes]]:
    """Read one image, or a list of paths one a line, from standard input."""
    data = sys.stdin.buffer.read()
    if b"\0" in data[:4096]:  # no path holds a zero byte, every image does
        return [("-", data)]
    return [(line, line) for line in data.decode(errors="surrogateescape").splitlines() if line.strip()]


def read_done(config: CaptionConfig) -> tuple[set[str], set[str]]:
    """Check the output file and return the images it has captions for, and errors, when the job goes on with it.

    Raises:
        ValueError: the ending is unknown, or the file exists and neither `resume` nor `overwrite` is set, or something
            else is in it.
    """
    path = config.output
    if path is None:
        return set(), set()
    if path.suffix not in WRITERS:
        raise ValueError(f"--output '{path}' must end in {', '.join(WRITERS)}")
    if not path.exists() or config.overwrite:
        return set(), set()
    if not config.resume:
        raise ValueError(f"'{path}' exists; pass --resume to go on with it or --overwrite to replace it")
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    text = content[:whole].decode(errors="surrogateescape")
    try:
        if content and not whole and not content.startswith(b'{"path": '):
            raise ValueError
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
            done = {row["path"] for row in rows if row["error"] is None}
        elif path.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""))
            rows = list(reader)
            if reader.fieldnames not in (None, CSV_COLUMNS):
                raise ValueError
            done = {row["path"] for row in rows if row["caption"]}
        else:
            rows = [{"path": line.split("\t")[-2]} for line in text.split("\n")[:-1]]
            done = {row["path"] for row in rows}
        failed = {row["path"] for row in rows} - done
    except (ValueError, KeyError, TypeError, IndexError, csv.Error):
        raise ValueError(f"'{path}' is not what captioner caption writes; name another file with --output") from None
    os.truncate(path, whole)  # a killed run may have left half a line, to which the next would be joined
    return done, failed


def check_writable(path: Path | None) -> None:
    """Find out before any work whether the output can be written.

    Raises:
        ValueError: it cannot.
    """
    if path is None:
        return
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"cannot write '{path}': {error.strerror}; name another file with --output") from None
    if not existed:
        path.unlink()


def escape(path: str) -> str:
    """Write the tabs and line breaks of a path so that a line stays a line."""
    return path.replace("\t", "\\t").replace("\n", "\\n")


def line_writer(file) -> Callable[[dict], None]:
    """Write `path<TAB>caption` lines; images without a caption are left out."""

    def write(row: dict) -> None:
        if row["error"] is None:
            file.write(f"{escape(row['path'])}\t{row['caption']}\n")

    return write


def json_writer(file) -> Callable[[dict], None]:
    """Write one JSON object a line."""
    return lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")


def csv_writer(file) -> Callable[[dict], None]:
    """Write comma-separated rows under a header."""
    writer = csv.DictWriter(file, CSV_COLUMNS)
    if file.tell() == 0:
        writer.writeheader()
    return writer.writerow


WRITERS = {".jsonl": json_writer, ".csv": csv_writer, ".txt": line_writer}


@contextmanager
def open_writer(path: Path | None, go_on: bool) -> Iterator[Callable[[dict], None]]:
    """Open the output, to its end when the job goes on, and flush it with every row; standard output without a path."""
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
        yield line_writer(sys.stdout)
        return
    options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "", "buffering": 1}
    try:
        with path.open("a" if go_on else "w", **options) as file:
            yield WRITERS[path.suffix](file)
    except OSError as error:
        raise OSError(f"cannot write '{path}': {error.strerror}; what is there is kept, --resume goes on") from None
