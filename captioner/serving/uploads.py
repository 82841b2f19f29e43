"""Read requests: images as bytes, and options of captioning. No part of a request names a file of this machine."""

import binascii
import re
from base64 import b64decode
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import UploadFile

from captioner.grids import Grid, parse_grid
from captioner.images import ImageError, supported
from captioner.images.names import escape_name
from captioner.images.opening import read_size
from captioner.search import Search, make_search
from captioner.serving.answers import describe_fault, refuse
from captioner.serving.settings import Limits

DATA_URL = re.compile(r"data:[\w.+-]*(?:/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)


def check_text(value: Any) -> Any:
    """Refuse text with half characters (surrogates), which no tokenizer accepts."""
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("the text contains half a character")
    return value


Text = Annotated[str, BeforeValidator(check_text)]


class Options(BaseModel):
    """How the images of a request are captioned."""

    model_config = ConfigDict(extra="forbid")

    captions: int = Field(1, ge=1, le=8, description="Captions of each image, best first.")
    prompt: Text = Field("", max_length=500, description="Text that every caption starts with.")
    grid: str | None = Field(
        None,
        pattern=r"^[0-9]{1,3}(x[0-9]{1,3})?$",
        description="Compressed grid such as 3x3; fewer tokens are cheaper.",
    )
    num_beams: int | None = Field(None, ge=1, le=16, description="Beams of the search.")
    max_new_tokens: int | None = Field(None, ge=1, le=256, description="Longest caption in tokens.")
    min_confidence: float = Field(0.0, ge=0, le=1, description="Captions below this confidence are withheld.")
    tags: int | None = Field(None, ge=0, le=64, description="Most object tags that the model reads first; 0 for none.")
    min_tag: float | None = Field(None, ge=0, le=1, description="Least probability of an object tag.")
    sample: bool = Field(False, description="Draw captions at random instead of searching for the best.")
    seed: int | None = Field(None, ge=0, lt=2**53, description="Seed of sampling; without one, each answer differs.")
    temperature: float | None = Field(None, gt=0, le=100, allow_inf_nan=False, description="Temperature of sampling.")
    top_k: int | None = Field(None, ge=1, le=1_000_000, description="Draw each token from the K most probable ones.")
    top_p: float | None = Field(None, gt=0, le=1, description="Draw from the tokens whose probabilities sum to this.")

    @model_validator(mode="after")
    def check_sampling(self) -> "Options":
        """Refuse options that would have no effect."""
        unused = [name for name in ("seed", "temperature", "top_k", "top_p") if name in self.model_fields_set]
        if unused and not self.sample:
            raise ValueError(f"{unused[0]} has no effect without sample")
        return self

    def search(self) -> tuple[Search, Grid | None]:
        """Return the settings of the search, and the grid.

        Raises:
            SettingError: options do not fit one another.
        """
        generation: dict[str, Any] = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        if self.sample:
            generation |= {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        generation = {name: value for name, value in generation.items() if value is not None}
        common = (self.captions, self.prompt, self.seed, self.min_confidence, self.tags, self.min_tag)
        search = make_search(*common, **generation)
        return search, parse_grid(self.grid)


class CaptionRequest(Options):
    """Images to caption, in base64, and options."""

    images: list[str] = Field(
        min_length=1,
        description="Encoded images (JPEG, PNG, ...) in base64, or as `data:` URLs; other URLs are refused.",
    )


@dataclass(frozen=True)
class Upload:
    """An image of a request: its name and its bytes."""

    name: str
    data: bytes

    def check_size(self, pixels: int) -> None:
        """Refuse an image with too many pixels before they are decoded.

        Raises:
            ImageError: it has too many pixels.
        """
        width, height = read_size(self.data, supported()) or (0, 0)  # a broken image is refused when it is decoded
        if width * height > pixels:
            fact = f"'{escape_name(self.name)}' is {width}x{height} px; over {pixels / 1e6:g} megapixels is refused"
            raise ImageError(fact, "too large")


def read_base64(text: str) -> bytes:
    """Read base64, alone or in a `data:` URL.

    Raises:
        ValueError: the text is not base64.
    """
    found = DATA_URL.match(text[:200])
    if found is None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text[:50]):
        raise ValueError("an image is base64 or a data: URL with base64; other URLs are not opened")
    body = text[found.end() if found else 0 :]
    try:
        return b64decode(re.sub(r"\s+", "", body), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("an image is not valid base64") from None


async def read_request(request: Request, limits: Limits) -> tuple[list[Upload], Options]:
    """Read a request for captions, in JSON or as a form with files.

    Raises:
        HTTPException: it cannot be read, has too many images, or an option has a wrong value.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            caption_request = CaptionRequest.model_validate_json(await request.body(), strict=True)
            check_count(len(caption_request.images), limits)
            data = [read_base64(text) for text in caption_request.images]
            return [Upload(f"image {number}", one) for number, one in enumerate(data, 1)], caption_request
        if kind == "multipart/form-data":
            return await read_form(request, limits)
    except ValidationError as error:
        unreadable = error.errors()[0]["type"] == "json_invalid"
        raise refuse(400 if unreadable else 422, describe_fault(error)) from None
    except ValueError as error:
        raise refuse(422, str(error)) from None
    raise refuse(415, "send application/json or multipart/form-data")


async def read_form(request: Request, limits: Limits) -> tuple[list[Upload], Options]:
    """Read a form: files in fields `images` or `image`, options in the others."""
    uploads: list[Upload] = []
    options: dict[str, Any] = {}
    async with request.form(max_files=limits.images + 1, max_fields=50, max_part_size=10_000) as form:
        for name, value in form.multi_items():
            if name in ("image", "images"):
                if not isinstance(value, UploadFile):
                    raise refuse(422, f"{name} must be a file of the form, not text")
                uploads.append(Upload((value.filename or f"image {len(uploads) + 1}")[-200:], await value.read()))
            elif isinstance(value, UploadFile):
                raise refuse(422, "files must be in fields named images")
            elif name in options:
                raise refuse(422, "an option is given twice")
            else:
                options[name] = value
    check_count(len(uploads), limits)
    return uploads, Options.model_validate(options)


def check_count(count: int, limits: Limits) -> None:
    """Refuse a request without images, or with too many.

    Raises:
        HTTPException: the number of images is refused.
    """
    if count == 0:
        raise refuse(422, "there are no images")
    if count > limits.images:
        raise refuse(422, f"a request may have {limits.images} images, not {count}")
