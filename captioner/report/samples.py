"""Sample captions beside their images, at each validation: one HTML page that needs nothing else."""

import base64
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageOps

from captioner.images import ImageError, open_image

if TYPE_CHECKING:
    import datasets

COUNT, SIDE = 12, 224
"""Images on a page, and the side of each in pixels."""

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px sans-serif;margin:2em;max-width:80em}} li{{color:#666}} .caption{{font-weight:bold}}
.samples{{display:grid;grid-template-columns:repeat(auto-fill,minmax(15em,1fr));gap:2em}} ul{{padding-left:1.2em}}
</style><h1>{title}</h1><p>{scores}</p><div class="samples">{samples}</div></html>
"""


def write_samples(
    accelerator: Accelerator, table: "datasets.Dataset", results: list[dict], record: dict, folder: Path
) -> None:
    """Write `folder/step_00001200.html`, and show the images to trackers that can; the main process calls this.

    Args:
        table: the validation images.
        results: their captions, in the table's order.
        record: `step` and scores of the validation.
    """
    folder.mkdir(exist_ok=True)
    step, cells, images = record["step"], [], []
    for row in np.linspace(0, len(table) - 1, min(COUNT, len(table))).astype(int).tolist():
        entry, caption = table[row], results[row]["caption"]
        try:
            image = ImageOps.contain(open_image(entry["image"]), (SIDE, SIDE))
        except ImageError:
            image = Image.new("RGB", (SIDE, SIDE), "lightgrey")
        images.append(np.asarray(ImageOps.pad(image, (SIDE, SIDE))))
        references = "".join(f"<li>{escape(text)}</li>" for text in entry["captions"])
        cells.append(f'<div>{embed(image)}<p class="caption">{escape(caption)}</p><ul>{references}</ul></div>')
    scores = ", ".join(f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float))
    page = PAGE.format(title=f"Samples at step {step}", scores=escape(scores), samples="".join(cells))
    (folder / f"step_{step:08d}.html").write_text(page, encoding="utf-8")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.stack(images)}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": images}, step=step)


def embed(image: Image.Image) -> str:
    """Encode an image into an HTML tag of its own."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
