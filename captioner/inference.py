"""Caption images with one line of Python: `captioner.load()`, `captioner.caption(...)`."""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any, cast, overload

import torch
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging as transformers_logging

from captioner.encoders.fused import fast_dtype
from captioner.encoders.shipped import SHIPPED, WEIGHTS
from captioner.errors import SettingError, first_line
from captioner.grids import Grid, parse_grid
from captioner.hub import hub_options
from captioner.images import ImageError, ImageSource, each_image, is_single, name_source
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.transformers_versions import LOADING_ERRORS

BATCH_SIZE = 16
"""Images per batch, unless the caller gives another number."""

COUNTS = ("batch_size", "num_beams", "max_new_tokens")
"""Options of captioning that must be whole numbers above 0."""

MODEL = ("model", "init_from", "captioner")
"""Settings that name a captioner; each job has one of them."""

REFUSED = {
    "num_return_sequences": "captioning returns one caption per image",
    "return_dict_in_generate": "captioning returns captions",
    "max_length": "max_new_tokens limits the length of a caption",
    "pixel_values": "captioning takes images",
    "image_tokens": "captioning takes images",
    "input_ids": "every caption starts with the captioner's own prompt",
    "attention_mask": "every caption starts with the captioner's own prompt",
}
"""Options of transformers' `generate` that captioning refuses, and why."""


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

    def as_dict(self) -> dict[str, str | float | None]:
        """Return path, caption, logprob and error, in this order."""
        return {"path": self.path, "caption": self.caption, "logprob": self.logprob, "error": self.error}


class Captioner:
    """A model and its processor on a device, ready to caption; several threads may use one at the same time.

    Images are opened in the calling thread. The model captions one batch at a time.

    Args:
        model: the captioner model.
        processor: its processor.
        device: a torch device; `None` takes CUDA, then MPS, then the CPU.
        encoder_dtype: dtype in which the encoder computes on a CPU; `None` takes bfloat16 if the CPU has matrix units
            for it (AMX), else float32.
    """

    def __init__(
        self,
        model: CaptionerModel,
        processor: CaptionerProcessor,
        device: str | None = None,
        encoder_dtype: torch.dtype | None = None,
    ):
        self.device = pick_device(device)
        dtype = torch.float32 if self.device.type in ("cpu", "mps") else torch.float16
        self.model: CaptionerModel = model.to(self.device, dtype).eval()
        self.encoder = self.model.encoder
        if self.device.type == "cpu":  # a faster copy; the model itself stays as it was loaded
            self.encoder = self.encoder.optimize_for_inference(fast_dtype() if encoder_dtype is None else encoder_dtype)
        self.processor = processor
        self._lock = threading.Lock()  # decoders and fast tokenizers may keep state while they run

    def stream(
        self,
        images: ImageSource | Iterable[ImageSource],
        batch_size: int | None = BATCH_SIZE,
        grid: Grid | str | int | None = None,
        logprob: bool = True,
        **generation: Any,
    ) -> Iterator[Caption]:
        """Caption images in order, one batch at a time; an image that cannot be used gives a result with an error.

        Args:
            images: one image that `open_image` can open, or an iterable of them, such as a list or a generator. An
                array and an open file are one image.
            batch_size: images per batch; `None` for the default.
            grid: compressed grid, such as `(3, 3)` or `"3x3"`; `None` for the model's own.
            logprob: whether to compute log-probabilities. Greedy and beam search add them up on the way; sampling needs
                one more pass of the decoder.
            generation: settings of transformers' `generate`, such as `num_beams`; `None` for the model's own.

        Raises:
            ValueError: the encoder does not have this grid, or an option does not fit one caption per image.
        """
        given = {"batch_size": batch_size, **generation}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for name, value in options.items():
            if name in COUNTS:
                options[name] = check_count(name, value)
            if name in REFUSED:
                raise ValueError(f"{REFUSED[name]}; leave {name} out")
        grid = parse_grid(grid)
        return self._stream(each_image(images), options.pop("batch_size", BATCH_SIZE), grid, logprob, options)

    def _stream(
        self, sources: Iterator[ImageSource], batch_size: int, grid: Grid | None, logprob: bool, options: dict[str, Any]
    ) -> Iterator[Caption]:
        while batch := list(islice(sources, batch_size)):
            results, pixels = [], []
            for image in batch:
                results.append(Caption(name_source(image)))
                try:
                    pixels.append(self.processor.pixels(image))
                except ImageError as error:
                    results[-1].error, results[-1].reason = str(error), error.kind
            good = [result for result in results if result.error is None]
            if good:
                captions, logprobs = self.generate(torch.stack(pixels), grid, logprob, **options)
                for result, text, value in zip(good, captions, logprobs, strict=True):
                    result.caption, result.logprob = text, value
            yield from results

    @torch.inference_mode()
    def generate(
        self, pixel_values: torch.Tensor, grid: Grid | str | None = None, logprob: bool = True, **generation: Any
    ) -> tuple[list[str], list[float] | list[None]]:
        """Caption pixels (B, 3, H, W); options as of `stream`.

        Returns:
            B captions and their log-probabilities, or `None` for each if `logprob` is false.
        """
        with self._lock:
            tokens = self.encoder.encode(pixel_values.to(self.device), self.model.config.grid if grid is None else grid)
            options: dict[str, Any] = {**self.processor.prompts(len(tokens), self.device), **generation}
            if not logprob:
                captions = self.processor.captions(self.model.generate(image_tokens=tokens, **options))
                return captions, [None] * len(captions)
            sequences, logprobs = self.model.generate_with_log_probability(tokens, **options)
            return self.processor.captions(sequences), [round(value, 4) for value in logprobs.tolist()]

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
        """
        captions = []
        for result in self.stream(images, **{"logprob": False, **options}):
            if result.error is not None or result.caption is None:
                raise ImageError(result.error or "no caption", result.reason or "unusable")
            captions.append(result.caption)
        return captions[0] if is_single(images) else captions


def check_count(name: str, value: Any) -> int:
    """Return a whole number above 0 as an int; integers of numpy are accepted.

    Raises:
        SettingError: the value is not a whole number above 0.
    """
    try:
        count = 0 if isinstance(value, bool) else index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise SettingError(f"{name} must be a whole number above 0, not {value!r}", name)
    return count


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


loading = threading.Lock()


@contextmanager
def silence_transformers(bars: bool) -> Iterator[None]:
    """Return a context for loading a captioner, in which transformers prints no warnings: all would be false alarms.

    The settings of transformers belong to the whole program. So only one thread at a time is in this context, and the
    settings are restored at its end.

    Args:
        bars: whether transformers may draw progress bars, for a download.
    """
    with loading:
        verbosity = transformers_logging.get_verbosity()
        hide = not bars and transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        if hide:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if hide:
                transformers_logging.enable_progress_bar()


def load(model: str | Path | None = None, device: str | None = None) -> Captioner:
    """Load a captioner: the shipped one (`None` or `"shipped"`), a local folder, or a hub id.

    Args:
        model: the folder or hub id; `None` for the shipped captioner.
        device: a torch device such as `cuda:1`; `None` takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: the folder or repository contains no captioner, a weight is missing, or there is no such device.
    """
    source = str(WEIGHTS if model in (None, SHIPPED) else model)
    local = os.path.exists(source)
    if local and not (Path(source) / "config.json").is_file():
        raise SettingError(f"no captioner model in '{source}': it has no config.json", *MODEL)
    if not local and (source.count("/") != 1 or source.startswith((".", "/"))):
        raise SettingError(f"no captioner model at '{source}': no such folder, and not a hub id", *MODEL)
    try:
        options: dict[str, Any] = {**hub_options(source)}
    except ValueError as error:
        raise SettingError(f"no captioner model at '{source}': {error}", *MODEL) from None
    downloaded = local or isinstance(try_to_load_from_cache(source, "config.json"), str)
    options["trust_remote_code"] = False  # transformers would ask whether to run code that lies beside the weights
    try:
        with silence_transformers(bars=not downloaded):
            processor = CaptionerProcessor.from_pretrained(source, **options)
            options |= {"use_safetensors": True, "dtype": torch.float32}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_weights` names them
            loaded, info = cast("tuple[CaptionerModel, dict]", CaptionerModel.from_pretrained(source, **options))
    except LOADING_ERRORS as error:
        raise SettingError(f"'{source}' is not a captioner model: {first_line(error)}", *MODEL) from None
    check_weights(source, info)
    return Captioner(loaded, processor, device)


def check_complete(source: str, missing: Iterable[str], mismatched: Iterable[tuple], *settings: str) -> None:
    """Refuse a model whose folder does not contain all of its weights.

    Args:
        source: its folder or hub id.
        missing: names of the weights that the folder lacks.
        mismatched: weights of another shape, as transformers lists them: the name first.
        settings: settings that name the model.

    Raises:
        SettingError: weights are missing or have another shape.
    """
    if names := sorted(missing):
        raise SettingError(f"'{source}' lacks {len(names)} of its weights, such as {names[0]}", *settings)
    if names := sorted(str(name) for name, *_ in mismatched):
        fact = f"{len(names)} weights of '{source}' have other shapes than its configuration says, such as {names[0]}"
        raise SettingError(fact, *settings)


def check_weights(source: str, info: dict[str, Any]) -> None:
    """Refuse a captioner whose weights are not those that its configuration describes.

    Args:
        source: its folder or hub id.
        info: what transformers says of loading it.

    Raises:
        SettingError: weights are missing, of another shape, or more than there is a place for.
    """
    check_complete(source, info["missing_keys"], info["mismatched_keys"], *MODEL)
    if unknown := sorted(info["unexpected_keys"]):
        fact = f"the configuration of '{source}' has no place for {len(unknown)} of its weights, such as {unknown[0]}"
        raise SettingError(fact, *MODEL)


def caption(
    images: ImageSource | Iterable[ImageSource], model: str | Path | None = None, **options: Any
) -> str | list[str]:
    """Caption one image, or several of them, with the shipped model or another; options as of `Captioner.stream`."""
    return load(model)(images, **options)
