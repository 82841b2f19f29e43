"""Scripts in processes of their own that need not load torch anew: loading takes longer than most of these runs."""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

LOADED = ("captioner.training.loop", "captioner.pretraining.loop", "captioner.commands.cache", "captioner.evaluation")
"""What the server loads once, before it forks a process for each script."""

SERVER = multiprocessing.get_context("forkserver")


class Script:
    """A running script, with the attributes of `subprocess.Popen` that tests use.

    Args:
        script: path of the script from the project's root, or `-c` before a script's text, as Python has it.
        args: its arguments.
        env: environment variables besides those of this process.
        session: whether it leads a process group of its own.
    """

    def __init__(self, script: str | Path, *args, env: dict[str, str] | None = None, session: bool = False):
        self.args = [str(script), *map(str, args)]
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        env = os.environ | {"OMP_NUM_THREADS": "1", **(env or {})}
        SERVER.set_forkserver_preload(LOADED)
        with _environment(env):  # the server has that of the first start
            method = multiprocessing.get_start_method()
            self.process = SERVER.Process(target=_run, args=(self.args, env, self.files, session, method))
            self.process.start()
        self.pid, self.terminate, self.kill = self.process.pid, self.process.terminate, self.process.kill

    def poll(self) -> int | None:
        """Return the exit code, or `None` while the script runs; one that a signal ended has a code below 0."""
        return self.process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end and return the exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end and return what was written to standard output and error."""
        self.wait(timeout)
        return tuple(file.read_text() if file.exists() else "" for file in self.files)


def run_together(
    script: str | Path,
    *args,
    processes: int = 2,
    stop_after: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a script as several CPU processes that find each other, as a launcher starts them; or as one, alone.

    Args:
        stop_after: a path; when it appears, each process gets SIGTERM.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = (env or {}) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if processes > 1:
        meeting |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    scripts = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        scripts.append(Script(script, *args, env=meeting | place))
    while any(one.poll() is None for one in scripts):
        failed = any(one.poll() for one in scripts)  # the others would wait for it for ever
        if failed or (stop_after is not None and stop_after.exists()):
            for one in scripts:
                one.terminate()
            break
        time.sleep(0.02)
    written = [one.communicate() for one in scripts]
    code = next((one.poll() for one in scripts if one.poll()), 0)
    out, err = ("".join(texts) for texts in zip(*written, strict=True))
    return subprocess.CompletedProcess(scripts[0].args, code, out, err)


@contextlib.contextmanager
def _environment(env: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(args: list[str], env: dict[str, str], files: list[Path], session: bool, method: str) -> None:
    """Become the script: what runs in the new process."""
    multiprocessing.set_start_method(method, force=True)  # of the workers of a data loader
    if session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    sys.path[0:0] = [str(ROOT), str(Path(args[0]).resolve().parent)]
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        exec(args[1], {"__name__": "__main__"})
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
