"""What each pretraining step learns from: views, with all that teachers, class labels and captions say of them.

Letters: B views, K classes, V caption words, S side of a view in pixels.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from timm.data.mixup import Mixup, mixup_target

from captioner.data.readers import read_captions
from captioner.pretraining.config import PretrainConfig
from captioner.pretraining.image_store import Source, open_source, stamp_images, store_images
from captioner.pretraining.targets import Targets, TargetStore
from captioner.pretraining.teachers import WEIGHTS, Teacher
from captioner.pretraining.views import ViewOrder, cut_views, draw_views
from captioner.pretraining.words import CaptionWords, TeacherWords, describe
from captioner.runs.progress import progress_bar

WORD_VIEWS = 4
"""Views of a captioned image that the words are fitted on, where a run draws fresh ones every time."""


class Batches:
    """Views with everything that is known about them: teachers' outputs, class labels, caption words.

    Attributes:
        store: the images.
        words: caption words of the first images in the store, if there are captions.
        teacher_words: what tells the words of any view, if it is teachers that do.
        shapes: shapes of each teacher's outputs.

    Raises:
        ValueError: no image can be opened, or none with the classes or words to learn.
        OSError: the disk is full.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator, teachers: list[Teacher]):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        folder = config.store or config.output / "store"
        sources, self.words, self.word_targets = [], None, None
        if config.captions is not None:
            table = read_captions(config.captions, config.captions_split)
            self.words = CaptionWords(table["captions"][:], config.num_words)
            if config.word_weight > 0 and not self.words.words:
                raise ValueError(f"the captions of '{config.captions}' have no words of a-z: give --word-weight 0")
            self.word_targets = torch.from_numpy(self.words.targets).to(self.device)
            name, images = f"{config.captions} {config.captions_split}", table["image"][:]
            stamp = f"{stamp_images(images)} {table['image_id'][:]}"
            sources.append(Source(name, [(image, None) for image in images], stamp))
        sources += [open_source(name) for name in config.images]
        with accelerator.main_process_first():  # the others find them decoded
            self.store = store_images(sources, config.store_size, folder, config.workers).to(self.device)
        if config.label_weight > 0 and not self.store.classes:
            raise ValueError("no image has a class: give folders per class or a `label` column, or --label-weight 0")
        repeats = [config.captions_repeat if config.captions and i == 0 else 1 for i in range(len(sources))]
        groups = [np.arange(r.start, r.stop)[self.store.usable[r.start : r.stop]] for r in self.store.ranges]
        self.order = ViewOrder(groups, repeats, config.seed, config.views)

        self.teachers = teachers
        example = torch.zeros(2, 3, config.image_size, config.image_size, device=self.device)
        said = [teacher(example) for teacher in teachers]
        self.shapes = [{k: tuple(v.shape[1:]) for k, v in targets.items()} for targets in said]
        self.kept: list[TargetStore] = []
        if config.views is not None:
            with accelerator.main_process_first():  # one lays the files out
                self.kept = [self.keep(number, folder / f"teacher_{number + 1}") for number in range(len(teachers))]
        self.teacher_words = None
        if self.words is not None and config.word_weight > 0 and config.words_from == "teachers":
            sizes = describe(said).shape[1], len(self.words.words)
            self.teacher_words = TeacherWords(self.captioned_views(), *sizes, self.add_up).to(self.device)
            accelerator.print(f"caption words: teachers explain {self.teacher_words.explained:.3f} of their variance")
        kinds = len(self.store.classes)
        self.mixup = None
        if config.mixup or config.cutmix:
            options = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix}
            self.mixup = Mixup(**options, label_smoothing=config.label_smoothing, num_classes=kinds)

    def keep(self, number: int, folder: Path) -> TargetStore:
        """Open the store of what a teacher says about the views."""
        config = self.config
        view = (config.seed, config.image_size, config.min_crop, self.store.stamp)
        stamp = f"{view} {self.teachers[number].stamp}"
        return TargetStore(folder, stamp, len(self.store), config.views, self.shapes[number])

    def settings(self) -> dict:
        """Return what of this a resumed run cannot change: images, words, teachers."""
        settings = {"images": f"{len(self.store)} of digest {self.store.stamp[:16]}", "teachers": len(self.teachers)}
        if self.words is not None:
            digest = hashlib.sha256(self.words.targets.tobytes()).hexdigest()
            settings["caption words"] = f"{len(self.words.words)} of digest {digest[:16]}"
        for number, teacher in enumerate(self.teachers):
            weights = {name: getattr(teacher.config, name) for name in WEIGHTS}
            settings |= {f"teachers.{number}": teacher.stamp, f"weights of teachers.{number}": weights}
        return settings

    def batch(self, position: int) -> dict:
        """Return the views from a position of the run on, as `Student.forward` wants them."""
        config = self.config
        rows, versions = self.order.views(position, config.batch_size)
        index = torch.from_numpy(rows)
        pixels = self.cut(rows, versions)  # (B, 3, S, S)
        labels = None
        if config.label_weight > 0:
            pixels, labels = self.soft_labels(pixels, self.store.labels[index].to(self.device))
        targets = [self.ask(number, pixels, rows, versions) for number in range(len(self.teachers))]
        words = self.look_up_words(index.to(self.device), targets)
        return {"pixels": pixels, "targets": targets, "labels": labels, "words": words}

    def look_up_words(self, rows: torch.Tensor, targets: list[Targets]) -> torch.Tensor | None:
        """Return the words (B, V) of the images in these rows, as captions or teachers have them; NaN if unknown."""
        if self.word_targets is None:
            return None
        captioned = len(self.word_targets)
        if self.teacher_words is not None:
            return self.teacher_words.tell(rows, describe(targets), captioned)
        words = self.word_targets[rows.clamp(max=captioned - 1)]  # (B, V)
        return words.masked_fill((rows >= captioned)[:, None], float("nan"))

    def captioned_views(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Show this process's views of the captioned images to the teachers: rows, features (B, F), words (B, V)."""
        known = np.flatnonzero(self.store.usable[: len(self.word_targets)])
        count = self.config.views or WORD_VIEWS
        rows, versions = np.tile(known, count), np.repeat(np.arange(count), len(known))
        mine = np.arange(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        parts = np.split(mine, range(self.config.batch_size, len(mine), self.config.batch_size))
        parts = [part for part in parts if len(part)]
        for part in progress_bar(parts, desc="words", unit="batch", disable=not self.accelerator.is_main_process):
            pixels = self.cut(rows[part], versions[part])
            targets = [self.ask(number, pixels, rows[part], versions[part]) for number in range(len(self.teachers))]
            index = torch.from_numpy(rows[part])
            yield index, describe(targets).cpu(), self.word_targets[index.to(self.device)].cpu()

    def add_up(self, value: torch.Tensor) -> torch.Tensor:
        """Add up what each process has of a tensor."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.device)).cpu()

    def cut(self, rows: np.ndarray, versions: np.ndarray) -> torch.Tensor:
        """Return pixels (B, 3, S, S) in [0, 1] of views."""
        config = self.config
        views = draw_views(config.seed, rows, versions, config.min_crop)
        return cut_views(self.store.batch(torch.from_numpy(rows), self.device), views, config.image_size)

    def ask(self, number: int, pixels: torch.Tensor, rows: np.ndarray, versions: np.ndarray) -> Targets:
        """Return what a teacher says about views, from disk where it has been asked before."""
        teacher = self.teachers[number]
        with self.accelerator.autocast():
            if not self.kept:
                return teacher(pixels)
            targets = self.kept[number].get(rows, versions, lambda places: teacher(pixels[places.to(pixels.device)]))
        return {name: value.to(self.device, non_blocking=True) for name, value in targets.items()}

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
