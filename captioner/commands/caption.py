"""Caption files and folders: find the images, caption them, and write each result at once."""

import os
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro
from tqdm import tqdm

from captioner.data.caption_beside import CaptionFiles
from captioner.data.caption_formats import LOW_CONFIDENCE, find_format
from captioner.data.caption_metadata import Metadata
from captioner.data.caption_output import Writer, check_maker, check_output, open_output, read_output
from captioner.data.image_inputs import STANDARD_INPUT, FoundImages, find_images
from captioner.data.path_filter import PathFilter
from captioner.errors import SettingError, check_positive, check_shares
from captioner.grids import parse_grid
from captioner.images import ImageError, ImageSource
from captioner.images.names import escape_name
from captioner.runs.progress import progress_bar

if TYPE_CHECKING:
    from captioner.inference import Caption

Append = tyro.conf.UseAppendAction
"""One pattern for each option, so that a folder after it does not count as a pattern."""


@dataclass(frozen=True)
class CaptionConfig:
    """Caption images: files, folders, patterns, or what standard input holds."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = ()
    """Images, folders (searched with their subfolders; hidden ones are left out), zip and tar archives, and glob
    patterns. `-` stands for standard input: one image, or a list of paths, each ended by a newline, or by a zero byte
    as `find -print0` writes them."""
    include: Annotated[tuple[str, ...], Append] = ()
    """Pattern of the files to caption in folders and archives, as in a `.gitignore`; may be given several times."""
    exclude: Annotated[tuple[str, ...], Append] = ()
    """Pattern of files or folders to leave out, such as `*_thumb.jpg` or `raw/`; may be given several times."""
    output: Path | None = None
    """File to write; its ending gives the format: .jsonl, .csv, .txt or .parquet. Without it, lines of
    `path<TAB>caption` are printed."""
    beside: str | None = None
    """Write a caption file beside each image, with this ending: `txt` writes `a.txt` for `a.jpg`."""
    metadata: bool = False
    """Write each caption into the image's own file, as XMP and IPTC description. Images that have one are left out."""
    prefix: str = ""
    """Text before each caption in files beside images."""
    suffix: str = ""
    """Text after each caption in files beside images."""
    resume: bool = False
    """Continue an output that exists: images with a caption in it are left out, and images that failed are tried again.
    An output of another model, grid or search is refused. Beside images: leave out images that have a caption file."""
    overwrite: bool = False
    """Replace an output that exists, the caption files beside images, or descriptions in them."""
    model: str | None = None
    """Folder or hub id of the captioner; `None` or `shipped` for the one that comes with this package."""
    device: str | None = None
    """Device to run on, such as cuda, cuda:1, mps or cpu; `None` for the best one here."""
    grid: str | None = None
    """Compressed grid such as 3x3 or 10x10. A smaller grid has fewer tokens and is cheaper. `None` for the model's
    own."""
    batch_size: int = 16
    """Images per batch."""
    workers: int | None = None
    """Threads that open images while the model runs; with 0, model and opening take turns. `None` for one per CPU core,
    at most 8."""
    num_beams: int | None = None
    """Beams of the search, of which 1 is greedy and cheapest; `None` for the model's own, or as many as captions."""
    max_new_tokens: int | None = None
    """Longest caption in tokens; `None` for the model's own."""
    captions: int = 1
    """Captions of each image, best first."""
    prompt: str | None = None
    """Text that every caption starts with, such as `a photo of`."""
    min_confidence: float = 0.0
    """Least confidence of a caption, from 0 to 1: the geometric mean of its tokens' probabilities. An image whose
    captions are all below gets none."""
    tags: int | None = None
    """Most object tags that the model predicts in an image and reads before its caption, 0 for none; `None` for the
    model's own number."""
    min_tag: float | None = None
    """Least probability of a predicted tag, from 0 to 1; `None` for the model's own."""
    show_tags: bool = False
    """Show the tags of each image and their probabilities beside its caption. With `tags` 0 the predicted ones are
    shown, which the captions then do not depend on."""
    sample: bool = False
    """Draw captions at random instead of searching for the best."""
    seed: int = 0
    """Seed of sampling. The captions of an image depend on its name and the seed alone."""
    temperature: float | None = None
    """Temperature of sampling: below 1 for more usual captions, above 1 for more unusual ones."""
    top_k: int | None = None
    """Draw each token from the K most probable ones."""
    top_p: float | None = None
    """Draw each token from the most probable ones whose probabilities sum to this."""

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise SettingError("resume continues the output, overwrite replaces it: choose one")
        if (self.output is not None) + (self.beside is not None) + self.metadata > 1:
            raise SettingError("captions are written to an output, beside the images or into them: choose one")
        if self.metadata and self.captions > 1:
            raise SettingError("an image holds one description, not several captions", "captions")
        if (self.resume or self.overwrite) and self.output is None and self.beside is None and not self.metadata:
            raise SettingError("resume and overwrite are about the file that output names: name it")
        check_positive(self, "batch_size", "num_beams", "max_new_tokens", "captions", "temperature", "top_k", "top_p")
        check_shares(self, "min_confidence")
        if self.tags is not None and self.tags < 0:
            raise SettingError(f"tags must be at least 0, not {self.tags}", "tags")
        if self.min_tag is not None and not 0 <= self.min_tag <= 1:
            raise SettingError(f"min_tag must be a share between 0 and 1, not {self.min_tag}", "min_tag")
        if self.top_p is not None and self.top_p > 1:
            raise SettingError(f"top_p must be a share between 0 and 1, not {self.top_p}", "top_p")
        if self.workers is not None and self.workers < 0:
            raise SettingError(f"workers must be at least 0, not {self.workers}", "workers")
        if self.sample and self.num_beams is not None:
            raise SettingError("sampling draws one token after the other and has no beams", "num_beams", "sample")

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others to the reason."""
        unused: dict[str, str] = {}
        if self.beside is None:
            unused |= dict.fromkeys(("prefix", "suffix"), "no files are written beside the images")
        if self.beside is not None or self.metadata:
            unused["show_tags"] = "captions are written beside the images or into them"
        if self.tags == 0 and not self.show_tags:
            unused["min_tag"] = "there are no tags"
        if not self.sample:
            unused |= dict.fromkeys(("seed", "temperature", "top_k", "top_p"), "captions are not sampled")
        return unused

    def search(self) -> dict[str, Any]:
        """Return the options of `Captioner.stream` that decide about the captions."""
        names = ("num_beams", "max_new_tokens", "captions", "prompt", "min_confidence", "tags", "min_tag")
        options = {name: getattr(self, name) for name in names}
        if self.sample:
            options |= {name: getattr(self, name) for name in ("seed", "temperature", "top_k", "top_p")}
            options["do_sample"] = True
        return {name: value for name, value in options.items() if value is not None}


SETTINGS = CaptionConfig


def run(config: CaptionConfig) -> int:
    """Caption, and return the exit code: 1 where an image has no caption or an input could not be read."""
    return 1 if caption_files(config) else 0


def caption_files(config: CaptionConfig) -> int:
    """Run the captioning job.

    Returns:
        The number of images that could not be captioned and of inputs that could not be read. Images whose captions
        are below the least confidence do not count.

    Raises:
        ValueError: there is no input; the output has an unknown format, exists, or was made with other settings; or
            there is no such model or device.
        FileNotFoundError: no input contains an image.
        SettingError: the output cannot be written; its content stays.
    """
    each = make_image_output(config)
    path_filter = PathFilter(config.include, config.exclude) if config.include or config.exclude else None
    done, failed = set[str](), set[str]()
    if each is None:
        check_output(config.output, config.resume, config.overwrite)
    if config.resume and config.output is not None:
        done, failed = read_output(config.output)
    found = find_inputs(config, path_filter)
    if each is not None:
        found.images, problems, done = each.plan(found.images)
        found.problems += problems
    for line in found.problems + found.notes:
        tell(line)
    images = [(name, source) for name, source in found.images if name not in done]
    place = each.where if each is not None else f"'{escape_name(str(config.output))}'" if config.output else ""
    if not images and each is not None:
        tell(f"all {len(found.images)} images are captioned in {place}")
        return len(found.problems)
    grid = parse_grid(config.grid)
    from captioner.inference import load  # takes seconds, so errors in the inputs come first

    captioner = load(config.model, config.device)
    if config.show_tags and captioner.model.tags is None:
        raise SettingError("this captioner has no tags", "show_tags", "model")
    made_by: dict[str, Any] = {"captions": config.captions}
    if config.output is not None:
        made_by = captioner.describe(grid, **config.search())
        if config.show_tags:
            made_by["show_tags"] = True
        if (done or failed) and not check_maker(config.output, made_by):
            tell(f"{place} does not record what made it, so this is not checked")
    results = captioner.stream(
        (cast(ImageSource, source) for _, source in images),
        batch_size=config.batch_size,
        grid=grid,
        logprob=each is None and find_format(config.output).has_logprob,
        workers=min(8, os.cpu_count() or 1) if config.workers is None else config.workers,
        **config.search(),
    )
    named = zip((name for name, _ in images), progress_bar(results, total=len(images), unit="img"), strict=True)
    output = nullcontext(each) if each is not None else open_output(config.output, made_by, append=bool(done | failed))
    with output as writer:
        reasons = write_results(named, writer, failed, config.show_tags)
    if images:
        tell(summarize(len(images) - reasons.total(), config.captions, reasons, place, len(done)))
    else:
        tell(f"all {len(found.images)} images are captioned in {place}")
    return reasons.total() - reasons[LOW_CONFIDENCE] + len(found.problems)


def make_image_output(config: CaptionConfig) -> CaptionFiles | Metadata | None:
    """Return the writer of captions beside the images or into them; `None` if all captions go to one output.

    Raises:
        SettingError: the ending is not valid, or a library is not installed.
    """
    if config.beside is not None:
        return CaptionFiles(config.beside, config.prefix, config.suffix, config.resume, config.overwrite)
    return Metadata(config.overwrite) if config.metadata else None


def write_results(
    results: Iterable[tuple[str, "Caption"]],
    writer: Writer | CaptionFiles | Metadata,
    failed: set[str],
    show_tags: bool = False,
) -> Counter[str]:
    """Write the captions of each image as soon as they are made.

    Args:
        results: name and captions of each image.
        writer: writes them.
        failed: images whose errors an earlier run wrote.
        show_tags: whether to write tags, too.

    Returns:
        The number of images without a caption, by reason.
    """
    reasons: Counter[str] = Counter()
    for name, result in results:
        result.path = name
        if result.error is None or name not in failed:
            try:
                writer.write(result.as_dict(show_tags))
            except ImageError as error:  # of one caption file, or of one image's metadata
                result.error, result.reason = str(error), error.kind
        if result.error is not None:
            reasons[result.reason or "unusable"] += 1
        if result.error is not None and result.reason != LOW_CONFIDENCE:
            tell(f"skipped: {result.error}")
    return reasons


def find_inputs(config: CaptionConfig, path_filter: PathFilter | None) -> FoundImages:
    """Find the images to caption; without inputs, they are read from standard input unless it is a terminal.

    Raises:
        ValueError: there are no inputs.
        FileNotFoundError: no input contains an image.
    """
    inputs, stdin = config.inputs, None if sys.stdin is None else sys.stdin
    if not inputs and stdin is not None and not stdin.isatty():
        inputs = (STANDARD_INPUT,)
    if not inputs:
        raise ValueError("no images: name files, folders or patterns, or - for standard input")
    found = find_images(inputs, None if stdin is None else stdin.buffer, path_filter)
    if not found.images:
        raise FileNotFoundError("; ".join(found.problems) or "the inputs contain no name of an image")
    return found


def summarize(captioned: int, each: int, reasons: Counter[str], place: str, before: int) -> str:
    """Return a line with the number of captions, their place, and the number of images without one by reason.

    Args:
        captioned: images with captions.
        each: captions of each of them.
        reasons: images without captions, by reason.
        place: where the captions are; empty for standard output.
        before: images that already had captions.
    """
    line = f"{captioned} caption{'' if captioned == 1 else 's'}"
    if each > 1:
        line = f"{each} captions of each of {captioned} image{'' if captioned == 1 else 's'}"
    if place:
        line += f" in {place}"
    if before:
        line += f", beside {before} from before"
    reasons, low = Counter(reasons), reasons[LOW_CONFIDENCE]
    del reasons[LOW_CONFIDENCE]
    if failed := reasons.total():
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        line += f"; {failed} of {captioned + failed + low} images could not be captioned: {why}"
    if low:
        line += f"; {low} of {captioned + failed + low} images have no caption: {LOW_CONFIDENCE}"
    return line


def tell(line: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    if sys.stderr is not None:
        tqdm.write(f"captioner caption: {line}", file=sys.stderr)
