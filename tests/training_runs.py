"""Small training runs that several test files share."""

import atexit
import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from processes import ROOT, run_together

from captioner import recipes
from captioner.data.config import DataConfig
from captioner.encoders import create_encoder
from captioner.pretraining.loop import export_encoder
from captioner.training import loop as decoder

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


@functools.cache
def small_encoder():
    """Name an encoder of two blocks in place of the recipe's twelve: most of what a test waits for is the encoder."""
    folder = tempfile.TemporaryDirectory(prefix="small_encoder_")
    atexit.register(folder.cleanup)
    torch.manual_seed(0)
    encoder = create_encoder("lookupvit_tiny_patch16_224", depth=2)
    export_encoder(encoder, {"depth": 2}, 224, Path(folder.name))
    return f"local-dir:{folder.name}"


def debug(captioned, output, **kwargs):
    """Return the settings of the smallest run, which `debug_args` are on the command line."""
    config = recipes.debug()
    data = DataConfig(root=str(captioned), workers=0, captions_per_image=2)
    return replace(config, output=output, data=data, model=replace(config.model, encoder=small_encoder()), **kwargs)


def debug_args(captioned, output, encoder=True):
    """Return the command line of the run of `debug`; stage scst takes no encoder, it goes on from a captioner."""
    args = ["debug", "--data.root", captioned, "--data.captions-per-image", 2, "--output", output]
    return [*args, "--model.encoder", small_encoder()] if encoder else args


def losses(folder, key="loss"):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in records if key in record}


def launch(*args, processes=2, stop_after=None):
    """Run a script as several CPU processes, see `run_together`."""
    return run_together(*args, processes=processes, stop_after=stop_after, env={"CAPTIONER_DEBUG": "1"})


def launch_by_accelerate(*args, stop_after):
    """Have accelerate's launcher start a script as two CPU processes; it needs seconds for that.

    `accelerate launch --cpu` would start one, whatever one asks for.

    Args:
        stop_after: a path whose appearance has the launcher sent SIGTERM, as a scheduler would.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CAPTIONER_DEBUG": "1", "ACCELERATE_USE_CPU": "true"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env, "cwd": ROOT}
    with subprocess.Popen([*command, *map(str, args)], **options) as process:
        while not stop_after.exists() and process.poll() is None:
            time.sleep(0.02)
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
