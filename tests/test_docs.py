"""The documentation is true: its commands run, its options exist, its outputs are outputs, its links lead somewhere."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from docs_blocks import PAGES, ROOT, make_world, read_blocks, read_page, split_commands, split_pipeline
from test_imports import ROOMS

from captioner import cli
from captioner.options import UsageError, list_options, read_settings

LANGUAGES = {"sh", "python", "text"}

MARKERS = ("not run: ", "output, not checked: ")
"""Markers that give a reason."""

ELSEWHERE = {
    "pip": "`.ci/run` installs the package",
    "pytest": "it would run itself",
    "python": "a benchmark, or a module that .ci/run runs",
    "pre-commit": "needs the network",
    "ruff": "`.ci/run` checks the code",
    "mypy": "`.ci/run` checks the code",
    "zensical": "`.ci/run` builds the pages",
    ".ci/run": "runs this test",
    "git": "needs the network",
}
"""Programs in blocks that run, which this test leaves out, and why."""

SMALL = {
    "train": {"--epochs": "1", "--num-beams": "1", "--data.workers": "0"},
    "evaluate": {"--num-beams": "1", "--data.workers": "0"},
    "cache": {"--data.workers": "0"},
}
"""Settings that make a command small, added where it does not give them itself."""

THEIRS = {
    "--signal": "sbatch",
    "--requeue": "sbatch",
    "--ntasks-per-node": "srun",
    "--cpu": "accelerate launch",
    "--dist": "pytest",
    "--cov": "pytest",
    "--check": "ruff",
    "--strict": "zensical",
    "--all-files": "pre-commit",
}
"""Options of other programs."""

SCRIPTS = {"train.py": "train", "evaluate.py": "evaluate", "pretrain.py": "pretrain"}


def ids(block):
    return f"{block.page}:{block.line}"


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_a_block_says_what_it_is(block):
    assert block.language in LANGUAGES, "name the language: sh runs, python runs, text is shown"
    if block.language == "text":
        assert block.marker in ("output", "output, other numbers", "layout", "") or block.marker.startswith(MARKERS[1])
    else:
        assert not block.marker or block.marker.startswith(MARKERS[0])
    for marker in MARKERS:
        if block.marker.startswith(marker):
            assert len(block.marker) > len(marker) + 5, "give a reason"


def our_command(words):
    """Return the word and the arguments of a command of this package, or None; check the launcher's options."""
    if words[:2] == ["accelerate", "launch"]:
        launcher, rest = launch_command_parser().parse_known_args(words[2:])
        assert not rest, f"accelerate launch has no {rest}"
        script, args = launcher.training_script, launcher.training_script_args
        if launcher.module:
            assert script == "captioner"
            return args[0], args[1:]
        return SCRIPTS[script], args
    if words[0] == "python" and words[1] in SCRIPTS:
        return SCRIPTS[words[1]], words[2:]
    return (words[1], words[2:]) if words[0] == "captioner" else None


@pytest.mark.parametrize("block", SHELL, ids=ids)
def test_commands_are_understood(block):
    for line in split_commands(block.text):
        for words in split_pipeline(line):
            if command := our_command(words):
                check_command(*command)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_are_understood(page):
    for span in re.findall(r"`(captioner [a-z]+ [^`]*--[^`]*)`", read_page(page)):
        word, *args = shlex.split(span)[1:]
        if "--help" not in args:
            check_command(word, args)


def check_command(word, args):
    """Fail where the options of a word are not what it takes."""
    settings = import_module(f"captioner.commands.{word}").SETTINGS
    try:
        read_settings(*cli.pick_defaults(word, settings, [arg for arg in args if arg != "..."]))
    except UsageError as error:
        pytest.fail(f"captioner {word} {' '.join(args)}: {error}")


@cache
def our_options() -> set[str]:
    """Collect the options of every command and recipe."""
    found = {"--help", "--version"}
    for word in cli.COMMANDS:
        settings = import_module(f"captioner.commands.{word}").SETTINGS
        for defaults in settings.values() if isinstance(settings, dict) else [settings]:
            found |= {option.name for option in list_options(defaults()).values()}
    return found


def benchmark_options() -> set[str]:
    """Collect the fields of the benchmarks' settings and their parsers' options."""
    text = "\n".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    fields = re.findall(r"^    (\w+): .* = ", text, re.M) + re.findall(r"^    (\w+): \w+$", text, re.M)
    return {f"--{field.replace('_', '-')}" for field in fields} | set(re.findall(r'"(--[a-z-]+)"', text))


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page):
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    text = re.sub(r"<!--.*?-->|^\|[-|]+\|$", "", read_page(page), flags=re.S | re.M)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*(?<!\.)", text))
    assert not named - our_options() - launcher - benchmark_options() - THEIRS.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in read_blocks(page))])
def test_blocks_run(page, tmp_path, monkeypatch, capfd):
    make_world(tmp_path, page)
    shim(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("captioner.metrics.java.missing_java", lambda: "not looked for in this test")
    names: dict = {}
    output = ""
    for block in read_blocks(page):
        if block.language == "text":
            check_output(block, output)
        if not block.runs:
            continue
        capfd.readouterr()
        with contextlib.redirect_stderr(sys.stdout):  # both as a terminal shows them
            if block.language == "python":
                exec(compile(block.text, ids(block), "exec"), names)
            else:
                for line in split_commands(block.text):
                    run_line(line, capfd)
        output = capfd.readouterr().out


def shim(folder: Path) -> None:
    """Put `captioner` on the path of the shell, whether it is installed or not."""
    (folder / "bin").mkdir()
    program = folder / "bin/captioner"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m captioner "$@"\n')
    program.chmod(0o755)


def run_line(line, capfd):
    """Run a line of a block: a plain command of ours in this process, anything else in a shell."""
    parts = [words for words in split_pipeline(line) if words[0] not in ELSEWHERE]
    if {"|", ">"} & set(line):
        text = " ".join(word if word in ("|", ">", "&&") else f"'{word}'" for word in line)
        env = os.environ | {"PATH": f"{Path.cwd() / 'bin'}:{os.environ['PATH']}"}
        result = subprocess.run(["bash", "-o", "pipefail", "-c", text], env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{text}: {result.stderr}"
        return
    for words in parts:
        assert words[0] == "captioner", f"what is {words[0]}? run it, or name it in ELSEWHERE"
        given = {word.split("=")[0] for word in words}
        small = [
            part for option, value in SMALL.get(words[1], {}).items() if option not in given for part in (option, value)
        ]
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words[1:], *small])
        if stopped.value.code:
            pytest.fail(f"{' '.join(words)}: exit {stopped.value.code}, {capfd.readouterr().out}")


def check_output(block, output):
    """Compare what is shown with what was printed; `...` stands for any lines."""
    if not block.marker.startswith("output") or "not checked" in block.marker:
        return
    shown, printed = (
        [line.rstrip() for line in text.splitlines() if "METEOR" not in line] for text in (block.text, output)
    )
    if block.marker == "output, other numbers":
        shown, printed = ([re.sub(r"\d[\d.,]*", "N", line) for line in lines] for lines in (shown, printed))
    pattern = "\n".join(".*" if line == "..." else re.escape(line) for line in shown)
    assert re.fullmatch(pattern, "\n".join(printed), re.S), f"{ids(block)} shows\n{block.text}\nbut it is\n{output}"


def anchor(heading: str) -> str:
    """Make the anchor of a heading as GitHub does."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for included in re.findall(r'^--8<-- "(.*)"$', read_page(page), re.M):
        assert (ROOT / included).is_file(), f"{page} includes {included}"
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", read_page(page), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, part = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert file.resolve().is_relative_to(ROOT)
        if part:
            assert part in map(anchor, re.findall(r"^#+ (.*)$", file.read_text(), re.M)), f"{page} links to {target}"


def test_the_readme_is_short_and_starts_with_two_commands():
    assert len(read_page("README.md").splitlines()) <= 120
    first, second = [block for block in read_blocks("README.md") if block.language == "sh"][:2]
    assert first.text.startswith("pip install . && captioner caption")
    assert second.text.startswith('pip install -e ".[test]" && pytest')


def test_the_layout_in_the_readme_is_the_package():
    [layout] = [block.text for block in read_blocks("README.md") if block.marker == "layout"]
    named = set(re.findall(r"(?:^|(?<= ))[a-z_]+(?:/|\.py)", layout)) - {"captioner/", "docs/", "benchmarks/", "tests/"}
    there = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "captioner").iterdir()
        if not path.name.startswith(("_", "."))
    }
    assert named == there - {"py.typed"}


def test_the_rooms_in_the_documentation_are_those_that_imports_keep_to():
    table = read_page("docs/architecture.md").partition("| room |")[2].partition("\n\n")[0]
    named = [set(re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1])) for row in table.splitlines()[2:]]
    assert named == [set(level.split()) for level in ROOMS if level != "__main__"]


def test_what_has_to_pass_is_the_test_command_of_the_readme():
    second = [block for block in read_blocks("README.md") if block.language == "sh"][1]
    command = second.text.strip().partition("&& ")[2]
    assert command in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_in_the_menu_and_speaks_of_images(page):
    if page.startswith("docs/"):
        assert f": {Path(page).name}\n" in (ROOT / "mkdocs.yml").read_text()
    assert not re.search(r"\bpictures?\b", read_page(page), re.I)
    assert max(map(len, re.sub(r"^(\||!).*$", "", read_page(page), flags=re.M).splitlines())) <= 122
