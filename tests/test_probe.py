"""`captioner probe`: ridge probes of frozen encoders, on images or on a token cache."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import run
from training_runs import COLOURS

from captioner.commands.cache import fill_cache
from captioner.commands.probe import ProbeConfig, probe
from captioner.metrics.multilabel import average_precision
from captioner.pretraining.ridge_probe import (
    RidgeProbe,
    explained_variance,
    mean_precision,
    measure,
    micro_precision,
    probe_labels,
    probe_words,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny stock ViT, exported to a folder."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    save_for_hf(model, folder, model_config={"num_classes": 0}, model_args=options, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture
def labels(captioned, tmp_path):
    """Labels of all images of `captioned` but one: which are red, which are green or white."""
    kinds = {"red": [0], "green": [1], "blue": [], "white": [1]}
    names = list(COLOURS)
    found = {f"{s}{n}.png": kinds[names[n % 4]] for s, count in (("train", 32), ("val", 8)) for n in range(count)}
    del found["train31.png"]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"classes": ["red", "bright", "absent"], "images": found}))
    return path


def test_average_precision_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, np.array([1, 0, 1, 0])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores, np.array([0, 0, 0, 1])) == pytest.approx(1 / 4)
    assert average_precision(np.zeros(4), np.array([0, 1, 0, 0])) == pytest.approx(1 / 4)  # a tie is one threshold
    assert np.isnan(average_precision(scores, np.zeros(4)))
    truth = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    both = np.stack([scores, scores], 1)
    assert mean_precision(both, truth) == pytest.approx(5 / 6)  # the second target is true of no image
    assert micro_precision(both, truth) == pytest.approx((1 * 1 / 2 + 1 * 2 / 6) / 2)


def test_explained_variance_of_the_mean_and_of_the_truth():
    targets = np.random.default_rng(0).random((50, 3))
    assert explained_variance(targets, targets) == 1
    assert explained_variance(np.tile(targets.mean(0), (50, 1)), targets) == pytest.approx(0)
    assert explained_variance(1 - targets, targets) < 0


def test_intervals_hold_the_figure_and_shrink():
    generator = np.random.default_rng(1)
    widths = []
    for count in (100, 1600):
        truth = generator.random((count, 4)) < 0.4
        found = measure(mean_precision, truth + generator.normal(size=truth.shape), truth)
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2
    nothing = measure(mean_precision, np.zeros((3, 2)), np.zeros((3, 2)))
    assert str(nothing) == "absent"
    assert nothing.to_dict()["value"] is None


def linear_data(count, noise, width=12):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, width, generator=generator) * 3 + 5
    logits = (features[:, :3] - 5) + noise * torch.randn(count, 3, generator=generator)
    return features, (logits > 1).float()


def test_a_ridge_probe_finds_what_is_linear_and_nothing_else():
    features, targets = linear_data(600, 0.1)
    half = slice(0, 400), slice(400, None)
    fit, held_out = ((features[part], targets[part]) for part in half)
    found = probe_labels(fit, held_out, ["a", "b", "c"])
    assert found["mAP"].value > 0.98
    assert found["per class"].keys() == {"a", "b", "c"}
    assert (found["fitted"], found["measured"]) == (400, 200)
    shuffled = targets[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    chance = probe_labels(*((features[part], shuffled[part]) for part in half), ["a", "b", "c"])
    assert chance["mAP"].value < 0.55  # a third is true
    words = probe_words(fit, held_out, ["a", "b", "c"])
    assert 0.3 < words["R2"].value < 1
    assert probe_words(*((features[part], shuffled[part]) for part in half), ["a", "b", "c"])["R2"].value < 0.02


def test_the_penalty_is_chosen_on_the_fitted_images():
    plenty = RidgeProbe(*linear_data(600, 0.1))
    features, _ = linear_data(60, 0.1, width=100)
    noise = torch.rand(60, 5, generator=torch.Generator().manual_seed(2)).round()
    few = RidgeProbe(features, noise)
    assert plenty.penalty < 1 <= few.penalty
    assert plenty.explained > 0.4
    assert few.explained < 0.05


def test_the_command_probes_captions_and_labels(captioned, encoder, labels, tmp_path, capsys):
    output = tmp_path / "probe.json"
    args = ["--encoders", encoder, "--captions", captioned, "--labels", labels, "--workers", 0]
    assert run("probe", *args, "--output", output, "--grids", "1x1", "2x2") == 0
    printed = capsys.readouterr().out
    assert "5 x 24" in printed
    assert "labels: 2, fitted on 31 images, measured on 8" in printed
    found = json.loads(output.read_text())["probes"]
    assert [record["grid"] for record in found] == ["1x1", "2x2"]
    for record in found:
        assert record["labels"]["mAP"]["value"] > 0.9  # of plain colours
        assert record["labels"]["per class"].keys() == {"red", "bright"}
        assert record["words"]["fitted"] == 32
        assert record["words"]["per word"]["red"]["AP"] > 0.9
        assert record["words"]["per word"]["square"]["R2"] is None  # in half of each image's captions
        assert record["features"] == 3 * 24
    assert run("probe", *args, "--output", output) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_held_out_images_are_never_fitted_on(captioned, encoder, labels, tmp_path):
    val = captioned / "annotations" / "captions_val.json"
    base = {"encoders": (encoder,), "labels": labels, "images": (str(captioned / "images"),), "workers": 0}
    found = probe(ProbeConfig(**base, held_out=(val,)))[0]["labels"]
    assert (found["fitted"], found["measured"]) == (31, 8)
    found = probe(ProbeConfig(**base))[0]["labels"]  # a fifth, by name
    assert found["fitted"] + found["measured"] == 39
    assert 2 < found["measured"] < 16
    found = probe(ProbeConfig(**base, held_out=(val,), num_images=5))[0]["labels"]
    assert (found["fitted"], found["measured"]) == (5, 5)
    again = tmp_path / "again"  # a validation image is among those to fit on, too
    shutil.copytree(captioned, again)
    train = again / "annotations" / "captions_train.json"
    content = json.loads(train.read_text())
    content["images"][0]["file_name"] = "val0.png"
    train.write_text(json.dumps(content))
    found = probe(ProbeConfig(encoders=(encoder,), captions=(str(again),), workers=0))[0]["words"]
    assert (found["fitted"], found["measured"]) == (31, 8)


def test_a_token_cache_gives_the_same_figures(captioned, encoder, labels, cache_config, tmp_path):
    from captioner.training.config import EncoderConfig

    settings = cache_config(tmp_path / "tokens", root=captioned, grids=("2x2",), model=EncoderConfig(encoder), views=2)
    fill_cache(settings)
    base = {"captions": (str(captioned),), "labels": labels}
    cached = probe(ProbeConfig(**base, tokens=tmp_path / "tokens"))[0]
    fresh = probe(ProbeConfig(**base, encoders=(encoder,), grids=("2x2",), workers=0))[0]
    assert cached["grid"] == fresh["grid"] == "2x2"
    for kind in ("labels", "words"):
        assert cached[kind]["mAP"].value == pytest.approx(fresh[kind]["mAP"].value, abs=0.02)
        assert cached[kind]["fitted"] == fresh[kind]["fitted"]
    assert cached["words"]["R2"].value == pytest.approx(fresh["words"]["R2"].value, abs=0.01)
    alone = probe(ProbeConfig(labels=labels, tokens=tmp_path / "tokens", held_out=(captioned / VAL,)))[0]["labels"]
    assert (alone["fitted"], alone["measured"]) == (31, 8)


VAL = "annotations/captions_val.json"


def test_an_image_that_cannot_be_opened_is_left_out(captioned, encoder, labels, tmp_path, caplog):
    broken = tmp_path / "broken"
    shutil.copytree(captioned / "images", broken)
    (broken / "train3.png").write_bytes(b"no image")
    config = ProbeConfig(encoders=(encoder,), labels=labels, images=(str(broken),), held_out=(captioned / VAL,))
    assert probe(config)[0]["labels"]["fitted"] == 30
    assert "train3.png" in caplog.text


def test_faults_are_one_line(captioned, encoder, labels, tmp_path, capsys, write):
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png")
    images = captioned / "images"
    twice = write("twice.json", {"classes": ["a"], "images": {"other.png": [0]}})
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "other.png", tmp_path / "more" / "other.png")
    base = "--encoders", encoder, "--workers", 0
    for args, message in (
        (base, "neither captions nor labels to probe for; give --captions or --labels"),
        ((*base, "--labels", labels), "none of the images is labelled in"),
        ((*base, "--labels", labels, "--images", tmp_path / "gone"), "no images at"),
        ((*base, "--labels", twice, "--images", tmp_path), "two images are named 'other.png'"),
        ((*base, "--captions", captioned, "--val-split", "test"), "that hold all splits"),
        ((*base, "--captions", captioned, "--grids", "9x9"), "compressed grid 9x9 is not within"),
        (("--encoders", "nothing_at_all", "--captions", captioned), "no encoder named 'nothing_at_all'"),
        (("--tokens", tmp_path, "--captions", captioned), "no token cache at"),
        (("--tokens", tmp_path, "--batch-size", 4, "--captions", captioned), "--batch-size has no effect"),
        ((*base, "--images", images, "--captions", captioned), "--images has no effect"),
        ((*base, "--num-words", 0, "--captions", captioned), "num_words must be positive"),
    ):
        assert run("probe", *args) in (1, 2), args
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1], error
