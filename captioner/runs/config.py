"""Save the settings of a run beside its results. Imports nothing heavy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from captioner.runs.files import open_whole


def save_config(config: Any, folder: Path) -> None:
    """Write a dataclass of settings to `folder/run_config.json`.

    Raises:
        OSError: the disk is full or not writable.
    """
    with open_whole(folder / "run_config.json") as file:
        file.write(config_text(config))


def config_text(config: Any) -> str:
    """Return a dataclass of settings as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
