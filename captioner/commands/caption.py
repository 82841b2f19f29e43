"""Captioning files and folders: find the images, caption them, write each result as soon as it is there."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from captioner.data.caption_output import check_output, find_format, open_output, read_output
from captioner.data.image_inputs import STANDARD_INPUT, FoundImages, find_images
from captioner.errors import SettingError, check_positive
from captioner.grids import parse_grid
from captioner.images.names import escape_name
from captioner.runs.progress import progress_bar


@dataclass(frozen=True)
class CaptionConfig:
    """Caption images: files, folders, patterns, or what standard input holds."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = ()
    """Images, folders (searched with their subfolders; hidden ones are left out) and glob patterns. `-` stands for
    standard input: one image, or a list of paths, each ended by a newline, or by a zero byte as `find -print0` writes
    them."""
    output: Path | None = None
    """File to write; its ending gives the format: .jsonl, .csv or .txt. Without it, lines of `path<TAB>caption` are
    printed."""
    resume: bool = False
    """Continue an output file that exists: images with a caption in it are left out, and images that failed are tried
    again. Give the same model, grid and beams as before; the file does not record them."""
    overwrite: bool = False
    """Replace an output file that exists."""
    model: str | None = None
    """Folder or hub id of the captioner; `None` or `shipped` for the one that comes with this package."""
    device: str | None = None
    """Device to run on, such as cuda, cuda:1, mps or cpu; `None` for the best one here."""
    grid: str | None = None
    """Compressed grid such as 3x3 or 10x10. A smaller grid has fewer tokens and is cheaper. `None` for the model's
    own."""
    batch_size: int = 16
    """Images per batch."""
    num_beams: int | None = None
    """Beams of the search, of which 1 is greedy and cheapest; `None` for the model's own."""
    max_new_tokens: int | None = None
    """Longest caption in tokens; `None` for the model's own."""

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise SettingError("resume goes on with the output, overwrite replaces it: choose one")
        if (self.resume or self.overwrite) and self.output is None:
            raise SettingError("resume and overwrite are about the file that output names: name it")
        check_positive(self, "batch_size", "num_beams", "max_new_tokens")


SETTINGS = CaptionConfig


def run(config: CaptionConfig) -> int:
    """Caption, and return the exit code: 1 where an image has no caption or an input could not be read."""
    return 1 if caption_files(config) else 0


def caption_files(config: CaptionConfig) -> int:
    """Run the captioning job; returns how many images could not be captioned and inputs not be read.

    Raises:
        ValueError: no input, an unknown output format, an output that exists, a model or device that cannot be had.
        FileNotFoundError: no input holds an image.
        SettingError: the output cannot be written; what is in it stays.
    """
    check_output(config.output, config.resume, config.overwrite)
    done, failed_before = set[str](), set[str]()
    if config.resume and config.output is not None and config.output.exists():
        done, failed_before = read_output(config.output)
    found = find_inputs(config)
    for line in found.problems + found.notes:
        tell(line)
    images = [(name, source) for name, source in found.images if name not in done]
    if not images:
        tell(f"all {len(found.images)} images are captioned in '{escape_name(str(config.output))}'")
        return len(found.problems)
    grid = parse_grid(config.grid)
    from captioner.inference import load  # takes seconds, so errors in the inputs come first

    captioner = load(config.model, config.device)
    options = {"num_beams": config.num_beams, "max_new_tokens": config.max_new_tokens}
    results = captioner.stream(
        (source for _, source in images),
        batch_size=config.batch_size,
        grid=grid,
        logprob=find_format(config.output).has_logprob,
        **{name: value for name, value in options.items() if value is not None},
    )
    reasons: Counter[str] = Counter()
    with open_output(config.output, append=bool(done | failed_before)) as output:
        for (name, _), result in zip(images, progress_bar(results, total=len(images), unit="img"), strict=True):
            result.path = name
            if result.error is None or name not in failed_before:
                output.write(result.as_dict())
            if result.error is not None:
                reasons[result.reason or "unusable"] += 1
                tell(f"skipped: {result.error}")
    tell(summarize(len(images) - reasons.total(), reasons, config.output, len(done)))
    return reasons.total() + len(found.problems)


def find_inputs(config: CaptionConfig) -> FoundImages:
    """Find the images to caption; without inputs, they are read from standard input if that is no terminal.

    Raises:
        ValueError: there are no inputs.
        FileNotFoundError: no input holds an image.
    """
    inputs, stdin = config.inputs, None if sys.stdin is None else sys.stdin
    if not inputs and stdin is not None and not stdin.isatty():
        inputs = (STANDARD_INPUT,)
    if not inputs:
        raise ValueError("no images: name files, folders or patterns, or - for standard input")
    found = find_images(inputs, None if stdin is None else stdin.buffer)
    if not found.images:
        raise FileNotFoundError("; ".join(found.problems) or "the inputs contain no name of an image")
    return found


def summarize(captions: int, reasons: Counter[str], output: Path | None, before: int) -> str:
    """Say how many captions were made, where they are, and why how many images have none."""
    line = f"{captions} caption{'' if captions == 1 else 's'}"
    if output is not None:
        line += f" in '{escape_name(str(output))}'"
    if before:
        line += f", beside {before} from before"
    if failed := reasons.total():
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        line += f"; {failed} of {captions + failed} images could not be captioned: {why}"
    return line


def tell(line: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    if sys.stderr is not None:
        tqdm.write(f"captioner caption: {line}", file=sys.stderr)
