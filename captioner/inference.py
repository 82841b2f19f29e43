"""Caption images with one line of Python: `captioner.load()`, `captioner.caption(...)`."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any, overload

import torch

from captioner.data.caption_formats import LOW_CONFIDENCE
from captioner.data.open_ahead import open_ahead
from captioner.encoders.base import TokenEncoder
from captioner.encoders.fused import fast_dtype
from captioner.encoders.shipped import SHIPPED, WEIGHTS
from captioner.errors import SettingError
from captioner.grids import Grid, parse_grid, write_grid
from captioner.image_tags import ImageTag
from captioner.images import ImageError, ImageSource, each_image, is_single, name_source
from captioner.images.sources import IN_MEMORY, quote_name
from captioner.loading import load_parts
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.runs.digests import digest_json, digest_tensors
from captioner.search import Candidate, Findings, Search, check_count, describe_search, make_search

BATCH_SIZE = 16
"""Images per batch, unless the caller gives another number."""


@dataclass
class Caption:
    """The result for one image: its caption and log-probability, or an error."""

    path: str
    """The image's path, or `image in memory`."""
    caption: str | None = None
    logprob: float | None = None
    """Log-probability of the caption under the model, a natural logarithm; `None` if it was not requested."""
    error: str | None = None
    reason: str | None = None
    """The kind of error in a few words, without the image's name, so that errors can be counted by kind."""
    candidates: list[Candidate] | None = None
    """All captions of the image, best first, if several were requested; the first of them is `caption`."""
    confidence: float | None = None
    """Confidence of the caption (see `Candidate`); `None` if the log-probability is."""
    tags: list[ImageTag] = field(default_factory=list)
    """The object tags that the model read, the most probable first; or those that it predicted, if it read none."""

    def as_dict(self, tags: bool = False) -> dict[str, Any]:
        """Return path, caption, logprob and error, in this order, and `captions` if several were requested.

        Args:
            tags: whether to add the `tags`.
        """
        row: dict[str, Any] = {"path": self.path, "caption": self.caption, "logprob": self.logprob, "error": self.error}
        if self.candidates is not None:
            row["captions"] = [asdict(one) for one in self.candidates]
        return row | ({"tags": [asdict(tag) for tag in self.tags]} if tags else {})

    def best_first(self) -> list[Candidate]:
        """Return all captions of the image, one or several."""
        if self.candidates is not None:
            return self.candidates
        return [] if self.caption is None else [Candidate(self.caption, self.logprob, self.confidence)]

    def fill(self, found: Findings, search: Search, logprob: bool) -> None:
        """Set the tags and the captions that a search found, without captions below its least confidence.

        Args:
            found: what was found.
            search: the settings of the search.
            logprob: whether log-probabilities are shown.
        """
        self.tags, candidates = found.tags, found.candidates
        sure = [one for one in candidates if (one.confidence or 0) >= search.min_confidence]
        if not sure:
            best = max(one.confidence or 0 for one in candidates)
            self.reason = LOW_CONFIDENCE
            self.error = (
                f"{quote_name(self.path)} gets no caption: the confidence is {best:.4f}, below {search.min_confidence}"
            )
        else:
            sure = sure if logprob else [Candidate(one.caption) for one in sure]
            self.caption, self.logprob, self.confidence = sure[0].caption, sure[0].logprob, sure[0].confidence
        if search.captions > 1:
            self.candidates = sure


class Captioner:
    """A model and its processor on a device, ready to caption; several threads may use one at the same time.

    The model captions one batch at a time.

    Args:
        model: the captioner model.
        processor: its processor.
        device: a torch device; `None` takes CUDA, then MPS, then the CPU.
        encoder_dtype: dtype in which the encoder computes on a CPU; `None` takes bfloat16 if the CPU has matrix units
            for it (AMX), else float32.
        name: name of the model: `shipped`, a folder or a hub id.
    """

    def __init__(
        self,
        model: CaptionerModel,
        processor: CaptionerProcessor,
        device: str | None = None,
        encoder_dtype: torch.dtype | None = None,
        name: str | None = None,
    ):
        self.device, self.name = pick_device(device), name
        dtype = torch.float32 if self.device.type in ("cpu", "mps") else torch.float16
        self.model: CaptionerModel = model.to(self.device, dtype).eval()
        self.encoder_dtype = fast_dtype() if encoder_dtype is None else encoder_dtype
        self.processor = processor
        self._lock = threading.Lock()  # decoders and fast tokenizers may keep state while they run

    @cached_property
    def encoder(self) -> TokenEncoder:
        """The encoder that captions. On a CPU it is a faster copy, and the model stays as it was loaded."""
        encoder = self.model.encoder
        return encoder.optimize_for_inference(self.encoder_dtype) if self.device.type == "cpu" else encoder

    def stream(
        self,
        images: ImageSource | Iterable[ImageSource],
        batch_size: int | None = BATCH_SIZE,
        grid: Grid | str | int | None = None,
        logprob: bool = True,
        workers: int = 0,
        **options: Any,
    ) -> Iterator[Caption]:
        """Caption images in order, one batch at a time; an image that cannot be used gives a result with an error.

        Args:
            images: one image that `open_image` can open, or an iterable of them, such as a list or a generator. An
                array and an open file are one image.
            batch_size: images per batch; `None` for the default.
            grid: compressed grid, such as `(3, 3)` or `"3x3"`; `None` for the model's own.
            logprob: whether to compute log-probabilities. Greedy and beam search add them up on the way; sampling needs
                one more pass of the decoder.
            workers: threads that open the images of the next batches while the model runs. With 0, each batch is opened
                in the calling thread.
            options: see `make_search`: `captions`, `prompt`, `seed`, `min_confidence`, `tags`, `min_tag`, and settings
                of transformers' `generate`, such as `num_beams`. `None` stands for the default.

        Raises:
            ValueError: the encoder does not have this grid, or an option is not known or does not fit the others.
        """
        batch_size, grid = check_count("batch_size", BATCH_SIZE if batch_size is None else batch_size), parse_grid(grid)
        search = make_search(**options)
        search.resolve(self.model)
        if isinstance(workers, bool) or index(workers) < 0:
            raise SettingError(f"workers must be a whole number of at least 0, not {workers!r}", "workers")
        return self._stream(each_image(images), batch_size, grid, logprob, index(workers), search)

    def _stream(
        self,
        sources: Iterator[ImageSource],
        batch_size: int,
        grid: Grid | None,
        logprob: bool,
        workers: int,
        search: Search,
    ) -> Iterator[Caption]:
        opened = open_ahead(enumerate(sources), self.open, workers, 2 * batch_size)
        while batch := list(islice(opened, batch_size)):
            good = [(result, key, pixels) for result, key, pixels in batch if pixels is not None]
            if good:
                pixel_values, keys = torch.stack([pixels for *_, pixels in good]), [key for _, key, _ in good]
                found = self.search(pixel_values, keys, search, grid, logprob or search.needs_logprob(self.model))
                for (result, _, _), own in zip(good, found, strict=True):
                    result.fill(own, search, logprob)
            for result, *_ in batch:
                if search.captions > 1 and result.candidates is None:
                    result.candidates = []
                yield result

    def open(self, numbered: tuple[int, ImageSource]) -> tuple[Caption, str, torch.Tensor | None]:
        """Open an image, given with its number in a stream.

        Returns:
            A caption with the image's name, and the error if it cannot be used; a key for random numbers, which is the
            name, or the number of an image in memory; the pixels (3, H, W), if any.
        """
        number, image = numbered
        result = Caption(name_source(image))
        key = f"#{number}" if result.path == IN_MEMORY else result.path
        try:
            return result, key, self.processor.pixels(image)
        except ImageError as error:
            result.error, result.reason = str(error), error.kind
            return result, key, None

    @torch.inference_mode()
    def search(
        self,
        pixel_values: torch.Tensor,
        keys: list[str],
        search: Search,
        grid: Grid | None = None,
        logprob: bool = True,
    ) -> list[Findings]:
        """Find captions for pixels (B, 3, H, W).

        Args:
            pixel_values: the images.
            keys: a name for each image, on which the random numbers of sampling depend.
            search: the settings of the search.
            grid: compressed grid; `None` for the model's own.
            logprob: whether to compute log-probabilities and confidences.

        Returns:
            The captions of each image, best first, and its tags.
        """
        with self._lock:
            grid = self.model.config.grid if grid is None else grid
            image_tokens = self.encoder.encode(pixel_values.to(self.device), grid)
            return search.run(self.model, self.processor, image_tokens, keys, logprob)

    def describe(self, grid: Grid | str | int | None = None, **options: Any) -> dict[str, Any]:
        """Return all that captions depend on: weights, preprocessing, grid and search, as values of types of JSON.

        Args:
            grid: as of `stream`.
            options: as of `stream`.
        """
        config = self.model.config
        used = parse_grid(grid) or config.grid or self.model.encoder.grid
        kind = {"encoder": config.encoder_config, "fusion": config.fusion, "blind": config.blind}
        kind |= {"image": self.processor.image, "prompt": self.processor.prompt}
        if config.tags is not None:
            kind["tags"] = config.tags
        dtype = next((str(weight.dtype) for weight in self.encoder.parameters()), "torch.float32")
        return {
            "model": self.name,
            "weights": digest_json([digest_tensors(self.model.state_dict()), kind]),
            "encoder_dtype": dtype.removeprefix("torch."),
            "grid": None if used is None else write_grid(used),
            **describe_search(make_search(**options), self.model),
        }

    @overload
    def __call__(self, images: ImageSource, **options: Any) -> str: ...

    @overload
    def __call__(self, images: Iterable[ImageSource], **options: Any) -> list[str]: ...

    def __call__(self, images: ImageSource | Iterable[ImageSource], **options: Any) -> str | list[str]:
        """Caption one image, or several of them; see `stream` for the options.

        Returns:
            The caption of one image; for a list, a generator or another iterable of images, a list of captions.

        Raises:
            ImageError: an image cannot be used.
            ValueError: several captions of each image are requested, which `stream` returns.
        """
        if options.get("captions", 1) != 1:
            raise ValueError("a call gives one caption of each image; stream gives several")
        captions = []
        for result in self.stream(images, **{"logprob": False, **options}):
            if result.error is not None or result.caption is None:
                raise ImageError(result.error or "no caption", result.reason or "unusable")
            captions.append(result.caption)
        return captions[0] if is_single(images) else captions


def pick_device(name: str | None = None) -> torch.device:
    """Return the device of a name; for `None`, the first that this machine has of CUDA, MPS and CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError):
        here = [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise SettingError(f"no device '{name}' here; there is {', '.join([*here, 'cpu'])}", "device") from None


def load(
    model: str | Path | None = None, device: str | None = None, encoder_dtype: torch.dtype | None = None
) -> Captioner:
    """Load a captioner: the shipped one (`None` or `"shipped"`), a local folder, or a hub id.

    Args:
        model: the folder or hub id; `None` for the shipped captioner.
        device: a torch device such as `cuda:1`; `None` takes CUDA, then MPS, then the CPU.
        encoder_dtype: as of `Captioner`.

    Raises:
        ValueError: the folder or repository contains no captioner, a weight is missing, or there is no such device.
    """
    source = str(WEIGHTS if model in (None, SHIPPED) else model)
    name = SHIPPED if source == str(WEIGHTS) else source
    return Captioner(*load_parts(source), device, encoder_dtype, name)


def caption(
    images: ImageSource | Iterable[ImageSource], model: str | Path | None = None, **options: Any
) -> str | list[str]:
    """Caption one image, or several of them, with the shipped model or another; options as of `Captioner.stream`."""
    return load(model)(images, **options)
