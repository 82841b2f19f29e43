import csv
import io
import json
import os
import subprocess
import sys
import time

import pytest

from captioner import cli
from captioner.commands.caption import open_writer
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


def test_lines_on_standard_output(saved_model, images, capsys):
    assert run("caption", images, "--model", saved_model) == 0
    captured = capsys.readouterr()
    lines = [line.split("\t") for line in captured.out.splitlines()]
    assert [line[0] for line in lines] == [str(images / name) for name in ("a.jpg", "b.png", "c.webp")]
    assert all(len(line) == 2 for line in lines)
    assert "img" not in captured.err  # no progress bar off a terminal


def test_bad_images_are_reported_and_skipped(saved_model, images, tmp_path, capsys):
    (images / "b.png").write_bytes(b"broken")
    output = tmp_path / "out.jsonl"
    assert run("caption", images, images / "gone.jpg", "--model", saved_model, "--output", output) == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(row) for row in rows] == [["path", "caption", "logprob", "error"]] * 4
    assert [row["error"] is None for row in rows] == [True, False, True, False]
    assert rows[0]["logprob"] < 0
    assert rows[1]["caption"] is None
    error = capsys.readouterr().err
    assert "b.png' is not an image" in error
    assert "gone.jpg' does not exist" in error
    assert "2 of 4 images could not be captioned" in error
    assert f"2 captions in '{output}'\n" in error


def test_an_empty_folder_stops_nothing(saved_model, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (images / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    inputs = (tmp_path / "empty", tmp_path / "*.gif", images, images)
    assert run("caption", *inputs, "--model", saved_model) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 6
    assert f"no images in the folder '{tmp_path / 'empty'}'" in captured.err
    assert "*.gif'" in captured.err
    assert "dangling.jpg' does not exist" in captured.err


def test_nothing_is_left_to_do(saved_model, images, tmp_path, capsys):
    arguments = ("caption", images, "--model", saved_model, "--output", tmp_path / "out.jsonl")
    assert run(*arguments) == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(*arguments, "--resume") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert "all 3 images are captioned" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_it(saved_model, images):
    command = f"'{sys.executable}' -m captioner.cli caption {f'{images} ' * 20} --model {saved_model} | true"
    script = f"set -o pipefail; {command}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == 141
    assert result.stderr == ""


def test_formats_by_ending(saved_model, images, tmp_path):
    for ending in ("csv", "txt"):
        assert run("caption", images / "*.png", "--model", saved_model, "--output", tmp_path / f"out.{ending}") == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "caption", "logprob", "error"]
    assert (tmp_path / "out.txt").read_text() == f"{rows[0]['path']}\t{rows[0]['caption']}\n"
    assert run("caption", images, "--model", saved_model, "--output", tmp_path / "out.xml") == 1


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_an_output_is_never_lost_and_can_be_gone_on_with(saved_model, images, tmp_path, ending, capsys):
    output = tmp_path / f"out.{ending}"
    assert run("caption", images / "a.jpg", "--model", saved_model, "--output", output) == 0
    first = output.read_text()
    assert run("caption", images, "--model", saved_model, "--output", output) == 1
    assert "--resume to go on with it or --overwrite" in capsys.readouterr().err
    assert output.read_text() == first
    assert run("caption", images, "--model", saved_model, "--output", output, "--resume") == 0
    whole = output.read_text()
    assert whole.startswith(first)
    assert "2 captions in" in (said := capsys.readouterr().err)
    assert "beside 1 from before" in said
    assert [whole.count(name) for name in ("a.jpg", "b.png", "c.webp")] == [1, 1, 1]
    assert run("caption", images, "--model", saved_model, "--output", output, "--overwrite") == 0
    assert output.read_text() == whole


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_a_line_cut_by_a_kill_is_written_again(saved_model, images, tmp_path, ending):
    output = tmp_path / f"out.{ending}"
    assert run("caption", images, "--model", saved_model, "--output", output) == 0
    whole = output.read_text()
    output.write_text(whole[: whole.rindex("c.webp") + 3])
    assert run("caption", images, "--model", saved_model, "--output", output, "--resume") == 0
    assert output.read_text() == whole


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_images_that_failed_are_tried_again(saved_model, images, tmp_path, ending):
    output, png = tmp_path / f"out.{ending}", (images / "b.png").read_bytes()
    (images / "b.png").write_bytes(b"broken")
    for options in ((), ("--resume",)):
        assert run("caption", images, "--model", saved_model, "--output", output, *options) == 1
        assert output.read_text().count("is not an image") == 1
    (images / "b.png").write_bytes(png)
    assert run("caption", images, "--model", saved_model, "--output", output, "--resume") == 0
    lines = output.read_text().splitlines()
    assert [sum(name in line for line in lines) for name in ("a.jpg", "b.png", "c.webp")] == [1, 2, 1]
    assert "b.png" in lines[-1]
    assert "not an image" not in lines[-1]


def test_names_that_are_not_utf_8_are_written_as_they_are(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), "utf-8", write_through=True))
        with open_writer(None, False) as write:
            write({"path": os.fsdecode(b"caf\xe9.jpg"), "caption": "a cup", "error": None})
        assert raw.getvalue() == b"caf\xe9.jpg\ta cup\n"


def test_a_file_of_another_kind_is_not_gone_on_with(images, tmp_path, capsys):
    foreign = {"a.jsonl": '{"x": 1}\n', "b.csv": "x,y\n1,2\n", "c.txt": "a note\nof mine", "d.txt": "a note"}
    for name, content in {**foreign, "e.jsonl": "[]", "f.csv": "x,y\n", "g.csv": "x" * 200_000 + "\n"}.items():
        (tmp_path / name).write_text(content)
        assert run("caption", images, "--output", tmp_path / name, "--resume") == 1
        assert f"{name}' is not what captioner caption writes" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == content


def test_standard_input_holds_paths_or_a_image(saved_model, images, monkeypatch, capsys):
    for data, names in (
        (f"{images}/c.webp\n{images}/a.jpg\n".encode(), [f"{images}/c.webp", f"{images}/a.jpg"]),
        ((images / "b.png").read_bytes(), ["-"]),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert run("caption", "-", "--model", saved_model) == 0
        assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == names


def test_one_line_errors(saved_model, images, tmp_path, capsys):
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
        (("train", "debug", "--data.root", tmp_path / "nowhere.json"), "no annotations at"),
        (("evaluate", "--model", saved_model, "--data.root", tmp_path / "empty"), "no annotations under"),
        (("pretrain", "debug"), "there is nothing to train on; give --images or --captions"),
    ]
    for args, message in cases:
        assert run(*args, *(("--output", tmp_path / "out") if args[0] != "caption" else ())) == 1, args
        error = capsys.readouterr().err
        assert message in error, args
        assert "Traceback" not in error
        assert error.strip().count("\n") == 0, error


def test_settings_that_make_no_sense_are_a_wrong_command_line(capsys):
    for options, message in (
        (("--num-beams", "0"), "--num-beams must be positive, not 0"),
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
