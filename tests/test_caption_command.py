"""`captioner caption`: from what a person names to lines and files of captions."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
from commands import run
from PIL import Image

from captioner.data import caption_output
from captioner.data.caption_formats import find_format
from captioner.data.caption_output import Writer, open_output, read_output
from captioner.images.names import unescape_name

NAMES = [
    *("plain.jpg", "tab\there.jpg", "line\nfeed.jpg", "form\x0cfeed.jpg", "return\r.jpg", "next\x85line.jpg"),
    *("separator\u2028.jpg", "latin\udce9.jpg", "back\\t.jpg", "smile😀.jpg", " space .jpg", 'quote",.jpg'),
]
"""Names that some program splits, cannot encode or takes for an escape."""


def pipe(monkeypatch, data):
    """Make bytes the standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def named(tmp_path):
    """A folder of small images with `NAMES`."""
    folder = tmp_path / "named"
    folder.mkdir()
    for name in NAMES:
        Image.new("RGB", (8, 8), "red").save(folder / name, "JPEG")
    return folder


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
    summary = "2 of 4 images could not be captioned: 1 of an unsupported format, 1 missing"
    assert f"2 captions in '{output}'; {summary}\n" in error


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
    assert "--resume to go on with it or pass --overwrite" in capsys.readouterr().err
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


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_a_caption_without_words_is_a_caption(tmp_path, ending):
    path = tmp_path / f"out.{ending}"
    with open_output(path, {"captions": 1}) as output:
        output.write({"path": "a.jpg", "caption": "", "logprob": -1.0, "error": None})
    assert read_output(path) == ({"a.jpg"}, set())


def test_a_file_of_another_kind_is_not_gone_on_with(images, tmp_path, capsys):
    foreign = {"a.jsonl": '{"x": 1}\n', "b.csv": "x,y\n1,2\n", "c.txt": "a note\nof mine", "d.txt": "a note"}
    for name, content in {**foreign, "e.jsonl": "[]", "f.csv": "x,y\n", "g.csv": "x" * 200_000 + "\n"}.items():
        (tmp_path / name).write_text(content)
        assert run("caption", images, "--output", tmp_path / name, "--resume") == 1
        assert f"{name}' is not what captioner caption writes" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == content


def test_standard_input_holds_paths_or_an_image(saved_model, images, monkeypatch, capsys):
    for data, names in (
        (f"{images}/c.webp\n{images}/a.jpg\n".encode(), [f"{images}/c.webp", f"{images}/a.jpg"]),
        ((images / "b.png").read_bytes(), ["-"]),
    ):
        pipe(monkeypatch, data)
        assert run("caption", "-", "--model", saved_model) == 0
        assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == names


def test_an_image_on_standard_input_that_cannot_be_used_is_called_that(saved_model, monkeypatch, capsys):
    pipe(monkeypatch, b"\0\0\0\x18ftypheic" + bytes(100))
    assert run("caption", "-", "--model", saved_model) == 1
    assert "'standard input' is not an image of a supported format" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["\n", "\0"])
def test_a_list_of_any_names_is_split_where_it_should_be(saved_model, named, end, monkeypatch, capsys):
    names = (
        sorted(os.listdir(named)) if end == "\0" else [name for name in sorted(os.listdir(named)) if "\n" not in name]
    )
    pipe(monkeypatch, b"".join(os.fsencode(named / name) + end.encode() for name in names))
    assert run("caption", "--model", saved_model, "--num-beams", "1") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == len(names)
    assert f"{len(names)} captions\n" in captured.err


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_any_name_is_one_line_of_utf_8_and_is_read_back(saved_model, named, tmp_path, ending, capsys):
    output = tmp_path / f"out.{ending}"
    arguments = ("caption", named, "--model", saved_model, "--num-beams", "1", "--output", output)
    assert run(*arguments) == 0
    text = output.read_bytes().decode("utf-8")
    assert len(text.splitlines()) == len(NAMES) + (ending == "csv")
    done, failed = caption_output.read_output(output)
    assert done == {str(named / name) for name in NAMES}
    assert not failed
    assert run(*arguments, "--resume") == 0
    assert output.read_bytes().decode() == text
    assert f"all {len(NAMES)} images are captioned" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_scoring_knows_the_names_that_captioning_writes(saved_model, named, tmp_path, ending, write, capsys):
    output = tmp_path / f"out.{ending}"
    assert run("caption", named, "--model", saved_model, "--num-beams", "1", "--output", output) == 0
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    references = [{"id": number, "image_id": number, "caption": "a dog"} for number in range(len(NAMES))]
    annotations = write("captions_val.json", {"images": images, "annotations": references})
    assert run("score", output, annotations, "--metrics", "BLEU") == 0
    assert f"{len(NAMES)} images of" in capsys.readouterr().out


def test_files_of_the_first_release_are_gone_on_with(tmp_path):
    """They hold names that are not UTF-8 as they are, and other separators unescaped."""
    names = ("l\udce9", "u\u2028", "a\tb")
    rows = [{"path": name, "caption": "a cup", "logprob": -1.0, "error": None} for name in names]
    texts = {
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "a.txt": "l\udce9\ta cup\nu\u2028\ta cup\na\\tb\ta cup\n",
        "a.csv": "path,caption,logprob,error\r\nl\udce9,a cup,-1,\r\nu\u2028,a cup,-1,\r\na\tb,a cup,-1,\r\n",
    }
    for file, text in texts.items():
        (tmp_path / file).write_bytes(text.encode(errors="surrogateescape"))
        assert caption_output.read_output(tmp_path / file) == (set(names), set())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_standard_output_takes_any_name_whatever_its_encoding(encoding):
    raw = io.BytesIO()
    writer = Writer(io.TextIOWrapper(raw, encoding), find_format(None))
    for name in NAMES:
        writer.write({"path": name, "caption": "a café", "logprob": None, "error": None})
    lines = raw.getvalue().decode(encoding).split("\n")
    assert len(lines) == len(NAMES) + 1
    names = [unescape_name(line.partition("\t")[0]) for line in lines[:-1]]
    assert names == NAMES


def test_where_an_output_cannot_be_is_said_at_once(images, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.csv").mkdir()
    cases = {
        tmp_path / "folder": "is a folder, and captions are written to a file",
        tmp_path / "folder.csv": "is a folder, and captions are written to a file",
        images / "a.jpg" / "out.csv": f"'{images / 'a.jpg'}' is a file and no folder",
        images / "a.jpg" / "deep" / "out.csv": f"'{images / 'a.jpg'}' is a file and no folder",
        tmp_path / "out.xml": "must end in .jsonl, .csv, .txt, .parquet",
    }
    for output, message in cases.items():
        assert run("caption", images, "--output", output, "--model", "./never/looked/for") == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Errno" not in error
        assert error.count("\n") == 1


def test_an_output_may_have_no_name_but_an_ending(saved_model, images, tmp_path):
    assert run("caption", images / "a.jpg", "--output", tmp_path / ".jsonl", "--model", saved_model) == 0
    assert (tmp_path / ".jsonl").read_text().count("\n") == 1


def test_a_run_that_fails_before_it_captions_leaves_no_output(images, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "out.jsonl")
    for output in (tmp_path / "new" / "out.jsonl", tmp_path / "link.jsonl"):
        assert run("caption", images, "--output", output, "--model", "./nowhere") == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "link.jsonl").is_symlink()
    assert not (tmp_path / "real").exists()


def test_an_output_may_be_a_link_and_end_in_capitals(saved_model, images, tmp_path):
    (tmp_path / "link.JSONL").symlink_to(tmp_path / "real" / "out.jsonl")
    assert run("caption", images / "a.jpg", "--model", saved_model, "--output", tmp_path / "link.JSONL") == 0
    assert json.loads((tmp_path / "real" / "out.jsonl").read_text())["path"] == str(images / "a.jpg")


def test_a_full_disk_is_one_line_and_keeps_what_is_written(saved_model, images, tmp_path, monkeypatch, capsys):
    write = Writer.write_line

    def fill(self, line):
        if "b.png" in line:
            self.file = open("/dev/full", "w")  # noqa: SIM115
        write(self, line)

    monkeypatch.setattr(Writer, "write_line", fill)
    output = tmp_path / "out.jsonl"
    assert run("caption", images, "--model", saved_model, "--output", output, "--batch-size", "1") == 1
    error = capsys.readouterr().err
    assert f"cannot write '{output}': No space left on device; what is in it stays" in error
    assert "--resume" in error
    monkeypatch.undo()
    assert len(output.read_text().splitlines()) == 1


def test_log_probabilities_are_computed_where_they_are_shown_alone(saved_model, images, tmp_path, monkeypatch):
    from captioner import CaptionerModel

    computed, compute = [], CaptionerModel.generate_with_log_probability

    def count(self, *args, **kwargs):
        computed.append(1)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(CaptionerModel, "generate_with_log_probability", count)
    assert run("caption", images, "--model", saved_model, "--output", tmp_path / "out.txt") == 0
    assert run("caption", images, "--model", saved_model) == 0
    assert not computed
    assert run("caption", images, "--model", saved_model, "--output", tmp_path / "out.csv") == 0
    assert computed
