"""Convert any pixels to 8-bit RGB, by rules that depend on the type of the pixels, and never on their values.

| pixels                                            | rule                                                          |
|---------------------------------------------------|---------------------------------------------------------------|
| 8 bits, a palette, two levels                     | unchanged                                                     |
| 16 bits                                           | 0 is black, 65535 white: `value // 257`                       |
| of a TIFF that declares another depth, such as 12 | 0 is black, the largest number of that depth white            |
| 32-bit integers of a file                         | as 16 bits; below 0 black, above 65535 white                  |
| floating point                                    | 0.0 is black, 1.0 white; below black, above white, NaN black  |

So the same value has the same brightness in every image of a set. Values of a 12-bit camera in a file that declares 16
bits become dark: multiply them by 16 first. If more than a tenth of the values of an image are outside the range of the
last two rows, the image is refused, because its range must be another one (floats from 0 to 255, for example).
"""

from typing import Any, cast

import numpy as np
from PIL import Image, TiffImagePlugin

from captioner.images.sources import ImageError, is_tensor, quote_name

MAX_PIXELS = 128 * 2**20
"""Pixels above which an image is refused as a decompression bomb; a 128-megapixel camera still passes."""

MAX_RATIO = 1000
"""Largest ratio of the two sides: an image that is scaled until its shorter side fits grows by this factor."""

OUTSIDE = 0.1
"""Share of values outside the range of their type above which an image is refused."""


def check_size(width: int, height: int, name: str) -> None:
    """Refuse an image without pixels, with more than `MAX_PIXELS`, or with a side over `MAX_RATIO` times the other.

    Raises:
        ImageError: the image has such a size.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels: it is {width}x{height}", "without pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width}x{height} px; over {MAX_PIXELS // 10**6} megapixels is refused", "too large"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(
            f"{name} is {width}x{height} px; one side over {MAX_RATIO} times the other is refused", "too narrow"
        )


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert a loaded PIL image of any mode to mode RGB; transparent parts become white.

    Args:
        image: the image; its orientation is unchanged.
        name: name of the image in messages.

    Raises:
        ImageError: too many values are outside the range of their type.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return deep_to_rgb(image, name)
    if image.mode == "LAB":
        return lab_to_rgb(image)
    if image.mode == "La":
        image = image.convert("LA")
    if has_transparency(image):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def has_transparency(image: Image.Image) -> bool:
    """Return whether some of an image may be transparent.

    The transparent colour of a 16-bit PNG has 16 bits, but its pixels have 8 bits here, so it is ignored.
    """
    key = image.info.get("transparency")
    if image.mode in ("RGB", "L", "1") and key is not None:
        numbers = key if isinstance(key, tuple) else (key,)
        return all(isinstance(number, int) and 0 <= number < 256 for number in numbers)
    return image.has_transparency_data


def deep_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert a grey image of more than 8 bits to mode RGB, by the rules above."""
    values = np.asarray(image if image.mode == "F" else image.convert("I"))
    key = image.info.get("transparency")
    clear = values == key if isinstance(key, int) else None
    if image.mode != "F":
        values = within(values, 0, 65535, name).astype(np.uint16)
    bits, inverted = tiff_depth(image)
    grey = reduce_depth(values, name, bits)
    if inverted:
        grey = 255 - grey
    if clear is not None:
        grey[clear] = 255
    return Image.fromarray(grey).convert("RGB")


def tiff_depth(image: Image.Image) -> tuple[int, bool]:
    """Return the declared depth of a TIFF's 16-bit values, and whether 0 is white; 16 and false for other images."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or not image.mode.startswith("I;16"):
        return 16, False
    bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return (bits if 8 < bits < 16 else 16), white_is_zero


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """Convert CIE L*a*b* to sRGB; Pillow does this only by colour profiles."""
    from PIL import ImageCms

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return cast(Image.Image, ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))


def array_to_rgb(array: Any) -> Image.Image:
    """Convert an array to an image of mode RGB.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the last with an alpha channel; as a torch tensor, which has
            channels first, (H, W), (1, H, W), (3, H, W) or (4, H, W). Of type bool, uint8, uint16 or floating point.

    Raises:
        ImageError: the array has another shape or type, no pixels or too many, or floats outside 0 to 1.
    """
    name = quote_name(array)
    if is_tensor(array):
        tensor = array.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        shapes, channels = "a tensor is (H, W), (1, H, W), (3, H, W) or (4, H, W)", 0
    else:
        values = np.asarray(array)
        shapes, channels = "an array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)", 2
    shape = tuple(values.shape)
    if values.ndim != 2 and not (values.ndim == 3 and shape[channels] in (1, 3, 4)):
        more = "; give several images as a list of them" if values.ndim == 4 else ""
        raise ImageError(f"{name} has the shape {shape}; {shapes}{more}", "of another shape than images")
    if values.ndim == 3 and channels == 0:
        values = values.transpose(1, 2, 0)
    check_size(values.shape[1], values.shape[0], name)
    pixels = np.ascontiguousarray(reduce_depth(values, name))
    return to_rgb(Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels), name)


def reduce_depth(values: np.ndarray, name: str, bits: int = 16) -> np.ndarray:
    """Convert values of any type to uint8, in the same shape, by the rules above.

    Args:
        bits: depth of 16-bit values.

    Raises:
        ImageError: the type is not one of pixels, or too many values are outside its range.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        if bits == 16:
            return (values // 257).astype(np.uint8)
        return (np.minimum(values, 2**bits - 1).astype(np.uint32) * 255 // (2**bits - 1)).astype(np.uint8)
    if np.issubdtype(values.dtype, np.floating):
        return (within(values.astype(np.float32), 0, 1, name) * 255 + 0.5).astype(np.uint8)
    raise ImageError(
        f"{name} is of the type {values.dtype}; pixels are bool, uint8, uint16 or floating point from 0 to 1",
        "of another type than pixels",
    )


def within(values: np.ndarray, low: int, high: int, name: str) -> np.ndarray:
    """Clip values to a range; NaN becomes its lower end.

    Raises:
        ImageError: a share of more than `OUTSIDE` of the values is outside the range.
    """
    if np.count_nonzero((values < low) | (values > high)) > OUTSIDE * values.size:
        raise ImageError(
            f"{name} has values from {np.nanmin(values):g} to {np.nanmax(values):g}; "
            f"{'floating-point' if high == 1 else 'integer'} pixels go from {low} to {high}: scale them to that",
            "not within the range of pixels",
        )
    return np.clip(np.nan_to_num(values, nan=low), low, high)
