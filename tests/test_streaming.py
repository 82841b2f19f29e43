import io
import os
import signal
import tracemalloc
from collections import Counter
from dataclasses import replace

import datasets
import fsspec
import numpy as np
import pyarrow
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from test_cli import run
from training_runs import COLOURS, debug, debug_args, launch, losses, stop_at

import captioner
from captioner.data import rows
from captioner.data.config import DataConfig
from captioner.data.row_stream import RowStream
from captioner.data.rows import StreamedRows, read_first, shuffled
from captioner.data.stream import raise_errors
from captioner.errors import SettingError
from captioner.images import ImageError
from captioner.training.config import TrainConfig
from captioner.training.data import open_data
from captioner.training.loop import train

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("int64"),
    }
)


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


def split(count, broken=(), silent=()):
    """Rows of plain colours; some are no image, some have no caption."""
    names = [list(COLOURS)[n % 4] for n in range(count)]
    images = [{"bytes": b"noise" if n in broken else png(COLOURS[name]), "path": None} for n, name in enumerate(names)]
    texts = [[" "] if n in silent else [f"a plain {name} {n}", f"all {name} {n} ."] for n, name in enumerate(names)]
    rows = {"image": images, "captions": texts, "image_id": list(range(count))}
    return datasets.Dataset.from_dict(rows, features=FEATURES)


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a set as `datasets` does, or as parquet files in three shards."""

    def save(count=20, kind="saved", **kwargs):
        folder, rows, val = tmp_path / kind, split(count, **kwargs), split(8)
        if kind == "saved":
            datasets.DatasetDict({"train": rows, "val": val}).save_to_disk(folder)
        else:
            folder.mkdir()
            for shard in range(3):
                rows.shard(3, shard).to_parquet(folder / f"train-{shard}.parquet")
            val.to_parquet(folder / "validation-0.parquet")
        return str(folder)

    return save


def stream(source, processor, buffer=5, seed=0, **kwargs):
    return RowStream(StreamedRows(source, "train"), processor, 2, seed, buffer, **kwargs)


def numbers(items):
    """Say which rows items are of, by the number in their captions."""
    return [int(item["captions"][0].removesuffix(" .").split()[-1]) for item in items]


def config(source, output, **kwargs):
    made = debug(source, output, **kwargs)
    return replace(made, data=replace(made.data, streaming=True, stream_buffer=5))


@pytest.mark.parametrize("kind", ["saved", "parquet"])
@pytest.mark.parametrize("buffer", [3, 100])
def test_an_epoch_is_every_row_once_in_a_fresh_order(saved, processor, kind, buffer):
    items = stream(saved(kind=kind), processor, buffer)
    assert len(items.rows) == 20
    epochs = [numbers(items.__getitems__(list(range(20 * e, 20 * e + 20)))) for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_shuffle_buffer_holds_no_more_than_its_size():
    read = []
    rows = shuffled((read.append(n) or {"n": n} for n in range(50)), 10, np.random.default_rng(0))
    for had, _ in enumerate(rows, 1):
        assert len(read) <= had + 10


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_share_what_one_reads(saved, processor, workers):
    source = saved(kind="parquet")
    batches = {}
    for processes, size in ((1, 4), (2, 2)):
        for index in range(processes):
            items = stream(source, processor)
            loader = items.loader(0, 40, size, workers, items.collate)
            loader = prepare_data_loader(loader, num_processes=processes, process_index=index)
            batches[processes, index] = list(loader)
    assert len(batches[1, 0]) == len(batches[2, 0]) == len(batches[2, 1]) == 10
    for whole, first, second in zip(batches[1, 0], batches[2, 0], batches[2, 1], strict=True):
        assert whole["pixel_values"].equal(torch.cat([first["pixel_values"], second["pixel_values"]]))
        theirs = [row[row >= 0].tolist() for part in (first, second) for row in part["labels"]]
        assert [row[row >= 0].tolist() for row in whole["labels"]] == theirs
    assert set(batches[1, 0][0]) == {"pixel_values", "owners", "input_ids", "attention_mask", "labels"}


def test_any_position_is_what_reading_from_the_start_finds(saved, processor):
    source = saved()
    whole = stream(source, processor)
    expected = [whole[i]["captions"] for i in range(50)]
    for start in (0, 7, 20, 33):
        later = stream(source, processor)
        assert [item["captions"] for item in later.__getitems__(list(range(start, 50)))] == expected[start:]
    assert whole[3]["captions"] == expected[3]


def test_bad_rows_are_counted_and_the_next_takes_their_place(saved, processor, caplog):
    items = stream(saved(broken=(3, 4), silent=(9,)), processor)
    found = Counter(numbers(items.__getitems__(list(range(20)))))
    assert set(range(20)) - set(found) == {3, 4, 9}
    assert sum(found.values()) == 20
    assert [record.getMessage()[-9:] for record in caplog.records] == ["1 so far)", "2 so far)", "3 so far)"]
    assert "skipped: image 9: it has no caption" in caplog.text
    assert "skipped: image 3: image in memory is not an image" in caplog.text


def test_bad_rows_can_be_refused_and_only_bad_rows_are_not_data(saved, processor):
    source = saved(broken=range(20))
    with pytest.raises(SettingError, match=r"image \d+: image in memory is not an image") as raised:
        stream(source, processor, on_bad="refuse")[0]
    assert raised.value.settings == ("on_bad",)
    with pytest.raises(ValueError, match="20 images in a row cannot be used"):
        stream(source, processor)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_loading_process_is_one_line_and_has_its_settings(saved, processor, workers):
    refusing = stream(saved(broken=(3,)), processor, on_bad="refuse")
    with pytest.raises(SettingError) as raised:
        list(raise_errors(refusing.loader(0, 20, 4, workers, refusing.collate)))
    assert str(raised.value) == "image 3: image in memory is not an image of a supported format"
    assert raised.value.settings == ("on_bad",)


def test_a_row_may_hold_one_text_and_the_name_of_an_image(tmp_path, processor):
    rows = {"file": [f"{name}.png" for name in COLOURS], "text": [f"all {name}" for name in COLOURS]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "set")
    for name, colour in list(COLOURS.items())[1:]:
        (tmp_path / "set" / f"{name}.png").write_bytes(png(colour))
    opened = StreamedRows(str(tmp_path / "set"), "train", ("file", "text", "image_id"))
    items = RowStream(opened, processor, 2, 0).__getitems__([0, 1, 2, 3])
    assert {tuple(item["captions"]) for item in items} == {(f"all {name}",) for name in list(COLOURS)[1:]}
    assert opened.first_captions() == rows["text"]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_validation_reads_the_first_rows(saved, kind):
    val = {"saved": "val", "parquet": "validation"}[kind]
    data = DataConfig(root=saved(kind=kind), val_split=val, streaming=True)
    train, ((_, _, table),) = open_data(TrainConfig(data=data, evaluate_images=3))
    assert table["image_id"][:] == [0, 1, 2]
    assert table[0]["captions"] == ["a plain red 0", "all red 0 ."]
    assert isinstance(table[0]["image"]["bytes"], bytes)
    assert len(train) == 20
    assert train.captions()[:2] == ["a plain red 0", "all red 0 ."]


def test_an_epoch_has_the_rows_asked_for(saved, processor):
    source = saved()
    short = RowStream(StreamedRows(source, "train", size=6), processor, 2, 0, 5)
    assert len(set(numbers(short.__getitems__(list(range(6)))))) == 6
    long = RowStream(StreamedRows(source, "train", size=21), processor, 2, 0, 5)
    with pytest.raises(SettingError, match="has 20 rows, not 21") as raised:
        long[20]
    assert raised.value.settings == ("stream_rows",)


def test_a_hub_set_that_does_not_know_its_rows_asks(saved, monkeypatch):
    builder = datasets.load_dataset_builder("parquet", data_dir=saved(kind="parquet"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path: builder)
    monkeypatch.setattr(rows, "check_hub", lambda source: None)
    with pytest.raises(SettingError, match="the number of rows of") as raised:
        StreamedRows("somebody/set", "train")
    assert raised.value.settings == ("stream_rows",)
    assert len(StreamedRows("somebody/set", "train", size=7)) == 7
    builder.info.splits = datasets.SplitDict.from_split_dict([{"name": "train", "num_examples": 20}])
    assert len(StreamedRows("somebody/set", "train")) == 20


def test_images_that_are_files_on_the_hub_are_fetched(saved, monkeypatch):
    monkeypatch.setattr(rows, "HUB", "memory://hub/")
    with fsspec.open("memory://hub/there.png", "wb") as file:
        file.write(png("red"))
    there, gone = ({"image": {"path": f"memory://hub/{name}.png", "bytes": None}} for name in ("there", "gone"))
    opened = StreamedRows(saved(), "train")
    assert opened.image(there) == rows.fetched(there, "image")["image"]["bytes"] == png("red")
    assert rows.fetched(gone, "image") == gone
    with pytest.raises(ImageError, match="'memory://hub/gone.png' cannot be read"):
        opened.image(gone)
    with pytest.raises(ImageError, match="column 'image' holds no image"):
        opened.image({"image": 7})


def test_a_stream_is_never_all_in_memory(tmp_path):
    size, count = 2**18, 64
    content = {
        "image": [{"bytes": os.urandom(size), "path": None} for _ in range(count)],
        "captions": [["a"]] * count,
        "image_id": list(range(count)),
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(content, features=FEATURES)}).save_to_disk(
        tmp_path / "set"
    )
    opened = StreamedRows(str(tmp_path / "set"), "train")
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    for _ in opened.epoch(0, 0, 4):
        assert pyarrow.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1] < size * count / 4
    tracemalloc.stop()


def test_what_cannot_be_streamed_is_refused_in_one_line(saved, captioned, tmp_path):
    source = saved()
    missing = ("photo", "captions", "image_id")
    cases = [
        (lambda: StreamedRows(source, "test"), "has no split 'test', only train, val"),
        (lambda: StreamedRows(source, "train", missing), "has no column 'photo', only image, captions, image_id"),
        (lambda: read_first(source, "val", missing, 2, "skip"), "has no column 'photo', only image, captions"),
        (lambda: StreamedRows("nobody/nothing", "train"), "'nobody/nothing'"),
        (lambda: StreamedRows(str(captioned), "train"), "no `datasets` set and no folder of parquet files"),
        (lambda: DataConfig(streaming=True, tokens=tmp_path), "a token cache cannot be used with it"),
        (lambda: DataConfig(stream_buffer=0), "stream_buffer must be positive"),
        (lambda: DataConfig(workers=-1), "workers must not be negative"),
        (lambda: TrainConfig(data=DataConfig(streaming=True), stage="scst"), "needs the captions of all images"),
        (lambda: open_data(TrainConfig(data=DataConfig(streaming=True))), "no captions: name"),
    ]
    for attempt, said in cases:
        with pytest.raises(ValueError, match=said) as raised:
            attempt()
        assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="no data set at"):
        StreamedRows(str(tmp_path / "gone"), "train")


@pytest.mark.parametrize("command", ["cache", "evaluate"])
@pytest.mark.parametrize(
    "option", [["--data.streaming"], ["--data.captions-per-image", "3"], ["--data.val-split", "a"]]
)
def test_settings_of_training_are_no_options_of_other_jobs(saved, capsys, command, option):
    assert run(command, "--data.root", saved(), *option) == 2
    assert option[0] in capsys.readouterr().err


def test_captions_of_a_row_are_read_as_those_of_a_table(tmp_path, processor, caplog):
    texts = ["['all red', 'plain red']", "nan", "[1, 2]", "all blue"]
    rows = {"image": [{"bytes": png("red"), "path": None}] * 4, "captions": [[text] for text in texts]}
    rows["captions"][3] += [" ", "null"]
    features = datasets.Features({name: FEATURES[name] for name in rows})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "set")
    opened = StreamedRows(str(tmp_path / "set"), "train")
    assert opened.first_captions() == ["all red", "plain red", "all blue"]
    items = RowStream(opened, processor, 2, 0, 4).__getitems__([0, 1, 2, 3])
    assert {tuple(sorted(item["captions"])) for item in items} == {("all red", "plain red"), ("all blue",)}
    assert "it has no caption, only 1 empty captions" in caplog.text
    assert "it has no caption, only 1 unreadable captions" in caplog.text
    assert "2 empty captions, left out (1 rows so far)" in caplog.text
    refusing = RowStream(opened, processor, 2, 0, 4, on_bad="refuse")
    with pytest.raises(SettingError, match="of the stream: .*(empty|unreadable) captions"):
        refusing.__getitems__([0, 1, 2, 3])


def test_a_streamed_run_cut_and_resumed_is_the_unbroken_one(saved, tmp_path, monkeypatch):
    source = saved(count=24, broken=(5,))
    whole = config(source, tmp_path / "whole", epochs=2)
    best = train(whole)
    assert captioner.load(best)(Image.new("RGB", (40, 40), "red")) is not None
    cut = config(source, tmp_path / "cut", epochs=2)
    with monkeypatch.context() as patched:
        stop_at(patched, 5, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(cut)
    assert max(losses(tmp_path / "cut")) == 5
    train(cut)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert losses(tmp_path / "cut", "CIDEr") == losses(tmp_path / "whole", "CIDEr")
    with pytest.raises(ValueError, match="saved with data.stream_buffer 5, this run has 6"):
        train(replace(cut, data=replace(cut.data, stream_buffer=6)))
    with pytest.raises(ValueError, match="saved with data.streaming True, this run has None"):
        train(replace(cut, data=replace(cut.data, streaming=False)))


@pytest.mark.slow
def test_two_processes_stream_as_one(saved, tmp_path):
    source = saved(count=24)
    shared = ["--data.streaming", "--data.stream-buffer", 5, "--data.workers", 2]
    shared += ["--epochs", 1, "--grids", "2x2", "3x3"]
    for processes, batch in ((1, 8), (2, 4)):
        args = [*debug_args(source, tmp_path / str(processes)), *shared, "--batch-size", batch]
        result = launch("train.py", *args, processes=processes)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-4)
