"""Small copies of images that a page can hold."""

import base64
import io

from PIL import Image


def thumbnail(image: Image.Image, side: int, quality: int) -> str:
    """Encode an image anew as WebP, small and without metadata.

    Args:
        image: mode RGB, as `open_image` returns it; it is left as it is.
        side: longer side of the copy in pixels; a smaller image is not enlarged.
        quality: WebP's, 0 to 100.

    Returns:
        The file's bytes in base64, for `data_address`.
    """
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode()


def data_address(encoded: str) -> str:
    """Return the address under which a page shows a thumbnail."""
    return f"data:image/webp;base64,{encoded}"
