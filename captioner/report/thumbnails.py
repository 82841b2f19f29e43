"""Small copies of images for HTML pages."""

import base64
import io

from PIL import Image


def thumbnail(image: Image.Image, side: int, quality: int) -> str:
    """Encode a small copy of an image as WebP, without metadata.

    Args:
        image: image of mode RGB, as `open_image` returns it; it is not changed.
        side: longer side of the copy in pixels; a smaller image is not enlarged.
        quality: WebP quality, 0 to 100.

    Returns:
        The bytes of the file in base64, for `data_address`.
    """
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode()


def data_address(encoded: str) -> str:
    """Return the data URL of a thumbnail."""
    return f"data:image/webp;base64,{encoded}"
