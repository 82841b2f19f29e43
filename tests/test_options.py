"""The command line: what is said of a wrong one, which options have no effect, which options mend an error."""

import ast
import io
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from commands import run

from captioner import cli
from captioner.commands.cache import CacheConfig
from captioner.errors import SettingError
from captioner.options import list_options, mends, read_settings
from captioner.recipes import PRETRAIN, TRAIN
from captioner.training.config import ModelConfig, ScstConfig, TrainConfig

PACKAGE = Path(__file__).parents[1] / "captioner"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("caption --grid", "--grid needs a value"),
        ("caption --batch-size x a.jpg", "--batch-size must be a whole number, not 'x'"),
        ("caption --gird 3x3 a.jpg", "no option --gird; the nearest is --grid"),
        ("caption --num_baems 3 a.jpg", "no option --num-baems; the nearest is --num-beams"),
        ("cache --model.grid 3x3", "no option --model.grid; the nearest is --grids"),
        ("cache --views 0", "views must be positive, not 0; change --views"),
        ("train debug --epochs x", "--epochs must be a number, not 'x'"),
        ("train debug --patience x", "--patience must be a whole number or None, not 'x'"),
        ("train debug --stage foo", "--stage must be one of 'text', 'xe', 'scst', not 'foo'"),
        ("train debug --workers 3", "no option --workers; the nearest is --data.workers"),
        ("train debug --data.rot x", "no option --data.rot; the nearest is --data.root"),
        ("train debug --zzzzzz", "no option --zzzzzz; `captioner train debug --help` lists the options"),
        ("train debug more", "'more' belongs to no option; `captioner train debug --help` lists them"),
        ("train debug --epochs nan", "epochs must be positive, not nan; change --epochs"),
        ("train debug --model.dropout 2", "dropout must be a share between 0 and 1, not 2.0; change --model.dropout"),
        (
            "train debug --model.heads 3",
            "width 64 is no multiple of the 3 heads; change --model.width or --model.heads",
        ),
        ("train debug --model.grid 3", None),
        ("train debug --stage scst --scst.samples 1", "needs at least 2 samples, not 1; change --scst.samples"),
        ("train", "the first word after train is a recipe: debug, flickr8k"),
        ("train --data.root x debug", "the first word after train is a recipe: debug, flickr8k"),
        ("train debugg", "no recipe 'debugg'; there are debug, flickr8k"),
        ("pretrain debug --encoder-options depth", "--encoder-options: 'depth' is not of the form KEY=VALUE"),
        ("pretrain debug --teachers.0.mean 1 2", "--teachers.0.mean must be 3 numbers or None, not '1', '2'"),
        ("pretrain debug --teachers.0.kind onnx", "no output of the teacher 'resnet18' is named to learn from"),
        ("score --metrics FOO", "--metrics must be one of 'BLEU', 'METEOR', 'ROUGE-L', 'CIDEr', not 'FOO'"),
    ],
)
def test_a_wrong_command_line_is_one_line(args, line, capsys):
    if line is None:
        assert read_settings("", TRAIN["debug"](), args.split()[2:]).model.grid == "3"
        return
    assert run(*args.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"captioner {args.split()[0]}: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_wrong_command_line_is_one_line_on_any_terminal(monkeypatch, capsys, encoding):
    monkeypatch.setattr(sys, "stdout", terminal := io.TextIOWrapper(io.BytesIO(), encoding))
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert run("caption", "--batch-size", "x") == 2
    assert capsys.readouterr().err == "captioner caption: --batch-size must be a whole number, not 'x'\n"


def test_a_launcher_prints_a_wrong_command_line_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("train", "debug", "--zzzzzz") == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("args", "unused"),
    [
        ("train debug --scst.samples 5", "--scst.samples has no effect: the stage is xe"),
        ("train flickr8k_scst --label-smoothing 0.1", "--label-smoothing has no effect: the stage is scst"),
        ("train flickr8k_scst --model.grid 3x3", "--model.grid has no effect: the captioner that training starts from"),
        ("train flickr8k --init-from x --model.width=64", "--model.width has no effect: the captioner that"),
        ("train coco_gpt2 --model.layers 2", "--model.layers has no effect: it is for a decoder from scratch"),
        ("train coco_gpt2 --model.lora_rank 16", "--model.lora-rank has no effect: tune is 'full', not 'lora'"),
        ("train debug --data.stream-rows 5", "--data.stream-rows has no effect: the data are not streamed"),
        ("train coco_small --data.streaming --data.no-restval", "--data.no-restval has no effect: a stream reads"),
        ("cache --captioner x --model.crop-mode squash", "--model.crop-mode has no effect: the captioner has its own"),
        ("cache --views 2 --min-crop 0.5", "--min-crop has no effect: the first two views are no random crops"),
        ("pretrain debug --word-weight 1", "--word-weight has no effect: there are no captions"),
        ("pretrain debug --early-size 32", "--early-size has no effect: no step takes it"),
        ("pretrain debug --label-smoothing 0", "--label-smoothing has no effect: class labels have no weight"),
        ("pretrain debug --probe-images 9", "--probe-images has no effect: there is no probe"),
        ("pretrain debug --teachers.0.map-size 9", "--teachers.0.map-size has no effect: the teacher is of kind timm"),
        ("pretrain lookupvit_small_distill --captions x --teachers.1.num-classes 9", "--teachers.1.num-classes has no"),
    ],
)
def test_an_option_without_effect_is_refused(args, unused, capsys):
    assert run(*args.split()) == 2
    assert unused in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        "flickr8k --init-from x --model.tune lora --model.lora-rank 4",
        "flickr8k --model.decoder gpt2",
        "coco_small --data.streaming",
        "flickr8k_scst --scst.search sample",
        "coco_scst --init-from x",
    ],
)
def test_what_a_recipe_sets_is_never_refused(args):
    recipe, *options = args.split()
    assert read_settings("", TRAIN[recipe](), options)


def test_every_unused_setting_exists():
    """A name that is spelled wrong would never be refused."""
    configs = [recipe() for recipe in (*TRAIN.values(), *PRETRAIN.values())]
    configs += [replace(PRETRAIN["debug"](), captions=("x",), word_weight=0.0), CacheConfig(captioner="x")]
    configs += [TrainConfig(init_from="x"), TrainConfig(model=ModelConfig(decoder="x")), TrainConfig(stage="scst")]
    for config in configs:
        assert config.unused().keys() <= list_options(config).keys()


def test_settings_that_contradict_are_refused_in_python():
    for make in (
        lambda: ModelConfig(lora_rank=4),
        lambda: TrainConfig(scst=ScstConfig(samples=9)),
        lambda: CacheConfig(captioner="x", model=ModelConfig(image_size=64)),
    ):
        with pytest.raises(SettingError):
            make()


@pytest.mark.parametrize(
    ("args", "mend"),
    [
        ("cache --captioner X --model.encoder Y", "leave out --captioner or --model.encoder"),
        ("cache --captioner=X --model.image-size=64", "leave out --captioner or --model.image-size"),
        ("train debug --model.lora-rank 4", "change --model.tune or leave out --model.lora-rank"),
        ("train coco_gpt2 --model.tune projector --model.lora-rank 4", "leave out --model.tune or --model.lora-rank"),
        ("train debug --scst.samples 9", "change --stage or leave out --scst.samples"),
        ("train debug --data.streaming --data.tokens x", "leave out --data.streaming or --data.tokens"),
    ],
)
def test_settings_that_exclude_each_other_are_left_out(args, mend, capsys):
    assert run(*args.split()) == 2
    assert capsys.readouterr().err.endswith(f"; {mend}\n")


def test_an_error_names_the_options_that_mend_it():
    defaults = TRAIN["coco_small"]()
    for settings, args, line in (
        (["grid"], [], "; give --model.grid"),
        (["grids", "grid"], ["--grids", "3x3"], "; change --grids or give --model.grid"),
        (["output"], [], "; name another --output"),
        (["streaming"], ["--data.streaming"], "; leave out --data.streaming"),
        (["restval"], [], "; pass --data.no-restval"),
        (["data.root"], ["--data.root=x"], "; change --data.root"),
        (["on_bad"], [], "; pass --data.on-bad skip to leave it out"),
        (["resume"], [], "; change --resume"),
        (["nothing_of_this_command"], [], ""),
    ):
        assert mends(SettingError("so it is", *settings), defaults, args) == line
    assert mends(SettingError("so it is", "resume"), None, []) == ""
    assert mends(SettingError("so it is", "kind"), PRETRAIN["debug"](), []) == "; change --teachers.0.kind"
    two = PRETRAIN["lookupvit_small_distill"]()
    assert (
        mends(SettingError("so it is", "kind", "nodes"), two, [])
        == "; change --teachers.N.kind or give --teachers.N.nodes"
    )
    assert mends(ValueError("so it is"), defaults, []) == ""


def test_help_has_no_line_breaks_of_the_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for args in (
        ["train", "flickr8k"],
        ["pretrain", "debug"],
        ["cache"],
        ["evaluate"],
        ["caption"],
        ["probe"],
        ["score"],
    ):
        assert run(*args, "--help") == 0
        lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
        for line, below in pairwise(lines):
            if re.match(r"[a-z`(]", below) and re.search(r"[a-z,]$", line) and "  " not in below:
                first = below.split()[0]
                assert len(line) + len(first) > 45, f"{args}: a break between '{line}' and '{below}'"


def test_a_wrong_option_is_answered_before_anything_heavy_is_imported():
    code = """
import sys
from captioner.cli import COMMANDS, main
for command in COMMANDS:
    for words in ([command, "--zzzzzz"], [command, "debug", "--zzzzzz"], [command, "--help"]):
        try:
            main(words)
        except SystemExit:
            pass
assert not {"torch", "transformers", "timm", "datasets", "accelerate"} & set(sys.modules), sorted(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: captioner") == len(cli.COMMANDS)


def spelled_options(path: Path) -> list[str]:
    """List the options in the texts of a file, docstrings of modules, classes and functions aside."""
    tree, docs = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            docs.add(id(node.body[0].value))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
    return re.findall(r"(?<![\w<-])--[a-z][\w.-]*", "\n".join(text for text in texts if isinstance(text, str)))


BELOW = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "commands"]


@pytest.mark.parametrize("path", BELOW, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_below_the_command_line_spells_an_option(path):
    if path.name not in ("cli.py", "options.py"):
        assert not spelled_options(path)
