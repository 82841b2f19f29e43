"""Settings of a run, as they are saved beside its results. Imports nothing heavy."""

import dataclasses
import json
from pathlib import Path


def save_config(config, folder: Path) -> None:
    """Write the resolved config of a run to `folder/run_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_config.json").write_text(config_text(config))


def config_text(config) -> str:
    """Return a config as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
