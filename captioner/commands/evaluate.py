"""`captioner evaluate`: caption a split with every process, write the captions, then score them."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.data.config import TokenSourceConfig
from captioner.errors import SettingError, check_positive
from captioner.grids import parse_grid
from captioner.metrics.objects import ObjectConfig

if TYPE_CHECKING:
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
    """Folder of `results.json` (COCO's results format) and `scores.json`. Only the same evaluation may replace them."""
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
    """Number of images to caption, from the first on; `None` for all."""
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


def evaluate(config: EvaluateConfig) -> "Scores | None":
    """Run the evaluation job, and return the scores; `None` in all processes but the main one. See `evaluate_split`."""
    return evaluate_split(config)[0]


def evaluate_split(config: EvaluateConfig) -> tuple["Scores | None", int]:
    """Run the evaluation job.

    Returns:
        The scores, which are `None` in all processes but the main one; and the number of images that could not be
        opened.

    Raises:
        ValueError: there are no data, the folder holds no captioner, the token cache is of another model, or `output`
            holds the results of another evaluation.
        OSError: a file is missing, such as SPICE's models.
    """
    from captioner.data.batches import open_images
    from captioner.data.readers import read_split
    from captioner.data.token_cache import open_cache
    from captioner.evaluation import caption_split, count_failed, file_names, score_results, write_results
    from captioner.image_tags import make_choice
    from captioner.inference import load
    from captioner.metrics import METRICS
    from captioner.metrics.java import spice_models
    from captioner.metrics.objects import open_objects
    from captioner.runs.config import save_config
    from captioner.runs.files import check_folder, open_whole
    from captioner.runs.processes import start_processes

    if config.spice:
        spice_models(config.spice)
    accelerator = start_processes()
    check_folder(config.output)
    check_output(config)
    table = read_split(config.data, config.split)
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    objects = open_objects(config.objects, file_names(table))
    captioner = load(config.model, str(accelerator.device))
    choice = make_choice(config.tags, config.min_tag)
    choice.check(captioner.model)
    grid = parse_grid(config.grid)
    cache = open_cache(config.data.tokens, captioner.model, captioner.processor, grid)
    results = caption_split(
        accelerator,
        captioner.model,
        captioner.processor,
        table,
        batch_size=config.batch_size,
        grid=grid,
        workers=config.data.workers,
        images=open_images(table, captioner.processor, cache),
        tags=choice,
        show_tags=config.show_tags,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    scores = None
    if accelerator.is_main_process:
        save_config(replace(config, overwrite=False), config.output)
        path = write_results(results, config.output / "results.json")
        accelerator.print(f"{len(results)} captions written to {path}")
        metrics = (*METRICS, "SPICE") if config.spice else METRICS
        scores = score_results(results, table, metrics=metrics, objects=objects, spice_models=config.spice)
        with open_whole(config.output / "scores.json") as file:
            json.dump(scores.to_dict(), file, indent=1)
        accelerator.print(scores)
    accelerator.end_training()
    return scores, count_failed(results)


def check_output(config: EvaluateConfig) -> None:
    """Refuse to replace files of another evaluation, or of a training run, unless `overwrite` is set.

    Raises:
        SettingError: there are such files.
    """
    from captioner.runs.config import config_text

    saved = config.output / "run_config.json"
    found = [name for name in (saved.name, "results.json", "scores.json") if (config.output / name).exists()]
    if config.overwrite or not found:
        return
    if not saved.exists() or saved.read_text() != config_text(replace(config, overwrite=False)):
        fact = f"'{config.output}' holds {' and '.join(found)} of a run with other settings, which this would replace"
        raise SettingError(fact, "output", "overwrite")
