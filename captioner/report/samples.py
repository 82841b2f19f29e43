"""Sample captions beside their images, at each validation, as an HTML page in one file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageOps

from captioner.images import ImageError, open_image
from captioner.report.html import page_end, page_start, resource
from captioner.report.thumbnails import data_address, thumbnail
from captioner.runs.files import open_whole

if TYPE_CHECKING:
    import datasets

COUNT, SIDE, QUALITY = 12, 224, 80
"""Number of images on a page, longer side of an image in pixels, and its WebP quality."""


def write_samples(
    accelerator: Accelerator,
    sets: Sequence[tuple[str, "datasets.Dataset", list[dict]]],
    record: dict,
    folder: Path,
) -> None:
    """Write `folder/step_00001200.html`, and send the images to trackers that accept images.

    Only the main process calls this.

    Args:
        accelerator: accelerator with the trackers.
        sets: the name of each data set, its validation images, and a caption for each of them, in the table's order.
        record: `step` and the scores of the validation.
        folder: folder of the pages; it is created if it does not exist.

    Raises:
        OSError: the page cannot be written.
    """
    step, images, parts = record["step"], [], []
    for name, table, results in sets:
        cells = []
        for row in np.linspace(0, len(table) - 1, min(COUNT, len(table))).astype(int).tolist():
            entry, caption = table[row], results[row]["caption"]
            try:
                image = open_image(entry["image"])
            except ImageError:
                image = Image.new("RGB", (SIDE, SIDE), "lightgrey")
            images.append(np.asarray(ImageOps.pad(image, (SIDE, SIDE))))
            references = "".join(f"<li>{escape(text)}</li>" for text in entry["captions"])
            shown = f'<img alt="" src="{data_address(thumbnail(image, SIDE, QUALITY))}">'
            cells.append(f'<article>{shown}<p class="text">{escape(caption)}</p><ul>{references}</ul></article>')
        heading = f"<h2>{escape(name)}</h2>\n" if len(sets) > 1 else ""
        parts.append(f'\n{heading}<div class="samples">{"".join(cells)}</div>')
    scores = ", ".join(f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float))
    title = f"Samples at step {step}"
    with open_whole(folder / f"step_{step:08d}.html") as file:
        file.write(page_start(title, resource("page.css")))
        file.write(f"<main>\n<header><h1>{title}</h1>\n<p>{escape(scores)}</p>\n")
        file.write('<p class="note">Each image with the caption that the model wrote, and its references.</p></header>')
        file.write(f"{''.join(parts)}\n</main>\n{page_end()}")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.stack(images)}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": images}, step=step)
