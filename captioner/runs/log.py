"""The log of a run: a progress bar, lines on the terminal, `log.jsonl`, and trackers."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from tqdm.auto import tqdm

from captioner.errors import SettingError
from captioner.runs.files import cannot_write, open_whole


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate would ignore with a warning.

    Raises:
        ValueError: accelerate knows no such tracker, or its package is not installed.
    """
    for name in names:
        if name not in LoggerType.list():
            known = ", ".join(sorted(LoggerType.list()))
            raise SettingError(f"no tracker named '{name}'; accelerate has {known}", "trackers")
        if name not in ("all", *map(str, get_available_trackers())):
            raise ValueError(f"the tracker '{name}' needs its package: pip install {name}")


class RunLog:
    """The log of a run. A checkpoint stores its state, so that a resumed run continues it without a gap.

    Args:
        accelerator: its main process writes the log.
        folder: folder of `log.jsonl`, one record per line.
        total: steps of the run.
        every: steps between records; a record holds means over the steps since the last one.
        counted: unit of the run's speed, `tokens` or `images`.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, total: int, every: int, counted: str):
        self.accelerator, self.path, self.total, self.every = accelerator, folder / "log.jsonl", total, every
        self.counted = counted
        self.count: float | torch.Tensor = 0.0
        self.window: dict[str, list[float | torch.Tensor]] = {}
        self.bar = tqdm(total=total, disable=not accelerator.is_main_process or None, desc="training")
        self.shown: dict[str, str] = {}
        self.first: tuple[float, int] | None = None
        self.since = time.monotonic()

    def state(self) -> dict:
        """Return the state for a checkpoint: the number of lines, and the values of the steps since the last line."""
        lines = len(self.path.read_bytes().splitlines()) if self.path.exists() else 0
        window = {name: [float(value) for value in values] for name, values in self.window.items()}
        return {"lines": lines, "window": window}

    def start_over(self) -> None:
        """Delete the lines of a run that was stopped before its first checkpoint: this run repeats those steps."""
        if self.accelerator.is_main_process:
            self.path.unlink(missing_ok=True)

    def load_state(self, state: dict, step: int) -> None:
        """Restore the state of a checkpoint at a step. Later lines are deleted, because the run repeats those steps."""
        self.window = state["window"]
        self.bar.update(step - self.bar.n)
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)[: state["lines"]]
            with open_whole(self.path, "wb") as file:
                file.writelines(lines)

    def step(self, step: int, measured: Mapping[str, float | torch.Tensor], learning_rate: float) -> None:
        """Add the values of a step, and write a record when one is due.

        Scalars on a device stay there until then, so that no step waits for the device.

        Args:
            step: number of the step, from 1.
            measured: the values by name: `loss`, the `counted` unit, and any others.
            learning_rate: learning rate of this step.
        """
        now = time.monotonic()
        if self.first is None:
            self.first = now, step
        self.count += measured[self.counted]
        for name, value in measured.items():
            if name != self.counted:
                self.window.setdefault(name, []).append(value)
        self.bar.update(step - self.bar.n)
        if step % self.every and step != self.total:
            return
        record = {name: float(sum(values) / len(values)) for name, values in self.window.items()}
        speed = f"{self.counted}_per_s"
        record |= {"learning_rate": learning_rate, speed: round(float(self.count) / max(now - self.since, 1e-9), 1)}
        if step > self.first[1]:
            per_step = (now - self.first[0]) / (step - self.first[1])
            record["minutes_left"] = round(per_step * (self.total - step) / 60, 1)
        self.window = {}
        self.show(loss=f"{record['loss']:.3f}", **{speed: f"{record[speed]:.0f}"})
        self.write({"step": step, **record})
        self.count, self.since = 0.0, time.monotonic()

    def show(self, **values: str) -> None:
        """Show values beside the progress bar from now on."""
        self.shown |= values
        self.bar.set_postfix(self.shown)

    def write(self, record: dict) -> None:
        """Print a record, lists below it, append it to `log.jsonl`, and send its numbers and texts to the trackers.

        Raises:
            OSError: the disk is full or not writable.
        """
        record = {key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()}
        if self.accelerator.is_main_process:
            tqdm.write("  ".join(f"{key} {value}" for key, value in record.items() if not isinstance(value, list)))
            for key, values in record.items():
                if isinstance(values, list):
                    tqdm.write("\n".join(f"  {key}: {value}" for value in values))
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise cannot_write(f"the log '{self.path}'", error) from error
        values = {
            key: value if isinstance(value, float) else "  \n".join(map(str, value))
            for key, value in record.items()
            if isinstance(value, float | list)
        }
        self.accelerator.log(values, step=record["step"])

    def records(self) -> list[dict]:
        """Return all records of `log.jsonl`."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def close(self) -> None:
        """Close the progress bar."""
        self.bar.close()
