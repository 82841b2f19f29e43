"""Record what made an output in a small JSON file beside it, so that no other model, grid or search continues it."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from captioner.errors import SettingError
from captioner.images.names import escape_name
from captioner.runs.files import open_whole

FREE = ("captioner", "model")
"""Entries that may differ: the release of this package, and the name of the model, whose weights are compared."""


def settings_file(output: Path) -> Path:
    """Return the place of the settings of an output: `captions.jsonl.settings.json`."""
    return output.with_name(f"{output.name}.settings.json")


def write_settings(output: Path, made_by: Mapping[str, Any]) -> None:
    """Write the settings that make an output beside it.

    Raises:
        SettingError: the file cannot be written.
    """
    path = settings_file(output)
    try:
        with open_whole(path) as file:
            json.dump({"captioner": version("captioner"), **made_by}, file, indent=1)
            file.write("\n")
    except OSError as error:
        raise SettingError(f"cannot write '{escape_name(str(path))}': {error.strerror}", "output") from None


def read_settings(output: Path) -> dict[str, Any] | None:
    """Read the settings that made an output; `None` if there is no file with them.

    Raises:
        SettingError: the file cannot be read, or has other content.
    """
    path = settings_file(output)
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise SettingError(f"cannot read '{escape_name(str(path))}': {reason}", "output") from None
    if not isinstance(content, dict):
        raise SettingError(f"'{escape_name(str(path))}' does not contain settings of an output", "output")
    return content


def check_settings(output: Path, written: Path, made_by: Mapping[str, Any]) -> bool:
    """Refuse to continue an output that was made with other settings.

    Args:
        output: the output, for messages.
        written: the file beside which the settings are.
        made_by: the settings that would continue it.

    Returns:
        Whether there is a file with the settings of the output.

    Raises:
        SettingError: they differ; the message names the first difference.
    """
    before = read_settings(written)
    if before is not None:
        compare_settings(output, before, made_by)
    return before is not None


def compare_settings(output: Path, before: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
    """Compare the settings that made an output with those that would continue it.

    Raises:
        SettingError: they differ; the message names the first difference.
    """
    name = f"'{escape_name(str(output))}'"
    for key in dict.fromkeys([*made_by, *before]):
        old, new = before.get(key), json.loads(json.dumps(made_by.get(key)))
        if key in FREE or old == new:
            continue
        if key == "weights":
            raise SettingError(
                f"{name} was made by the model '{escape_name(str(before.get('model')))}'; this one has other weights "
                "or prepares images differently",
                "model",
                "output",
            )
        raise SettingError(f"{name} was made with {key} {show(old)}, not {show(new)}", key, "output")


def show(value: Any) -> str:
    """Write a value for a message."""
    if value is None or value == "":
        return "none"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
