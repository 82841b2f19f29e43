"""Captioning in a line: `captioner.load()`, `captioner.caption(...)`, and the `image-to-text` pipeline."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from captioner.grids import Grid
from captioner.hub import hub_options
from captioner.images import ImageError, ImageSource
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor

DEFAULT_WEIGHTS = Path(__file__).parent / "weights"

COUNTS = ("batch_size", "num_beams", "max_new_tokens")
"""Options of captioning that count something."""


@dataclass
class Caption:
    """One captioned image: its caption and log-probability, or the error that stood in the way."""

    path: str
    caption: str | None = None
    logprob: float | None = None
    error: str | None = None

    def as_dict(self) -> dict:
        """Return the fields as a dict, in order."""
        return asdict(self)


class Captioner:
    """A model and its processor on a device, ready to caption.

    Args:
        model: the captioner model.
        processor: its processor.
        device: a torch device; `None` takes CUDA, then MPS, then the CPU.
    """

    def __init__(self, model: CaptionerModel, processor: CaptionerProcessor, device: str | None = None):
        self.device = pick_device(device)
        dtype = torch.float32 if self.device.type in ("cpu", "mps") else torch.float16
        self.model, self.processor = model.to(self.device, dtype).eval(), processor

    def stream(
        self,
        images: ImageSource | Iterable[ImageSource],
        batch_size: int = 16,
        grid: Grid | str | None = None,
        **generation,
    ) -> Iterator[Caption]:
        """Caption images one batch at a time, in order; a bad image yields its error and stops nothing.

        Args:
            images: paths, encoded bytes or PIL images.
            batch_size: images per batch.
            grid: compressed grid, such as `(3, 3)` or `"3x3"`; `None` for the model's own.
            generation: settings of transformers' `generate`, such as `num_beams`.

        Raises:
            ValueError: the encoder has not such a grid, or an option is not one for a caption an image.
        """
        for name, value in {"batch_size": batch_size, **generation}.items():
            if name in COUNTS and value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
            if name in ("num_return_sequences", "return_dict_in_generate"):
                raise ValueError(f"captioning gives one caption an image; leave {name} out, or use model.generate")
        images = iter([images] if isinstance(images, ImageSource) else images)
        while batch := list(islice(images, batch_size)):
            results, pixels = [], []
            for image in batch:
                name = str(image) if isinstance(image, str | Path) else "image in memory"
                results.append(Caption(name))
                try:
                    pixels.append(self.processor.pixels(image))
                except ImageError as error:
                    results[-1].error = str(error)
            good = [result for result in results if result.error is None]
            if good:
                captions, logprobs = self.generate(torch.stack(pixels), grid, **generation)
                for result, text, logprob in zip(good, captions, logprobs, strict=True):
                    result.caption, result.logprob = text, logprob
            yield from results

    @torch.inference_mode()
    def generate(
        self, pixel_values: torch.Tensor, grid: Grid | str | None = None, **generation
    ) -> tuple[list[str], list[float]]:
        """Caption pixels (B, 3, H, W); returns captions and their log-probabilities."""
        tokens = self.model.encode(pixel_values.to(self.device), grid)
        prompts = self.processor.prompts(len(tokens), self.device)
        sequences = self.model.generate(image_tokens=tokens, **prompts, **generation)
        logprobs = self.model.log_probability(sequences, tokens, prompts["input_ids"])
        return self.processor.captions(sequences), [round(value, 4) for value in logprobs.tolist()]

    def __call__(self, images: ImageSource | Sequence[ImageSource], **options) -> str | list[str]:
        """Caption one image, or a list or tuple of them; see `stream` for the options.

        Raises:
            ImageError: an image cannot be used.
        """
        single = not isinstance(images, list | tuple)
        captions = []
        for result in self.stream([images] if single else images, **options):
            if result.error is not None:
                raise ImageError(result.error)
            captions.append(result.caption)
        return captions[0] if single else captions


def pick_device(name: str | None = None) -> torch.device:
    """Return the device of that name, or the best there is: CUDA, then MPS, then the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError):
        here = [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"no device '{name}' here; there is {', '.join([*here, 'cpu'])}") from None


def load(model: str | Path | None = None, device: str | None = None) -> Captioner:
    """Load a captioner: the shipped one, a local folder, or a hub id.

    Raises:
        ValueError: the folder or repository holds no captioner.
    """
    source = str(model if model is not None else DEFAULT_WEIGHTS)
    local = Path(source).exists()
    if local and not (Path(source) / "config.json").is_file():
        raise ValueError(f"no captioner model in '{source}': it has no config.json")
    if not local and (source.count("/") != 1 or source.startswith((".", "/"))):
        raise ValueError(f"no captioner model at '{source}': no such folder, and not a hub id")
    try:
        options = hub_options(source)
    except ValueError as error:
        raise ValueError(f"no captioner model at '{source}': {error}") from None
    try:
        processor = CaptionerProcessor.from_pretrained(source, **options)
        loaded = CaptionerModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"'{source}' is not a captioner model: {str(error).splitlines()[0]}") from None
    return Captioner(loaded, processor, device)


def caption(images: ImageSource | Sequence[ImageSource], model: str | Path | None = None, **options) -> str | list[str]:
    """Caption one image, or a list of them, with the shipped model or another; options as of `Captioner.stream`."""
    return load(model)(images, **options)
