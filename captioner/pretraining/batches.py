"""The batches of pretraining: views, with the targets that teachers, class labels and captions give for them.

Letters: B views, K classes, V caption words, F features, S side of a view in pixels.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data.mixup import Mixup, mixup_target

from captioner.data.label_files import read_labels
from captioner.data.readers import read_captions
from captioner.errors import SettingError
from captioner.metrics.files import read_references
from captioner.pretraining.config import PretrainConfig
from captioner.pretraining.described import DescribedImages, Examples, label_images
from captioner.pretraining.image_store import Source, file_name, file_path, open_source, stamp_images, store_images
from captioner.pretraining.regression import describe
from captioner.pretraining.targets import Targets, TargetStore
from captioner.pretraining.teachers import WEIGHTS, Teacher
from captioner.pretraining.views import ViewOrder, cut_views, draw_views
from captioner.pretraining.words import CaptionWords
from captioner.runs.digests import digest_text
from captioner.runs.progress import progress_bar

FITTED_VIEWS = 4
"""Views of each described image on which a regression is fitted, where a run draws new views each time."""


def run_at(teacher: Teacher, pixels: torch.Tensor, places: torch.Tensor) -> Targets:
    """Run a teacher on some of the views (B, 3, S, S): those at the places (b,) in the batch."""
    return teacher(pixels[places.to(pixels.device)])


class Batches:
    """Makes batches of views with their targets: teachers' outputs, class labels, caption words, tags.

    Attributes:
        store: the images.
        words: words of the captions, which the first images in the store have; None without captions.
        tags: labels of a label file; None without one.
        shapes: shapes of each teacher's outputs, without the batch.

    Raises:
        ValueError: no image can be opened, or no image has the classes or words to learn.
        OSError: the disk is full.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator, teachers: list[Teacher]):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        folder = config.store or config.output / "store"
        held_out = read_held_out(config.held_out)
        captions: list[list[str]] = []
        sources: list[Source] = []
        captioned: set[str] = set()  # image files, which other sources may name again
        for name in config.captions:
            table = read_captions(name, config.captions_split)
            images, groups = table["image"][:], table["captions"][:]
            stamp = digest_text(f"{stamp_images(images)} {table['image_id'][:]}")
            kept = [n for n, image in enumerate(images) if file_name(image) not in held_out]
            captions += [groups[n] for n in kept]
            captioned |= {file_path(images[n]) for n in kept} - {""}
            source = Source(f"{name} {config.captions_split}", [(images[n], None) for n in kept], stamp)
            sources.append(source.without(held_out))
        sources += [open_source(name).without(held_out, frozenset(captioned)) for name in config.images]
        with accelerator.main_process_first():  # the others find them decoded
            self.store = store_images(sources, config.store_size, folder, config.workers).to(self.device)
        if config.label_weight > 0 and not self.store.classes:
            raise SettingError(
                "class labels have a weight, but no image has a class: neither a folder per class nor a column `label`",
                "label_weight",
            )
        repeats = [config.captions_repeat if i < len(config.captions) else 1 for i in range(len(sources))]
        groups = [np.arange(r.start, r.stop)[self.store.usable[r.start : r.stop]] for r in self.store.ranges]
        self.order = ViewOrder(groups, repeats, config.seed, config.views)

        self.teachers = teachers
        example = torch.zeros(2, 3, config.image_size, config.image_size, device=self.device)
        outputs = [teacher(example) for teacher in teachers]
        self.shapes = [{k: tuple(v.shape[1:]) for k, v in targets.items()} for targets in outputs]
        self.target_stores: list[TargetStore] = []
        if config.views is not None:
            with accelerator.main_process_first():  # one process creates the files
                folders = [folder / f"teacher_{number + 1}" for number in range(len(teachers))]
                self.target_stores = [self.open_targets(n, place, config.views) for n, place in enumerate(folders)]
        self.words = self.describe_by_words(captions).to(self.device) if captions else None
        self.tags = None
        if config.tags is not None:
            labels = read_labels(config.tags)
            self.tags = label_images(labels, self.store.names, self.store.usable).to(self.device)
        features = describe(outputs).shape[1] if teachers else 0
        for what, described, weight, origin in (
            ("caption words", self.words, config.word_weight, config.words_from),
            ("tags", self.tags, config.tag_weight, config.tags_from),
        ):
            if described is not None and weight > 0 and origin == "teachers":
                explained = described.fit(self.views_of(described), features, self.sum_processes)
                accelerator.print(f"{what}: teachers explain {explained:.3f} of their variance")
        kinds = len(self.store.classes)
        self.mixup = None
        if config.mixup or config.cutmix:
            options = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix}
            self.mixup = Mixup(**options, label_smoothing=config.label_smoothing, num_classes=kinds)

    def open_targets(self, number: int, folder: Path, versions: int) -> TargetStore:
        """Open the store of a teacher's outputs.

        Args:
            number: number of the teacher.
            folder: folder of the store.
            versions: distinct views of each image.
        """
        config = self.config
        view = (config.seed, config.image_size, config.min_crop, self.store.stamp)
        stamp = f"{view} {self.teachers[number].stamp}"
        return TargetStore(folder, stamp, len(self.store), versions, self.shapes[number])

    def describe_by_words(self, captions: list[list[str]]) -> DescribedImages:
        """Return the words of the captions of the first images in the store.

        Raises:
            SettingError: they have no words, which are to be learned.
        """
        words = CaptionWords(captions, self.config.num_words)
        if self.config.word_weight > 0 and not words.words:
            sets = ", ".join(f"'{name}'" for name in self.config.captions)
            raise SettingError(f"the captions of {sets} have no words of a-z", "word_weight", "captions")
        return DescribedImages(words.words, np.arange(len(captions)), words.targets, len(self.store))

    def settings(self) -> dict:
        """Return the settings that a resumed run cannot change: images, words, tags, teachers."""
        settings: dict[str, Any] = {"digest of the images": self.store.stamp, "teachers": len(self.teachers)}
        if self.words is not None:
            settings["digest of the captions' words"] = self.words.digest
        if self.tags is not None:
            settings["digest of the tags"] = self.tags.digest
        for number, teacher in enumerate(self.teachers):
            weights = {name: getattr(teacher.config, name) for name in WEIGHTS}
            settings |= {f"digest of teachers.{number}": teacher.stamp, f"weights of teachers.{number}": weights}
        return settings

    def batch(self, position: int) -> dict:
        """Return the B views from a position of the run on, and their targets: the arguments of `Student.forward`."""
        config = self.config
        rows, versions = self.order.views(position, config.batch_size)
        index = torch.from_numpy(rows)
        pixels = self.cut(rows, versions)  # (B, 3, S, S)
        labels = None
        if config.label_weight > 0:
            pixels, labels = self.soft_labels(pixels, self.store.labels[index].to(self.device))
        targets = self.teacher_targets(pixels, rows, versions)
        features = cache(partial(describe, targets))
        index = index.to(self.device)
        words = self.words.expected(index, features) if self.words is not None else None
        tags = self.tags.expected(index, features) if self.tags is not None else None
        return {"pixels": pixels, "targets": targets, "labels": labels, "words": words, "tags": tags}

    def views_of(self, described: DescribedImages) -> Examples:
        """Yield this process's views of described images: rows (B,), features (B, F), targets (B, V)."""
        known = described.rows[self.store.usable[described.rows]]
        count = self.config.views or FITTED_VIEWS
        rows, versions = np.tile(known, count), np.repeat(np.arange(count), len(known))
        mine = np.arange(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        parts = np.split(mine, range(self.config.batch_size, len(mine), self.config.batch_size))
        parts = [part for part in parts if len(part)]
        for part in progress_bar(parts, desc="teachers", unit="batch", disable=not self.accelerator.is_main_process):
            pixels = self.cut(rows[part], versions[part])
            targets = self.teacher_targets(pixels, rows[part], versions[part])
            index = torch.from_numpy(rows[part])
            yield index, describe(targets).cpu(), described.of(index.to(self.device)).cpu()

    def sum_processes(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.device)).cpu()

    def cut(self, rows: np.ndarray, versions: np.ndarray) -> torch.Tensor:
        """Return the pixels (B, 3, S, S) of views, in [0, 1]."""
        config = self.config
        views = draw_views(config.seed, rows, versions, config.min_crop)
        return cut_views(self.store.batch(torch.from_numpy(rows), self.device), views, config.image_size)

    def teacher_targets(self, pixels: torch.Tensor, rows: np.ndarray, versions: np.ndarray) -> list[Targets]:
        """Return the outputs of each teacher for views; those that were computed before are read from disk."""
        found = []
        for number, teacher in enumerate(self.teachers):
            with self.accelerator.autocast():
                if not self.target_stores:
                    found.append(teacher(pixels))
                    continue
                store = self.target_stores[number]
                targets = store.get(rows, versions, partial(run_at, teacher, pixels))
            found.append({name: value.to(self.device, non_blocking=True) for name, value in targets.items()})
        return found

    def soft_labels(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn class labels (B,) into probabilities (B, K), smoothed and mixed; rows without a label are zero."""
        known = labels >= 0
        labels = labels.clamp(min=0)
        if self.mixup is None:
            soft = mixup_target(labels, len(self.store.classes), 1.0, self.config.label_smoothing)
        else:
            pixels, soft = self.mixup(pixels, labels)
            known = known & known.flip(0)  # a view is mixed with its opposite in the batch
        return pixels, soft * known[:, None]


def read_held_out(paths: Sequence[Path]) -> frozenset[str]:
    """Return the names of the image files that annotation files list.

    Raises:
        ValueError: a file is no annotation file.
        OSError: it cannot be read.
    """
    return frozenset(Path(name).name for path in paths for name in read_references(path).files.values())
