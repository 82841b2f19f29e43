"""Small training runs that several test files share."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from captioner import recipes
from captioner.data.config import DataConfig
from captioner.training import loop as decoder

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
ROOT = Path(__file__).parents[1]


def debug(captioned, output, **kwargs):
    config = recipes.debug()
    data = DataConfig(root=str(captioned), workers=0, captions_per_image=2)
    return replace(config, output=output, data=data, **kwargs)


def losses(folder, key="loss"):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in records if key in record}


def launch(*args, processes=2, stop_after=None):
    """Start a script as several CPU processes (`accelerate launch --cpu` would start one, whatever one asks for).

    Args:
        stop_after: a path whose appearance has the launcher sent SIGTERM, as a scheduler would.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    if processes == 1:
        command.remove("--multi_gpu")
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CAPTIONER_DEBUG": "1", "ACCELERATE_USE_CPU": "true"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env, "cwd": ROOT}
    with subprocess.Popen([*command, *map(str, args)], **options) as process:
        while stop_after is not None and not stop_after.exists() and process.poll() is None:
            time.sleep(0.02)
        if stop_after is not None:
            process.terminate()
        stdout, stderr = process.communicate(timeout=900)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def stop_at(monkeypatch, step, number, before=decoder.train_step):
    """Have this process get a signal within a step."""
    seen = []

    def train_step(*args):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), number)
        return before(*args)

    monkeypatch.setattr(decoder, "train_step", train_step)


@contextlib.contextmanager
def full_disk():
    """As on a full disk, writing fails midway, wherever a file grows beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])
