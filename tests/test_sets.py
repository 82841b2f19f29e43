"""Several data sets at once: their names, weights, captions, ids, caches and scores."""

import json
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from training_runs import debug, losses, stop_at

import captioner
from captioner.commands.cache import CacheConfig, fill_cache
from captioner.commands.evaluate import EvaluateConfig, evaluate
from captioner.data.batches import CaptionStream, JoinedImages
from captioner.data.config import DataConfig, SourceConfig
from captioner.data.readers import read_captions
from captioner.data.sets import join_sets, read_sets, set_names
from captioner.errors import SettingError
from captioner.training.config import EncoderConfig
from captioner.training.data import TableData
from captioner.training.loop import train


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """A set of stripes with one caption an image, whose ids and names are those of other images in `captioned`."""
    root = tmp_path_factory.mktemp("single")
    for split, count in (("train", 8), ("val", 4)):
        content = {"images": [], "annotations": []}
        for number in range(count):
            image = Image.new("RGB", (40, 24), (10 * number, 0, 90))
            image.paste((250, 250, 0), (0, 0, 40, 3 * number + 2))
            image.save(root / f"{split}{number}.png")
            content["images"].append({"id": number, "file_name": f"{split}{number}.png"})
            content["annotations"].append({"image_id": number, "caption": f"a yellow stripe of size {number}"})
        (root / f"captions_{split}.json").write_text(json.dumps(content))
    return root


def data_of(*roots, **kwargs):
    return DataConfig(root=tuple(map(str, roots)), workers=0, captions_per_image=2, **kwargs)


def test_names_are_those_of_folders_or_files(tmp_path, write):
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    file = tmp_path / "coco" / "annotations" / "captions_val.json"
    file.write_text("{}")
    one, other = write("one.csv", ""), write("other.csv", "")
    name = tmp_path.name
    assert set_names([str(tmp_path), str(file), "owner/photos"]) == [name, "coco", "photos"]
    assert set_names([str(one), str(other)]) == [f"{name}_one", f"{name}_other"]
    assert len(set(set_names(["a/x", "b/x", "c/x"]))) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourceConfig(root=("a", "b", "./a/")), "the data set './a/' is named twice"),
        (lambda: data_of("a", "b", weights=(1.0,)), "there are 1 weights for 2 data sets"),
        (lambda: data_of("a", "b", weights=(1.0, 0.0)), "weights must be positive, not 1.0 0.0"),
        (lambda: data_of("a", "b", "c", tokens=("x", "y")), "tokens has 2 values for the 3 data sets of root"),
        (
            lambda: data_of("a", "b", val_root="c", images=("x", "y")),
            "images has 2 values for the 1 data sets of",
        ),
        (lambda: data_of("a", "b", streaming=True), "streaming reads one data set, and several are named"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_an_epoch_has_each_image_as_often_as_its_weight(captioned, single, processor):
    data = TableData(data_of(captioned, single, weights=(0.5, 2.0)))
    assert len(data) == 16 + 16
    stream = data.stream(processor, 2, 0, [])
    epochs = [Counter(stream.order(epoch).tolist()) for epoch in range(2)]
    for found in epochs:
        assert all(found[row] == 2 for row in range(32, 40))
        assert sorted(found[row] for row in range(32)) == [0] * 16 + [1] * 16
    assert epochs[0] != epochs[1]
    plain = TableData(data_of(captioned, single)).stream(processor, 2, 0, [])
    alone = CaptionStream(data.table, processor, 2, seed=0)
    assert [plain.choose(i, 0) for i in range(80)] == [alone.choose(i, 0) for i in range(80)]


def test_an_image_with_one_caption_has_it_once(captioned, single, processor, make_model):
    data = TableData(data_of(captioned, single))
    stream = data.stream(processor, 2, 0, [])
    items = [stream.load(0, 0), stream.load(35, 1), stream.load(1, 2)]
    batch = stream.collate([item | {"place": 0} for item in items])
    assert batch["owners"].tolist() == [0, 0, 1, 2, 2]
    assert batch["rows"].tolist() == [0, 35, 1]
    model, tokens = make_model(), torch.randn(3, 5, 32)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = model.logits_at(image_tokens=tokens, owners=batch["owners"], **text)
    repeated = model.logits_at(image_tokens=tokens[batch["owners"]], **text)
    assert torch.allclose(found, repeated, atol=1e-5)


def test_ids_of_text_and_numbers_are_joined(captioned, write, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    table = write("table.csv", "image,caption,split\nx.png,a dot,train\n")
    joined = join_sets(read_sets(data_of(captioned, table), "train"))
    assert joined["image_id"][:][-2:] == ["31", "x.png"]


def test_a_set_may_lack_the_validation_split(captioned, write, tmp_path, caplog):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    table = write("table.csv", "image,caption\nx.png,a dot\n")
    data = data_of(captioned, table)
    assert [part is None for part in read_sets(data, "val", some=True)] == [False, True]
    assert "table.csv' has no split 'val'" in caplog.text
    with pytest.raises(SettingError, match="no split 'val'"):
        read_sets(data, "val")
    config = replace(debug(captioned, tmp_path), data=data_of(table))
    with pytest.raises(SettingError, match="no split 'val'") as raised:
        train(config)
    assert raised.value.settings == ("val_split", "val_root")


@pytest.fixture(scope="session")
def both(captioned, single, tmp_path_factory):
    """The settings and folder of a run on two sets that was never stopped."""
    config = debug(captioned, tmp_path_factory.mktemp("both"), epochs=1.5, evaluate_every=0.75, log_every=1)
    config = replace(config, data=data_of(captioned, single, weights=(0.5, 1.5)))
    train(config)
    return config


def test_each_set_is_scored_and_the_mean_decides(both, captioned, single):
    records = [json.loads(line) for line in (both.output / "log.jsonl").read_text().splitlines()]
    found = [record for record in records if "CIDEr" in record]
    names = [captioned.name, single.name]
    assert len(found) == 3
    for record in found:
        for key in ("CIDEr", "BLEU-4", "loss_val"):
            mean = sum(record[f"{key}/{name}"] for name in names) / 2
            assert record[key] == pytest.approx(mean, abs=1e-6)
    page = sorted((both.output / "samples").iterdir())[-1].read_text()
    assert page.count("<h2>") == 2
    assert page.count("<img") == 8 + 4
    assert f"loss_val/{single.name}" in (both.output / "curves.svg").read_text()


def test_a_resumed_run_on_two_sets_equals_an_unbroken_one(both, captioned, single, tmp_path, monkeypatch):
    config = replace(both, output=tmp_path)
    stop_at(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(config)
    monkeypatch.undo()
    with pytest.raises(SettingError, match="was saved with data.weights"):
        train(replace(config, data=data_of(captioned, single)))
    train(config)
    assert losses(tmp_path) == losses(both.output)


def test_sets_share_a_cache_or_have_one_each(captioned, single, both, tmp_path):
    encoder = EncoderConfig(both.model.encoder)
    with pytest.raises(SettingError, match=r"different images have the id and name '0 train0.png' .* own"):
        fill_cache(CacheConfig(output=tmp_path / "one", data=data_of(captioned, single), model=encoder, grids=("3x3",)))
    for name, root in (("a", captioned), ("b", single)):
        fill_cache(CacheConfig(output=tmp_path / name, data=data_of(root), model=encoder, grids=("3x3",)))
    config = replace(both, output=tmp_path / "run", data=replace(both.data, tokens=(tmp_path / "a", tmp_path / "b")))
    train(config)
    assert losses(tmp_path / "run") == pytest.approx(losses(both.output), abs=2e-3)
    assert losses(tmp_path / "run", "CIDEr").keys() == losses(both.output, "CIDEr").keys()
    with pytest.raises(SettingError, match="different images have the id and name"):
        train(replace(config, output=tmp_path / "d", data=replace(both.data, tokens=(tmp_path / "a",))))
    fill_cache(CacheConfig(output=tmp_path / "c", data=data_of(single), model=encoder, grids=("3x3",), views=2))
    with pytest.raises(SettingError, match="the token caches hold 1 and 2 views"):
        train(replace(config, output=tmp_path / "d", data=replace(both.data, tokens=(tmp_path / "a", tmp_path / "c"))))


def test_joined_images_are_those_of_their_sets(captioned, single, processor):
    from captioner.data.batches import ImageFiles

    parts = [ImageFiles(read_captions(root, "train"), processor) for root in (captioned, single)]
    images = JoinedImages(parts)
    assert len(images) == 40
    batch = images.batch([images.open(n) for n in (33, 0, 39)], grid=(2, 2))
    expected = [parts[1].open(1), parts[0].open(0), parts[1].open(7)]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))
    assert batch["grid"] == (2, 2)


def test_each_set_is_evaluated_in_its_own_folder(captioned, single, saved_model, tmp_path, no_java):
    config = EvaluateConfig(
        model=str(saved_model), data=data_of(captioned, single), split="val", output=tmp_path, num_beams=1, limit=3
    )
    scores = evaluate(config)
    assert list(scores) == [captioned.name, single.name]
    for root in (captioned, single):
        saved = json.loads((tmp_path / root.name / "scores.json").read_text())
        assert saved["corpus"]["CIDEr"] == scores[root.name]["CIDEr"]
        assert len(json.loads((tmp_path / root.name / "results.json").read_text())) == 3
    assert evaluate(config).keys() == scores.keys()
    with pytest.raises(SettingError, match=f"holds run_config.json and {captioned.name}.results.json"):
        evaluate(replace(config, limit=2))


def test_the_captioner_of_two_sets_is_a_captioner(both, captioned):
    captions = captioner.load(both.output / "best")([captioned / "images" / "val0.png"])
    assert len(captions) == 1
