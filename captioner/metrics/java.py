"""METEOR and SPICE, which exist only as Java programs. Both are optional.

Each call starts one process, gives it all input at once, and reads its standard output and standard error. The locale
is fixed. A process that exceeds the time limit is killed. Nothing is downloaded, and nothing is written into the
folders of the jars.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TIMEOUT = 1800.0
"""Longest time that a Java program may take, in seconds."""

# METEOR 1.5, English, task "rank" (Denkowski and Lavie, 2014): the default values of the jar.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase


class JavaError(OSError):
    """A Java program is missing, failed, or took too long; the message names it and says what to do."""


def missing_java() -> str | None:
    """Return why Java programs cannot run on this machine, or None if they can."""
    return None if shutil.which("java") else "java is not on the PATH; install a Java runtime (Debian: default-jre)"


def meteor_statistics(
    predictions: Sequence[str], references: Sequence[Sequence[str]], timeout: float = TIMEOUT
) -> np.ndarray:
    """Align captions with their references, by the METEOR 1.5 jar in pycocoevalcap.

    Args:
        predictions: B tokenized captions.
        references: the tokenized references of each.
        timeout: longest time in seconds.

    Returns:
        (B, 23) the jar's statistics for the best reference of each caption. `meteor` turns them, or sums of them over
        captions, into scores.

    Raises:
        JavaError: Java is missing, the jar failed, or the time is up.
    """
    jar = _package() / "meteor" / "meteor-1.5.jar"
    lines = [
        " ||| ".join(["SCORE", *map(_field, others), _field(caption)])
        for caption, others in zip(predictions, references, strict=True)
    ]
    output = _run(["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"], lines, timeout, "METEOR")
    rows = [line.split() for line in output.splitlines() if line.strip()]
    if len(rows) != len(lines) or any(len(row) != 23 for row in rows):
        raise JavaError(f"METEOR returned {len(rows)} lines for {len(lines)} captions; leave METEOR out")
    try:
        statistics = np.array(rows, np.float64)
    except ValueError as error:
        raise JavaError(f"METEOR returned values that are not numbers ({error}); leave METEOR out") from None
    # A caption that matches its reference as a whole, in one piece, counts no fragment, also within a sum.
    whole = (statistics[:, 21] == statistics[:, 0]) & (statistics[:, 22] == statistics[:, 1]) & (statistics[:, 20] == 1)
    statistics[whole, 20] = 0
    return statistics


def meteor(statistics: np.ndarray) -> np.ndarray:
    """Compute METEOR (...,) from statistics (..., 23) of one caption, or summed over many.

    The formula of Denkowski and Lavie (2014), section 2: a weighted F-mean less a penalty for fragments.
    """
    length, other, function, other_function = np.moveaxis(statistics[..., :4], -1, 0)
    matches = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 4)  # (..., matcher, content/function x side)
    chunks, matched, other_matched = np.moveaxis(statistics[..., 20:], -1, 0)

    def share(side: int, words: np.ndarray, function_words: np.ndarray) -> np.ndarray:
        found = _DELTA * matches[..., side] + (1 - _DELTA) * matches[..., 2 + side]  # (..., matcher)
        return _ratio(found @ _WEIGHTS, _DELTA * (words - function_words) + (1 - _DELTA) * function_words)

    precision, recall = share(0, length, function), share(1, other, other_function)
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    return mean * (1 - _GAMMA * _ratio(chunks, (matched + other_matched) / 2) ** _BETA)


def spice(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    models: str | os.PathLike,
    timeout: float = TIMEOUT,
) -> np.ndarray:
    """Compute SPICE F-scores (Anderson et al., 2016), by the jar in pycocoevalcap.

    Args:
        predictions: B tokenized captions.
        references: the tokenized references of each.
        models: folder with `stanford-corenlp-3.6.0.jar` and `stanford-corenlp-3.6.0-models.jar`, from
            http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip (SPICE needs Java 8).
        timeout: longest time in seconds.

    Returns:
        (B,) F-scores; NaN where the program gives none.

    Raises:
        JavaError: Java or a model file is missing, the program failed, or the time is up.
    """
    jars, package = spice_models(models), _package() / "spice"
    items = [
        {"image_id": number, "test": caption, "refs": list(others)}
        for number, (caption, others) in enumerate(zip(predictions, references, strict=True))
    ]
    classes = os.pathsep.join(map(str, [package / "spice-1.0.jar", *jars, package / "lib" / "*"]))
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "in.json", Path(scratch) / "out.json"
        source.write_text(json.dumps(items), encoding="utf-8")
        command = ["-Xmx8G", "-cp", classes, "edu.anu.spice.SpiceScorer", str(source), "-out", str(target), "-silent"]
        _run(command, [], timeout, "SPICE")
        if not target.is_file():
            raise JavaError("SPICE wrote no scores; leave SPICE out")
        try:
            found = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(target.read_text("utf-8"))}
            values = [found.get(number) for number in range(len(items))]
            return np.array([np.nan if value is None else value for value in values], np.float64)
        except (ValueError, KeyError, TypeError) as error:
            raise JavaError(f"SPICE wrote values that are not scores ({error}); leave SPICE out") from None


def spice_models(folder: str | os.PathLike) -> list[Path]:
    """Return the files of SPICE's models.

    Raises:
        JavaError: one is missing.
    """
    jars = [Path(folder) / f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models")]
    absent = [jar.name for jar in jars if not jar.is_file()]
    if absent:
        raise JavaError(f"SPICE needs {' and '.join(absent)} in '{folder}'; unpack stanford-corenlp-full-2015-12-09")
    return jars


def _package() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise JavaError("pycocoevalcap, which brings the jars, is not installed; pip install pycocoevalcap")
    return Path(next(iter(spec.submodule_search_locations)))


def _field(caption: str) -> str:
    """Return a caption as one field of METEOR's line protocol: without separators and line breaks."""
    return caption.replace("|||", "").replace("  ", " ").translate({10: 32, 13: 32})


def _run(arguments: list[str], lines: list[str], timeout: float, name: str) -> str:
    reason = missing_java()
    if reason:
        raise JavaError(reason)
    fixed = ["-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8"]
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            ["java", *fixed, *arguments], env=environment, start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        raise JavaError(f"java cannot be started: {error}") from None
    text = "".join(line + "\n" for line in lines).encode(errors="replace")  # half a surrogate pair
    try:
        output, errors = process.communicate(text, timeout)
    except subprocess.TimeoutExpired:
        raise JavaError(
            f"{name} took longer than {timeout:.0f} s and was stopped; java_timeout may be raised"
        ) from None
    finally:
        if process.returncode is None:  # the time is up, or the run was interrupted
            _stop(process)
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no message"]
        # A stack trace ends with lines of code; the error stands above them.
        reason = next((line for line in lines if "Exception" in line or "Error" in line), lines[-1])
        raise JavaError(f"{name} failed with exit code {process.returncode}: {reason[:200]}")
    return output.decode(errors="replace")


def _stop(process: subprocess.Popen) -> None:
    """Kill a program and the programs that it started: `java` may be a script that starts the real one."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide two arrays; the result is 0 where the divisor is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0)
