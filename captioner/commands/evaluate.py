"""`captioner evaluate`: caption a split with every process, write the captions, then score them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.data.config import TokenSourceConfig
from captioner.errors import SettingError, check_positive
from captioner.grids import parse_grid
from captioner.metrics.objects import ObjectConfig

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

    from captioner.data.batches import Images
    from captioner.inference import Captioner
    from captioner.metrics import Scores


@dataclass(frozen=True)
class EvaluateConfig:
    """Caption a split on every process, write the captions, and score them."""

    model: str | None = None
    """Folder or hub id of the captioner; `None` or `shipped` for the one that comes with this package."""
    data: TokenSourceConfig = field(default_factory=TokenSourceConfig)
    split: str = "test"
    """Split to caption."""
    output: Path = Path("runs/evaluate")
    """Folder of `results.json` (COCO's results format) and `scores.json`, or of a folder with both for each of several
    data sets. Only the same evaluation may replace them."""
    overwrite: bool = False
    """Replace the results of an evaluation with other settings, too."""
    batch_size: int = 32
    """Images per batch and process."""
    grid: str | None = None
    """Compressed grid such as `7x7`; `None` for the model's own."""
    num_beams: int = 3
    """Beams of the search."""
    max_new_tokens: int = 24
    """Longest caption in tokens."""
    tags: int | None = None
    """Most object tags that the model predicts in an image and reads before its caption, 0 for none (the tag-blind
    scores); `None` for the model's own number."""
    min_tag: float | None = None
    """Least probability of a predicted tag, from 0 to 1; `None` for the model's own."""
    show_tags: bool = False
    """Write the tags of each image into `results.json`, too."""
    limit: int | None = None
    """Number of images of each data set to caption, from the first on; `None` for all."""
    spice: Path | None = None
    """Folder with SPICE's models. Without it, SPICE is not computed."""
    objects: ObjectConfig = field(default_factory=ObjectConfig)

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "num_beams", "max_new_tokens", "limit")
        parse_grid(self.grid)
        if self.tags is not None and self.tags < 0:
            raise SettingError(f"tags must be at least 0, not {self.tags}", "tags")
        if self.min_tag is not None and not 0 <= self.min_tag <= 1:
            raise SettingError(f"min_tag must be a share between 0 and 1, not {self.min_tag}", "min_tag")

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others to the reason."""
        return {f"objects.{name}": why for name, why in self.objects.unused().items()}


SETTINGS = EvaluateConfig


def run(config: EvaluateConfig) -> int:
    """Evaluate, and return the exit code: 1 if an image could not be opened."""
    return 1 if evaluate_split(config)[1] else 0


def evaluate(config: EvaluateConfig) -> "Scores | dict[str, Scores] | None":
    """Run the evaluation job, and return the scores; `None` in all processes but the main one. See `evaluate_split`."""
    return evaluate_split(config)[0]


def evaluate_split(config: EvaluateConfig) -> tuple["Scores | dict[str, Scores] | None", int]:
    """Run the evaluation job.

    Returns:
        The scores, which are `None` in all processes but the main one, and for several data sets a dictionary by name
        of the set; and the number of images that could not be opened.

    The scores of several data sets are in a dictionary by name of the set.

    Raises:
        ValueError: there are no data, the folder holds no captioner, the token cache is of another model, or `output`
            holds the results of another evaluation.
        OSError: a file is missing, such as SPICE's models.
    """
    from captioner.data.batches import open_sets
    from captioner.data.sets import open_caches, read_sets, set_names
    from captioner.image_tags import make_choice
    from captioner.inference import load
    from captioner.metrics.java import spice_models
    from captioner.runs.files import check_folder
    from captioner.runs.processes import start_processes

    if config.spice:
        spice_models(config.spice)
    accelerator = start_processes()
    check_folder(config.output)
    names = set_names(config.data.root)
    folders = [config.output / name for name in names] if len(names) > 1 else [config.output]
    check_output(config, folders)
    tables = [table for table in read_sets(config.data, config.split) if table is not None]
    if config.limit is not None:
        tables = [table.select(range(min(config.limit, len(table)))) for table in tables]
    captioner = load(config.model, str(accelerator.device))
    make_choice(config.tags, config.min_tag).check(captioner.model)
    grid = parse_grid(config.grid)
    caches = open_caches(config.data.tokens, captioner.model, captioner.processor, grid)
    images = open_sets(dict(enumerate(tables)), captioner.processor, caches)
    scores: dict[str, Scores] = {}
    failed = 0
    for name, table, own, folder in zip(names, tables, images, folders, strict=True):
        if len(names) > 1:
            accelerator.print(f"{name}:")
        found, count = evaluate_set(accelerator, captioner, table, own, folder, config)
        failed += count
        if found is not None:
            scores[name] = found
    accelerator.end_training()
    return (scores if len(names) > 1 else scores[names[0]]) if scores else None, failed


def evaluate_set(
    accelerator: "Accelerator",
    captioner: "Captioner",
    table: "datasets.Dataset",
    images: "Images",
    folder: Path,
    config: EvaluateConfig,
) -> tuple["Scores | None", int]:
    """Caption and score one data set; see `evaluate_split`.

    Args:
        accelerator: accelerator of the processes.
        captioner: the captioner.
        table: the images.
        images: source of the images.
        folder: folder of the results.
        config: the evaluation.
    """
    from captioner.evaluation import caption_split, count_failed, file_names, score_results, write_results
    from captioner.image_tags import make_choice
    from captioner.metrics import METRICS
    from captioner.metrics.objects import open_objects
    from captioner.runs.config import save_config
    from captioner.runs.files import open_whole

    objects = open_objects(config.objects, file_names(table), required=len(config.data.root) == 1)
    results = caption_split(
        accelerator,
        captioner.model,
        captioner.processor,
        table,
        batch_size=config.batch_size,
        grid=parse_grid(config.grid),
        workers=config.data.workers,
        images=images,
        tags=make_choice(config.tags, config.min_tag),
        show_tags=config.show_tags,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    scores = None
    if accelerator.is_main_process:
        save_config(replace(config, overwrite=False), config.output)
        path = write_results(results, folder / "results.json")
        accelerator.print(f"{len(results)} captions written to {path}")
        metrics = (*METRICS, "SPICE") if config.spice else METRICS
        scores = score_results(results, table, metrics=metrics, objects=objects, spice_models=config.spice)
        with open_whole(folder / "scores.json") as file:
            json.dump(scores.to_dict(), file, indent=1)
        accelerator.print(scores)
    return scores, count_failed(results)


def check_output(config: EvaluateConfig, folders: Sequence[Path]) -> None:
    """Refuse to replace files of another evaluation, or of a training run, unless `overwrite` is set.

    Args:
        config: the evaluation.
        folders: folders of the results.

    Raises:
        SettingError: there are such files.
    """
    from captioner.runs.config import config_text

    saved = config.output / "run_config.json"
    results = [folder / name for folder in folders for name in ("results.json", "scores.json")]
    found = [str(path.relative_to(config.output)) for path in (saved, *results) if path.exists()]
    if config.overwrite or not found:
        return
    if not saved.exists() or saved.read_text() != config_text(replace(config, overwrite=False)):
        fact = f"'{config.output}' holds {' and '.join(found)} of a run with other settings, which this would replace"
        raise SettingError(fact, "output", "overwrite")
