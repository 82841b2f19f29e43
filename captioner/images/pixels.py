"""From any pixels to 8-bit RGB, by rules that look at the kind of the pixels and never at how bright an image is.

| pixels                                            | become 8 bits by                                              |
|---------------------------------------------------|---------------------------------------------------------------|
| 8 bits, a palette, two levels                     | nothing                                                       |
| 16 bits                                           | 0 is black, 65535 white: `value // 257`                       |
| of a TIFF that declares another depth, such as 12 | 0 is black, the largest number of that depth white            |
| 32-bit integers of a file                         | as 16 bits; below 0 black, above 65535 white                  |
| floating point                                    | 0.0 is black, 1.0 white; below black, above white, NaN black  |

So the same value has the same brightness in every image of a set. The numbers of a 12-bit camera in a file that says
16 bits come out dark: multiply them by 16 before. Where more than a tenth of an image lies outside the range of the
last two rows, the image is refused, since the range cannot be the one that was meant (floats from 0 to 255, say).
"""

from typing import Any, cast

import numpy as np
from PIL import Image, TiffImagePlugin

from captioner.images.sources import ImageError, is_tensor, quote_name

MAX_PIXELS = 128 * 2**20
"""Pixels above which an image is refused as a decompression bomb; a 128-megapixel camera still passes."""

MAX_RATIO = 1000
"""How many times longer than the other one side may be: scaled so that the shorter fits, an image grows by that."""

OUTSIDE = 0.1
"""Share of values outside the range of their kind above which an image is refused."""


def check_size(width: int, height: int, name: str) -> None:
    """Refuse an image without pixels, with more than `MAX_PIXELS`, or with a side over `MAX_RATIO` times the other.

    Raises:
        ImageError: it is of such a size.
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
    """Turn a loaded PIL image of any mode into mode RGB; what is transparent is laid on white.

    Args:
        image: upright or not, it stays as it is turned.
        name: what a message calls the image.

    Raises:
        ImageError: its numbers are not within the range of their kind.
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
    """Tell whether some of an image may be transparent.

    The transparent colour of a 16-bit PNG is given in 16 bits; its pixels are 8 bits here, so that it is left out.
    """
    key = image.info.get("transparency")
    if image.mode in ("RGB", "L", "1") and key is not None:
        numbers = key if isinstance(key, tuple) else (key,)
        return all(isinstance(number, int) and 0 <= number < 256 for number in numbers)
    return image.has_transparency_data


def deep_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Turn a grey image of more than 8 bits into mode RGB, by the rules above."""
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
    """Return the bits of a TIFF's 16-bit values, as it declares them, and whether 0 is white; 16 and no for others."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or not image.mode.startswith("I;16"):
        return 16, False
    bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return (bits if 8 < bits < 16 else 16), white_is_zero


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """Turn CIE L*a*b* into sRGB, which Pillow does only by colour profiles."""
    from PIL import ImageCms

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return cast(Image.Image, ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))


def array_to_rgb(array: Any) -> Image.Image:
    """Turn an array into mode RGB.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the last with an alpha channel; as a torch tensor, which has
            channels first, (H, W), (1, H, W), (3, H, W) or (4, H, W). Of type bool, uint8, uint16 or floating point.

    Raises:
        ImageError: the shape or type is another, there are no pixels or too many, or floats are not within 0 and 1.
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
    """Return values of any kind as uint8, in their shape, by the rules above.

    Args:
        bits: depth of 16-bit values.

    Raises:
        ImageError: an unusual type, or numbers outside the range of their kind.
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
    """Clip values to a range, NaN to its lower end.

    Raises:
        ImageError: more than `OUTSIDE` of them lie outside.
    """
    if np.count_nonzero((values < low) | (values > high)) > OUTSIDE * values.size:
        raise ImageError(
            f"{name} has values from {np.nanmin(values):g} to {np.nanmax(values):g}; "
            f"{'floating-point' if high == 1 else 'integer'} pixels go from {low} to {high}: scale them to that",
            "not within the range of pixels",
        )
    return np.clip(np.nan_to_num(values, nan=low), low, high)
