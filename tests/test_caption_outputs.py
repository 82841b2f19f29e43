"""What `captioner caption` writes: several captions, samples, Parquet, files beside images, and what made an output."""

import csv
import json
import os

import pyarrow.parquet as parquet
import pytest
from PIL import Image

from captioner.data import caption_parquet
from captioner.data.caption_output import Writer

ENDINGS = ("jsonl", "csv", "txt", "parquet")


def rows_of(path):
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_several_captions_come_best_first(caption, images, tmp_path):
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    (images / "b.png").write_bytes(b"broken")
    assert caption(images, "--output", one, "--num-beams", "3") == 1
    assert caption(images, "--output", several, "--captions", "3") == 1
    for row, single in zip(rows_of(several), rows_of(one), strict=True):
        assert list(row) == ["path", "caption", "logprob", "error", "captions"]
        assert {key: row[key] for key in single} == single
        if row["error"]:
            assert row["captions"] == []
            continue
        confidences = [each["confidence"] for each in row["captions"]]
        assert len(confidences) == 3
        assert confidences == sorted(confidences, reverse=True)
        assert all(0 < each["confidence"] < 1 and each["logprob"] < 0 for each in row["captions"])
        assert row["captions"][0]["caption"] == row["caption"]


def test_several_captions_in_every_format(caption, images, tmp_path):
    for ending in ENDINGS:
        assert caption(images, "--output", tmp_path / f"out.{ending}", "--captions", "2") == 0
        assert caption(images, "--output", tmp_path / f"out.{ending}", "--captions", "2", "--resume") == 0
    lines, table, column = (rows_of(tmp_path / f"out.{ending}") for ending in ("jsonl", "csv", "parquet"))
    text = (tmp_path / "out.txt").read_text().splitlines()
    assert lines == column
    for row, cells, line in zip(lines, table, text, strict=True):
        texts = [each["caption"] for each in row["captions"]]
        assert [cells["caption"], cells["caption_2"]] == texts
        assert float(cells["confidence_2"]) == row["captions"][1]["confidence"]
        assert line.split("\t") == [row["path"], *texts]
    assert list(table[0])[:4] == ["path", "caption", "logprob", "error"]


def test_samples_depend_on_the_name_and_the_seed_alone(caption, images, tmp_path):
    def sample(name, *options):
        output = tmp_path / f"{name}.jsonl"
        assert caption(*options, "--output", output, "--sample", "--captions", "2") == 0
        return {row["path"]: row["captions"] for row in rows_of(output)}

    whole = sample("whole", images)
    assert sample("small", images, "--batch-size", "1", "--workers", "0") == whole
    assert sample("part", images / "c.webp") == {str(images / "c.webp"): whole[str(images / "c.webp")]}
    assert sample("seed", images, "--seed", "1") != whole
    cold = sample("cold", images, "--temperature", "1e-6")
    assert all(first["caption"] == second["caption"] for first, second in cold.values())
    assert sample("k", images, "--top-k", "1") == sample("p", images, "--top-p", "0.000001")
    for name in whole:
        confidences = [each["confidence"] for each in whole[name]]
        assert confidences == sorted(confidences, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--captions", "3", "--num-beams", "2"], "3 captions of each image need as many beams, not 2"),
        (["--captions", "0"], "captions must be positive"),
        (["--sample", "--num-beams", "2"], "no beams"),
        (["--seed", "3"], "--seed has no effect: captions are not sampled"),
        (["--prefix", "x"], "--prefix has no effect"),
        (["--min-confidence", "2"], "min_confidence must be a share between 0 and 1"),
        (["--sample", "--top-p", "1.5"], "top_p must be a share"),
        (["--workers", "-1"], "workers must be at least 0"),
        (["--beside", "jpg"], ".jpg is an ending of images"),
        (["--beside", "../x"], "is not the ending of a file"),
        (["--beside", "txt", "--output", "x.csv"], "choose one"),
        (["--exclude", "!"], "'!' is not a pattern of files"),
    ],
)
def test_options_that_do_not_fit_are_one_line(caption, images, options, message, capsys):
    assert caption(images, *options) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(images)) == ["a.jpg", "b.png", "c.webp"]


def test_a_prompt_begins_every_caption(caption, images, tmp_path):
    assert caption(images, "--output", tmp_path / "a.jsonl", "--prompt", "a dog ") == 0
    assert all(row["caption"].startswith("a dog") for row in rows_of(tmp_path / "a.jsonl"))


def test_captions_of_low_confidence_are_withheld_and_counted(caption, images, tmp_path, capsys):
    output = tmp_path / "a.csv"
    assert caption(images, "--output", output, "--min-confidence", "0.9") == 0
    assert all(not row["caption"] and "below 0.9" in row["error"] for row in rows_of(output))
    assert "3 of 3 images have no caption: below the least confidence" in capsys.readouterr().err
    assert caption(images, "--min-confidence", "0.9", "--captions", "2") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ending", ENDINGS)
def test_another_model_grid_or_search_does_not_continue_an_output(
    caption, images, tmp_path, ending, saved_model, make_model, capsys
):
    output = tmp_path / f"out.{ending}"
    assert caption(images / "a.jpg", "--output", output) == 0
    before = output.read_bytes()
    for options, message in (
        (["--grid", "3x3"], "was made with grid 2x2, not 3x3; change --grid or name another --output"),
        (["--num-beams", "2"], "was made with num_beams 1, not 2"),
        (["--captions", "2"], "was made with captions 1, not 2"),
        (["--sample"], "was made with sample no, not yes"),
        (["--prompt", "a cat"], "was made with prompt none, not a cat"),
    ):
        for inputs in (images, images / "a.jpg"):  # with something left to do, and without
            assert caption(inputs, "--output", output, "--resume", *options) == 1 or "num_beams" in message
        error = capsys.readouterr().err
        assert message.partition(" num_beams")[0] in error
        assert output.read_bytes() == before
    model = make_model()
    model.projector.fc1.weight.data += 1
    model.save_pretrained(saved_model)
    assert caption(images, "--output", output, "--resume") == 1
    assert "was made by the model" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_an_output_that_does_not_say_what_made_it_is_continued_with_a_note(caption, images, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert caption(images / "a.jpg", "--output", output) == 0
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["grid"] == "2x2"
    assert len(settings["weights"]) == 32
    (tmp_path / "out.jsonl.settings.json").unlink()
    assert caption(images, "--output", output, "--resume") == 0
    assert "does not record what made it" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.settings.json").exists()


def test_rows_of_several_captions_do_not_go_below_columns_of_one(caption, images, tmp_path, capsys):
    output = tmp_path / "out.csv"
    assert caption(images / "a.jpg", "--output", output) == 0
    (tmp_path / "out.csv.settings.json").unlink()
    before = output.read_bytes()
    assert caption(images, "--output", output, "--resume", "--captions", "2") == 1
    assert "out.csv' has other columns than these captions" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_parquet_is_written_at_the_end_and_a_kill_loses_nothing(caption, images, tmp_path, monkeypatch, capsys):
    output, lines = tmp_path / "out.parquet", tmp_path / "out.parquet.part.jsonl"
    write = Writer.write

    def stop(self, row):
        if row["path"].endswith("b.png"):
            raise KeyboardInterrupt
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", stop)
        assert caption(images, "--output", output) == 130
    assert not output.exists()
    assert len(lines.read_text().splitlines()) == 1
    capsys.readouterr()
    assert caption(images, "--output", output) == 1
    assert "out.parquet.part.jsonl' exists; pass --resume" in capsys.readouterr().err
    assert caption(images, "--output", output, "--resume") == 0
    assert [os.path.basename(row["path"]) for row in rows_of(output)] == ["a.jpg", "b.png", "c.webp"]
    Image.new("RGB", (9, 9)).save(images / "d.png")
    assert caption(images, "--output", output, "--resume") == 0
    assert len(rows_of(output)) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "model", "out.parquet"]
    assert json.loads(parquet.read_schema(output).metadata[b"captioner"])["grid"] == "2x2"


def test_parquet_holds_any_name_and_only_the_last_word_on_an_image(caption, tmp_path, monkeypatch):
    monkeypatch.setattr(caption_parquet, "ROWS", 2)
    folder, output = tmp_path / "named", tmp_path / "out.parquet"
    folder.mkdir()
    names = ["latin\udce9.png", "line\nfeed.png", "plain.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name, "PNG")
    whole = (folder / "plain.png").read_bytes()
    (folder / "plain.png").write_bytes(b"broken")
    assert caption(folder, "--output", output) == 1
    assert rows_of(output)[2]["error"]
    (folder / "plain.png").write_bytes(whole)
    assert caption(folder, "--output", output, "--resume") == 0
    assert [row["path"] for row in rows_of(output)] == [
        str(folder / name) for name in (r"latin\xe9.png", r"line\nfeed.png", "plain.png")
    ]
    assert all(row["error"] is None for row in rows_of(output))
    assert {row["path"] for row in caption_parquet.read_parquet(output)} == {str(folder / name) for name in names}


def test_another_parquet_file_is_not_continued(caption, images, tmp_path, capsys):
    for content in (b"no parquet", b"PAR1"):
        (tmp_path / "x.parquet").write_bytes(content)
        assert caption(images, "--output", tmp_path / "x.parquet", "--resume") == 1
        assert "x.parquet' is not what captioner caption writes" in capsys.readouterr().err


def test_caption_files_stand_beside_the_images(caption, images, capsys):
    assert caption(images, "--beside", "txt", "--prefix", "photo, ", "--suffix", ".") == 0
    assert "3 captions in *.txt files beside them" in capsys.readouterr().err
    texts = {name: (images / name).read_text() for name in ("a.txt", "b.txt", "c.txt")}
    assert all(text.startswith("photo, ") and text.endswith(".\n") for text in texts.values())
    assert caption(images, "--beside", ".txt") == 1
    assert "3 caption files exist, such as" in (error := capsys.readouterr().err)
    assert "pass --resume to go on with it or pass --overwrite" in error
    (images / "b.txt").unlink()
    (images / "c.txt").write_text("mine")
    assert caption(images, "--beside", "txt", "--resume", "--captions", "2") == 0
    assert "beside 2 from before" in capsys.readouterr().err
    assert (images / "a.txt").read_text() == texts["a.txt"]
    assert (images / "c.txt").read_text() == "mine"
    assert len((images / "b.txt").read_text().splitlines()) == 2
    assert caption(images, "--beside", "txt", "--resume") == 0
    assert "all 3 images are captioned in *.txt files beside them" in capsys.readouterr().err
    assert caption(images, "--beside", "txt", "--overwrite") == 0
    assert (images / "c.txt").read_text() != "mine"


def test_two_images_never_share_a_caption_file(caption, images, capsys, monkeypatch):
    Image.new("RGB", (9, 9)).save(images / "a.png")
    monkeypatch.chdir(images)
    assert caption(images, "a.png", "./a.jpg", "--beside", "txt") == 1
    error = capsys.readouterr().err
    assert error.count("is left out: its caption file") == 2
    assert "3 captions in" in error


def test_one_caption_file_that_cannot_be_written_stops_nothing(caption, images, capsys):
    (images / "b.txt").mkdir()
    assert caption(images, "--beside", "txt", "--overwrite") == 1
    error = capsys.readouterr().err
    assert "1 of 3 images could not be captioned: 1 caption file cannot be written" in error
    assert (images / "c.txt").is_file()


def test_patterns_choose_among_the_files_of_folders(caption, images, tmp_path, capsys):
    (images / "raw").mkdir()
    for name in ("raw/d.jpg", "e_thumb.jpg"):
        Image.new("RGB", (9, 9)).save(images / name)
    for options, names in (
        (["--include", "*.jpg"], ["a.jpg", "e_thumb.jpg", "raw/d.jpg"]),
        (["--include", "*.jpg", "--include", "*.png", "--exclude", "raw/"], ["a.jpg", "b.png", "e_thumb.jpg"]),
        (["--exclude", "*_thumb.*", "--exclude", "/*.png"], ["a.jpg", "c.webp", "raw/d.jpg"]),
    ):
        capsys.readouterr()
        assert caption(*options, images) == 0
        captured = capsys.readouterr()
        assert [line.split("\t")[0] for line in captured.out.splitlines()] == [str(images / name) for name in names]
        assert "excluded by the patterns" in captured.err
    assert caption(images / "e_thumb.jpg", "--exclude", "*_thumb.*") == 0  # named itself
    assert caption(images, "--include", "*.gif") == 1
    assert "no images in the folder" in capsys.readouterr().err
