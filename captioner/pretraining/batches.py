"""The batches of pretraining: views, with the targets that teachers, class labels and captions give for them.

Letters: B views, K classes, V caption words, F features, S side of a view in pixels.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from timm.data.mixup import Mixup, mixup_target

from captioner.data.readers import read_captions
from captioner.errors import SettingError
from captioner.pretraining.config import PretrainConfig
from captioner.pretraining.image_store import Source, open_source, stamp_images, store_images
from captioner.pretraining.targets import Targets, TargetStore
from captioner.pretraining.teachers import WEIGHTS, Teacher
from captioner.pretraining.views import ViewOrder, cut_views, draw_views
from captioner.pretraining.words import CaptionWords, TeacherWords, describe
from captioner.runs.digests import digest_bytes, digest_text
from captioner.runs.progress import progress_bar

WORD_VIEWS = 4
"""Views of each captioned image on which the regression of words is fitted, where a run draws new views each time."""


def run_at(teacher: Teacher, pixels: torch.Tensor, places: torch.Tensor) -> Targets:
    """Run a teacher on some of the views (B, 3, S, S): those at the places (b,) in the batch."""
    return teacher(pixels[places.to(pixels.device)])


class Batches:
    """Makes batches of views with their targets: teachers' outputs, class labels, caption words.

    Attributes:
        store: the images.
        words: caption words of the captioned images, which are the first images in the store; None without captions.
        teacher_words: the regression that predicts the words of any view; None unless words come from teachers.
        shapes: shapes of each teacher's outputs, without the batch.

    Raises:
        ValueError: no image can be opened, or no image has the classes or words to learn.
        OSError: the disk is full.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator, teachers: list[Teacher]):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        folder = config.store or config.output / "store"
        sources: list[Source] = []
        self.words: CaptionWords | None = None
        self.word_targets = torch.empty(0)  # of the captioned images (n, V)
        if config.captions is not None:
            table = read_captions(config.captions, config.captions_split)
            self.words = CaptionWords(table["captions"][:], config.num_words)
            if config.word_weight > 0 and not self.words.words:
                raise SettingError(
                    f"the captions of '{config.captions}' have no words of a-z", "word_weight", "captions"
                )
            self.word_targets = torch.from_numpy(self.words.targets).to(self.device)
            name, images = f"{config.captions} {config.captions_split}", table["image"][:]
            stamp = digest_text(f"{stamp_images(images)} {table['image_id'][:]}")
            sources.append(Source(name, [(image, None) for image in images], stamp))
        sources += [open_source(name) for name in config.images]
        with accelerator.main_process_first():  # the other processes then find the images decoded
            self.store = store_images(sources, config.store_size, folder, config.workers).to(self.device)
        if config.label_weight > 0 and not self.store.classes:
            raise SettingError(
                "class labels have a weight, but no image has a class: neither a folder per class nor a column `label`",
                "label_weight",
            )
        repeats = [config.captions_repeat if config.captions and i == 0 else 1 for i in range(len(sources))]
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
        self.teacher_words = None
        if self.words is not None and config.word_weight > 0 and config.words_from == "teachers":
            sizes = describe(outputs).shape[1], len(self.words.words)
            self.teacher_words = TeacherWords(self.captioned_views(), *sizes, self.sum_processes).to(self.device)
            accelerator.print(f"caption words: teachers explain {self.teacher_words.explained:.3f} of their variance")
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

    def settings(self) -> dict:
        """Return the settings that a resumed run cannot change: images, words, teachers."""
        settings = {"digest of the images": self.store.stamp, "teachers": len(self.teachers)}
        if self.words is not None:
            settings["digest of the captions' words"] = digest_bytes(self.words.targets.tobytes())
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
        words = self.word_shares(index.to(self.device), targets)
        return {"pixels": pixels, "targets": targets, "labels": labels, "words": words}

    def word_shares(self, rows: torch.Tensor, targets: list[Targets]) -> torch.Tensor | None:
        """Return the share of captions that contain each word (B, V), for the images in these rows; NaN if unknown."""
        if self.words is None:
            return None
        captioned = len(self.word_targets)
        if self.teacher_words is not None:
            return self.teacher_words.predict(rows, describe(targets), captioned)
        words = self.word_targets[rows.clamp(max=captioned - 1)]  # (B, V)
        return words.masked_fill((rows >= captioned)[:, None], float("nan"))

    def captioned_views(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield the views of captioned images of this process: rows (B,), features (B, F), shares of words (B, V)."""
        known = np.flatnonzero(self.store.usable[: len(self.word_targets)])
        count = self.config.views or WORD_VIEWS
        rows, versions = np.tile(known, count), np.repeat(np.arange(count), len(known))
        mine = np.arange(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        parts = np.split(mine, range(self.config.batch_size, len(mine), self.config.batch_size))
        parts = [part for part in parts if len(part)]
        for part in progress_bar(parts, desc="words", unit="batch", disable=not self.accelerator.is_main_process):
            pixels = self.cut(rows[part], versions[part])
            targets = self.teacher_targets(pixels, rows[part], versions[part])
            index = torch.from_numpy(rows[part])
            yield index, describe(targets).cpu(), self.word_targets[index.to(self.device)].cpu()

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
