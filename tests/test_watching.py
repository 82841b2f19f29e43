"""What people watch: samples, curves, trackers, the log."""

import re
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from training_runs import debug, losses

from captioner.report.curves import write_curves
from captioner.runs.progress import progress_bar
from captioner.training.config import ScstConfig
from captioner.training.loop import train

SVG = "{http://www.w3.org/2000/svg}"


def curves(path):
    """Points (x, y) of each curve by its name, in px from the top left."""
    root = ElementTree.parse(path).getroot()
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class", "").startswith("curve ")]
    lines = {group.get("class").removeprefix("curve "): group.find(f"{SVG}path").get("d") for group in groups}
    return {name: [tuple(map(float, p.split())) for p in d.strip("M ").split("L")] for name, d in lines.items()}


@pytest.fixture(scope="module")
def finished(captioned, tmp_path_factory):
    output = tmp_path_factory.mktemp("watched")
    config = debug(captioned, output, epochs=2, trackers=("tensorboard",))
    train(config)
    train(replace(config, stage="scst", scst=ScstConfig(samples=2, baseline="greedy")))
    return output


def test_each_validation_leaves_a_page_of_samples_that_needs_nothing_else(finished):
    pages = sorted(path.name for path in (finished / "samples").iterdir())
    assert pages == ["step_00000004.html", "step_00000008.html"]
    page = (finished / "samples" / pages[-1]).read_text()
    assert page.count("<img") == 8
    assert page.count('src="data:image/webp;base64,') == 8
    assert "this image is all red ." in page
    assert not re.search(r"https?:|<script|(src|href)=\"(?!data:)|@import|url\(", page)
    HTMLParser().feed(page)


def test_captions_cannot_break_the_page(captioned, finished, tmp_path):
    from accelerate import Accelerator

    from captioner.data.readers import read_captions
    from captioner.report.samples import write_samples

    table = read_captions(captioned, "val").select([0])
    results = [{"image_id": 0, "caption": "</p><script>alert(1)</script>"}]
    write_samples(Accelerator(cpu=True), [("set", table, results)], {"step": 1, "CIDEr": 0.5}, tmp_path / "samples")
    page = (tmp_path / "samples" / "step_00000001.html").read_text()
    assert "<script" not in page
    assert "CIDEr 0.5000" in page


def test_the_run_is_drawn(finished):
    found = curves(finished / "curves.svg")
    assert list(found) == ["loss", "loss_val", "CIDEr"]
    assert [x for x, _ in found["loss"]] == sorted(x for x, _ in found["loss"])
    assert found["loss"][0][1] < found["loss"][-1][1]  # the loss falls: in SVG, y grows downwards
    assert found["loss"][-1][0] == found["loss_val"][-1][0] == found["CIDEr"][-1][0]  # the last step of each
    assert {"reward", "reward_greedy"} < set(curves(finished / "scst" / "curves.svg"))


def test_a_curve_without_a_slope_is_drawn(tmp_path):
    write_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}], tmp_path / "curves.svg")
    (start, end) = curves(tmp_path / "curves.svg")["loss"]
    assert start[1] == end[1]
    assert start[0] < end[0]
    for few in ([], [{"step": 1, "loss": 2.0}]):  # one value is not a curve yet
        write_curves(few, tmp_path / "empty.svg")
        assert curves(tmp_path / "empty.svg") == {}


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.003, 0.0041), (1, 100_000), (-3, 2), (5.25, 5.75)])
def test_axes_are_labelled_with_a_few_round_numbers(tmp_path, low, high):
    write_curves([{"step": 1, "loss": low}, {"step": 20, "loss": high}], tmp_path / "curves.svg")
    texts = [element.text for element in ElementTree.parse(tmp_path / "curves.svg").getroot().iter(f"{SVG}text")]
    numbers = [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts[: texts.index("Loss")] if text != "step"]
    assert 6 <= len(numbers) <= 20  # of both axes
    assert all(len(text) <= 7 for text in texts)


def test_a_run_is_drawn_alike_each_time(tmp_path):
    records = [{"step": step, "loss": 1 / step, "CIDEr": step / 9} for step in range(1, 9)]
    for name in ("a.svg", "b.svg"):
        write_curves(records, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_trackers_get_numbers_images_and_captions(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next((finished / "captioner").glob("events*"))
    seen = EventAccumulator(str(events.parent), size_guidance={"images": 0}).Reload()
    assert {"loss", "CIDEr", "BLEU-4", "loss_val", "learning_rate", "tokens_per_s"} <= set(seen.Tags()["scalars"])
    assert [event.step for event in seen.Scalars("CIDEr")] == [4, 8]
    assert "samples" in seen.Tags()["images"]
    assert "samples/text_summary" in seen.Tags()["tensors"]


def test_a_tracker_that_is_not_there_is_said_to_be_missing(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr("captioner.runs.log.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="the tracker 'wandb' needs its package: pip install wandb"):
        train(debug(captioned, tmp_path, trackers=("tensorboard", "wandb")))
    with pytest.raises(ValueError, match="no tracker named 'wandbb'; accelerate has .*wandb"):
        train(debug(captioned, tmp_path, trackers=("wandbb",)))
    assert list(tmp_path.iterdir()) == []


def test_off_a_terminal_progress_is_told_each_minute(monkeypatch, capsys):
    list(progress_bar(range(3), desc="encoding"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("captioner.runs.progress.MINUTE", 0.01)
    for _ in progress_bar(range(3), desc="encoding", mininterval=0):
        time.sleep(0.02)
    told = [line.partition("|")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["encoding:  33%", "encoding:  67%", "encoding: 100%"]


def test_the_log_says_how_fast_and_how_long(finished):
    assert list(losses(finished, "tokens_per_s")) == list(range(1, 9))
    left = losses(finished, "minutes_left")
    assert list(left) == list(range(2, 9))
    assert left[8] == 0
    assert set(losses(finished / "scst", "reward_greedy")) == set(range(1, 9))
    assert all(0 < cost < 1000 for cost in losses(finished / "scst", "reward_ms").values())
