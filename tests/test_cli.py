import subprocess
import sys
import time

import pytest

from captioner import cli
from captioner.grids import parse_grid
from captioner.options import read_settings
from captioner.recipes import PRETRAIN


def run(*args, stdin=None):
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(arg) for arg in args])
    return stopped.value.code


def test_help_is_light():
    code = "import sys, captioner, captioner.cli; captioner.cli.main(['--help'])"
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "captioner COMMAND" in result.stdout
    assert time.monotonic() - start < 10  # it takes 0.1 s; the bound only catches a heavy import on a busy machine
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "timm", "datasets", "numpy", "PIL"}


@pytest.mark.parametrize("command", ["caption", "cache", "train", "evaluate", "pretrain", "score"])
def test_the_help_of_every_command_needs_no_torch(command):
    code = f"""
import sys
from captioner.cli import main
try:
    main(["{command}", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"captioner {command}" in result.stdout


def test_unknown_command(capsys):
    assert run("draw") == 2
    assert "no command 'draw'" in capsys.readouterr().err


def test_one_line_errors(saved_model, images, captioned, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "config.json").write_text("{}")
    cases = [
        (("caption", tmp_path / "empty", "--model", saved_model), "no images in the folder"),
        (("caption", tmp_path / "*.gif", "--model", saved_model), "no file matches"),
        (("caption", images, "--output", images / "a.jpg" / "out.csv"), "out.csv': "),
        (("caption", images, "--model", tmp_path / "empty"), "it has no config.json"),
        (("caption", images, "--model", tmp_path / "junk"), "is not a captioner model"),
        (("caption", images, "--model", "./nowhere"), "no captioner model at './nowhere'"),
        (("caption", images, "--model", saved_model, "--grid", "5x"), "not of the form ROWSxCOLUMNS"),
        (("caption", images, "--model", saved_model, "--grid", "9x9"), "9x9 is not within the lookup grid 4x4"),
        (("caption", images, "--model", saved_model, "--device", "cuda:99"), "cuda:99"),
        (("train", "debug"), "--data.root"),
        (("train", "debug", "--data.root", captioned, "--init-from", "./nowhere"), "; change --init-from"),
        (("cache", "--data.root", captioned, "--captioner", "./nowhere"), "; change --captioner"),
        (("train", "debug", "--data.root", tmp_path / "nowhere.json"), "nowhere.json'; change --data.root"),
        (("train", "debug", "--data.root", captioned, "--data.images", "no"), "at 'no'; change --data.images"),
        (("train", "debug", "--data.root", captioned, "--data.tokens", "no"), "makes one; change --data.tokens"),
        (("evaluate", "--model", saved_model, "--data.root", tmp_path / "empty"), "no annotations under"),
        (("pretrain", "debug"), "there is nothing to train on; give --images or --captions"),
    ]
    for args, message in cases:
        assert run(*args, *(("--output", tmp_path / "out") if args[0] != "caption" else ())) == 1, args
        error = capsys.readouterr().err
        assert message in error, args
        assert "Traceback" not in error
        assert error.strip().count("\n") == 0, error


@pytest.mark.parametrize("command", ["train debug", "evaluate", "cache", "pretrain debug --images x"])
def test_an_output_that_is_a_file_is_refused_at_once(images, tmp_path, command, capsys):
    for output in (images / "a.jpg", images / "a.jpg" / "deep"):
        assert run(*command.split(), "--output", output) == 1
        assert f"must be a folder, but '{images / 'a.jpg'}' is a file; name another --output" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train debug", "pretrain debug", "cache"])
def test_a_seed_is_a_whole_number_of_32_bits(command, capsys):
    for seed in (-1, 2**32):
        assert run(*command.split(), "--seed", seed) == 2
        assert f"seed must be from 0 to 2**32 - 1, not {seed}; change --seed" in capsys.readouterr().err


def test_settings_that_make_no_sense_are_a_wrong_command_line(capsys):
    for options, message in (
        (("--num-beams", "0"), "num_beams must be positive, not 0"),
        (("--resume", "--overwrite"), "choose one"),
        (("--resume",), "are about the file"),
    ):
        assert run("caption", "a.jpg", *options) == 2
        assert message in capsys.readouterr().err


def test_further_arguments_of_an_encoder_are_keys_and_values(capsys):
    args = ["--encoder-options", "depth=3", "drop_path_rate=0.1", "class_token=False", "act=gelu"]
    config = read_settings("captioner pretrain debug", PRETRAIN["debug"](), args)
    assert config.encoder_options == {"depth": 3, "drop_path_rate": 0.1, "class_token": False, "act": "gelu"}
    config = read_settings("", PRETRAIN["lookupvit_tiny_distill_cpu"](), ["--encoder-options", "depth=3"])
    assert config.encoder_options == {"depth": 3}
    assert run("pretrain", "debug", "--encoder-options", "depth") == 2
    assert "'depth' is not of the form KEY=VALUE" in capsys.readouterr().err


def test_grids_are_read_as_people_write_them():
    assert parse_grid("5x5") == (5, 5)
    assert parse_grid("3X10") == parse_grid([3, 10]) == (3, 10)
    assert parse_grid("5") == parse_grid(5) == (5, 5)
    assert parse_grid(None) is None
    for wrong in ("", "5x", "0x5", "axb", "5x5x5", 0, 2.5, (1, 2, 3), (2.5, 3)):
        with pytest.raises(ValueError, match="ROWSxCOLUMNS"):
            parse_grid(wrong)


def test_a_grid_that_cannot_be_read_names_its_option(images, capsys):
    assert run("caption", images, "--grid", "5x") == 1
    assert capsys.readouterr().err.endswith("such as 5x5; change --grid\n")
