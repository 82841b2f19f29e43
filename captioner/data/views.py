"""Random views of pictures for pretraining, and the words of captions as labels."""

import glob
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2

from captioner.data.stream import SeededStream
from captioner.images import SUFFIXES, open_image


def list_images(source: str) -> Sequence:
    """List the pictures of a source: a folder (searched through) or parquet files, by a path or a glob.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a parquet file is unreadable or has no column `image`.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"no pictures in the folder '{source}'")
        return found
    files = sorted(glob.glob(source))
    if not files:
        raise FileNotFoundError(f"no images at '{source}': neither a folder nor a file")
    import datasets

    try:
        table = datasets.load_dataset("parquet", data_files=files, split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"'{source}' is not readable parquet: {error}") from None
    if "image" not in table.column_names:
        raise ValueError(f"'{source}' has no column 'image', only {', '.join(table.column_names)}")
    return table.cast_column("image", datasets.Image(decode=False))["image"]


class CaptionWords:
    """The words of captions as labels: for each image, the share of its captions in which a word occurs.

    Predicting them needs no decoder and points an encoder at what people talk about (Joulin et al., ECCV 2016).
    """

    def __init__(self, captions: Sequence[list[str]], size: int):
        per_image = [Counter(w for c in group for w in set(re.findall(r"[a-z]+", c.lower()))) for group in captions]
        frequency = Counter(word for words in per_image for word in words)
        self.words = [word for word, _ in sorted(frequency.items(), key=lambda item: (-item[1], item[0]))[:size]]
        index = {word: i for i, word in enumerate(self.words)}
        self.targets = np.zeros((len(captions), len(self.words)), np.float32)
        for row, (words, group) in enumerate(zip(per_image, captions, strict=True)):
            for word, count in words.items():
                if word in index:
                    self.targets[row, index[word]] = count / len(group)

    @property
    def prior(self) -> np.ndarray:
        """Mean target of each word, (words,)."""
        return self.targets.mean(0)


def random_view(size: int, min_crop: float) -> v2.Transform:
    """Make the random crop, flip and colour change that produce a view (3, size, size)."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(min_crop, 1.0), ratio=(0.8, 1.25), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2),
        ]
    )


class ViewStream(SeededStream):
    """Random views of pictures from several sources.

    Each item holds `pixels` (3, size, size) uint8 and `row`, the row of the picture's word targets or -1.

    Args:
        sources: lists of pictures, as `list_images` returns them.
        size: side of a view in pixels.
        min_crop: least share of the picture's area in a view.
        seed: decides order and views.
        rows: pictures of the first source with word targets; the source may repeat them.
        early_size: side of the first `early_items` views.
        early_items: number of views that come in the early size.
    """

    def __init__(
        self,
        sources: Sequence[Sequence],
        size: int,
        min_crop: float,
        seed: int,
        rows: int = 0,
        early_size: int | None = None,
        early_items: int = 0,
    ):
        super().__init__(sum(len(source) for source in sources), seed)
        self.sources, self.rows, self.early_items = sources, rows, early_items
        self.ends = np.cumsum([len(source) for source in sources])
        self.late, self.early = (random_view(side, min_crop) for side in (size, early_size or size))

    def load(self, number: int, i: int) -> dict:
        """Open picture `number` and cut the view of position i from it."""
        source = int(np.searchsorted(self.ends, number, side="right"))
        place = number - (int(self.ends[source - 1]) if source else 0)
        image = v2.functional.pil_to_tensor(open_image(self.sources[source][place]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.generator(i).integers(2**62)))
            pixels = (self.early if i < self.early_items else self.late)(image)
        return {"pixels": pixels, "row": place % self.rows if self.rows and source == 0 else -1}
