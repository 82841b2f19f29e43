"""Training of tag heads: from labels and captions, on the tokens of a frozen encoder."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import COLOURS, debug, small_encoder

import captioner
from captioner.commands.cache import CacheConfig, fill_cache
from captioner.commands.tags import run
from captioner.data.config import SourceConfig
from captioner.metrics.multilabel import average_precision, calibration_error, score_labels
from captioner.tag_head import TagConfig, TagHead, load_head
from captioner.tagging.config import TagDataConfig, TagsConfig
from captioner.tagging.fit import Targets, calibrate
from captioner.tagging.vocabulary import make_vocabulary
from captioner.tagging.words import frequent_nouns
from captioner.tags import TagVocabulary
from captioner.training.build import build_captioner
from captioner.training.config import EncoderConfig, ModelConfig
from captioner.training.loop import train

VOCABULARY = TagVocabulary.of_names([*COLOURS, "square", "warm"])


@pytest.fixture(scope="module")
def inputs(captioned, tmp_path_factory):
    """The colours, their vocabulary, labels of `warm` for half of the training images and all others, and tokens."""
    folder = tmp_path_factory.mktemp("tags")
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY.to_dict()))
    images = {f"{split}{n}.png": [0] if n % 4 == 0 else [] for split, n in files() if split == "val" or n < 16}
    (folder / "labels.json").write_text(json.dumps({"classes": ["warm", "odd"], "images": images}))
    (folder / "further").mkdir()
    for number in range(16):
        shutil.copy(captioned / "images" / f"train{number}.png", folder / "further" / f"other{number}.png")
    images |= {f"other{n}.png": [0] if n % 4 == 0 else [] for n in range(16)}
    (folder / "more.json").write_text(json.dumps({"classes": ["warm"], "images": images}))
    fill_cache(CacheConfig(folder / "tokens", SourceConfig(root=str(captioned), workers=0), model=encoder(), views=2))
    return folder


def files():
    return [("train", n) for n in range(32)] + [("val", n) for n in range(8)]


def encoder():
    return EncoderConfig(small_encoder(), image_size=96)


@pytest.fixture
def config(inputs, captioned, tmp_path):
    return TagsConfig(
        vocabulary=(str(inputs / "vocabulary.json"),),
        output=tmp_path / "head",
        captions=(str(captioned),),
        labels=inputs / "labels.json",
        val=(str(captioned),),
        data=TagDataConfig((inputs / "tokens",), workers=0),
        model=encoder(),
        hidden=32,
        epochs=30,
        batch_size=8,
        learning_rate=5e-3,
    )


def test_a_head_learns_from_mentions_and_labels(config, captioned, caplog, capsys):
    assert run(config) == 0
    head, settings = load_head(config.output, 192, 1)
    assert settings == TagConfig(VOCABULARY, 32, 0.35, 6)
    scores = json.loads((config.output / "scores.json").read_text())
    assert scores["images"] == {"train": 32, "val": 8}
    assert scores["mentions"]["mean_ap"] == scores["labels"]["mean_ap"] == 1
    assert scores["mentions"]["images"] == scores["labels"]["images"] == scores["both"]["images"] == 8
    rows = {row["tag"]: row for row in csv.DictReader((config.output / "tags.csv").open())}
    assert rows["warm"]["label_positives"] == "2"
    assert rows["square"]["label_ap"] == ""
    assert rows["square"]["mention_recall"] == "1.0"
    assert "1 of the 2 classes of" in caplog.text
    assert "such as 'odd', are no tags" in caplog.text
    assert "mAP 1.000" in capsys.readouterr().out
    assert head.multiplications == 3 * 192 * 32 + 32 * 6


def test_images_without_captions_are_encoded_and_learned_from(config, inputs, captioned, monkeypatch):
    """The head knows `warm` from images of a folder alone, and the second run reads their tokens from its own cache."""
    config = replace(config, labels=inputs / "more.json", images=(str(inputs / "further"),), captions=())
    run(config)
    assert json.loads((config.output / "scores.json").read_text())["labels"]["mean_ap"] == 1
    monkeypatch.setattr("captioner.data.encoding.open_image", None)
    run(replace(config, overwrite=True))


def test_a_tenth_is_held_out(config, inputs, captioned):
    other = replace(config, val=(), held_out=(captioned / "annotations" / "captions_val.json",))
    run(other)
    assert json.loads((config.output / "scores.json").read_text())["images"] == {"train": 28, "val": 4}


def test_an_unknown_tag_is_masked(config, inputs):
    """Labels say nothing of colours, and captions nothing of `warm`: neither counts as a tag that is absent."""
    labels = np.array([[np.nan, 1], [np.nan, np.nan]], np.float32)
    mentions = np.array([[0.5, 0.0], [np.nan, np.nan]], np.float32)
    targets = Targets.of(labels, mentions, mention_weight=3.0)
    assert targets.values.tolist() == [[0.5, 0.25], [0, 0]]
    assert targets.weights.tolist() == [[3, 4], [0, 0]]
    assert targets.known.tolist() == [0]
    assert targets.loss(torch.full((1, 2), 9.0), np.array([1])) == 0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"vocabulary": ()}, "no vocabulary"),
        ({"vocabulary": ("words:many",)}, "'words:many' is not of the form words:NUMBER"),
        ({"vocabulary": ("EMPTY",)}, "empty.txt': the vocabulary has no tag"),
        ({"vocabulary": ("FILE", "FILE")}, "has the tag 'red' twice"),
        ({"vocabulary": ("ABSENT",)}, "No such file"),
        ({"vocabulary": ("OTHER",)}, "none of the 2 classes of the labels, such as 'warm', is a tag"),
        ({"captions": (), "images": (), "val": ()}, "no images to train on"),
        ({"data": TagDataConfig(workers=0), "model": EncoderConfig("window_nothing")}, "window_nothing"),
        ({"model": EncoderConfig("lookupvit_tiny_patch16_224", image_size=96)}, "comes from"),
        ({"grids": ("4x4",)}, "holds the grids 5x5, not 4x4"),
    ],
)
def test_wrong_inputs_are_refused(config, inputs, tmp_path, change, fault):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "other.txt").write_text("red\ngreen\n")
    names = {"EMPTY": "empty.txt", "ABSENT": "absent.json", "OTHER": "other.txt"}
    if "vocabulary" in change:
        paths = {"FILE": str(inputs / "vocabulary.json")} | {key: str(tmp_path / name) for key, name in names.items()}
        change = {"vocabulary": tuple(paths.get(source, source) for source in change["vocabulary"])}
    with pytest.raises((ValueError, OSError), match=fault):
        run(replace(config, **change))
    assert not (config.output / "tags.json").exists()


def test_labels_of_other_images_are_refused(config, write):
    with pytest.raises(ValueError, match="none of the 1 images of .* is among the images"):
        run(replace(config, labels=write("labels.json", {"classes": ["warm"], "images": {"x.jpg": [0]}})))


def test_a_head_is_replaced_only_on_demand(config):
    run(replace(config, epochs=1))
    before = (config.output / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a tag head") as error:
        run(config)
    assert "overwrite" in error.value.settings
    assert (config.output / "model.safetensors").read_bytes() == before


def test_a_head_of_another_encoder_is_refused(config):
    run(replace(config, epochs=1))
    with pytest.raises(ValueError, match="reads tokens that are 192 wide, and the encoder's are 384"):
        load_head(config.output, 384, 1)
    (config.output / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model.safetensors' does not fit 'tags.json'"):
        load_head(config.output, 192, 1)
    with pytest.raises(ValueError, match="no tag head at"):
        load_head(config.output / "tokens", 192, 1)


def test_the_head_reads_any_grid():
    head = TagHead(8, 3, 4, prefix_tokens=1).eval()
    assert head(torch.randn(2, 5, 8)).shape == head(torch.randn(2, 26, 8).half()).shape == (2, 3)
    with pytest.raises(ValueError, match="image tokens are 5 of width 9"):
        head(torch.randn(2, 5, 9))


def test_the_most_probable_tags_are_picked():
    config = TagConfig(VOCABULARY, min_tag=0.3, max_tags=2)
    probabilities = torch.tensor([[0.4, 0.9, 0.5, 0.0, 0.0, 0.3], [0.1, 0.2, 0.3, 0.0, 0.0, 0.0]])
    assert config.pick(probabilities) == [[1, 2], [2]]
    assert config.pick(probabilities, max_tags=0) == [[], []]
    assert config.pick(probabilities, min_tag=0.15, max_tags=9) == [[1, 2, 0, 5], [2, 1]]


def test_calibration_mends_logits():
    """Logits that are twice too large and shifted: the fit finds both, for a tag with few images as for others."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 2, generator=generator) * 2
    values = (torch.rand(4000, 2, generator=generator) < true.sigmoid()).float()
    weights = torch.ones_like(values)
    weights[5:, 1] = 0
    scale, shift = calibrate(2 * true + 3, Targets(values, weights), np.arange(4000))
    assert torch.allclose(scale, torch.tensor(0.5), atol=0.1)
    assert torch.allclose(shift, torch.tensor(-1.5), atol=0.2)


def test_average_precision_and_calibration_error():
    assert average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([0.5, 0.5]), np.array([False, True])) == 0.5
    assert np.isnan(average_precision(np.array([0.5]), np.array([False])))
    assert calibration_error(np.array([0.8, 0.8, 0.01]), np.array([1.0, 0.0, 1.0])) == pytest.approx(0.3)
    shares = np.array([[1, np.nan], [0, np.nan], [0.4, 0]])
    found = score_labels(np.array([[0.9, 0.9], [0.6, 0.1], [0.2, 0.1]]), shares, threshold=0.5)
    assert (found.images, found.positives, found.precision, found.recall) == (3, 2, 0.5, 0.5)
    assert found.mean_ap == pytest.approx((1 + 2 / 3) / 2)


CAPTIONS = [
    "a brown dog runs in the grass",
    "two dogs are on the grass",
    "a dog with a red ball",
    "the man is running in jeans.",
    "a man in blue jeans",
    "the small ball of a man",
]


def test_frequent_nouns():
    assert frequent_nouns(CAPTIONS, 9) == {
        "dog": ["dog", "dogs"],
        "man": ["man"],
        "ball": ["ball"],
        "grass": ["grass"],
        "jeans": ["jeans"],
    }
    assert list(frequent_nouns(CAPTIONS, 1, known=["dog", "dogs"])) == ["man"]


def test_classes_and_nouns_join_the_vocabulary(write):
    file = str(write("file.json", {"words": {"hound": ["dog", "dogs"]}, "none": ["dog house"]}))
    joined = make_vocabulary([file, "words:2"], CAPTIONS, classes=["Hound", "cat"])
    assert joined.names == ("hound", "cat", "man", "ball")
    assert joined.words[1] == ("cat", "cats")
    assert joined.none == ("dog house",)


def test_a_trained_head_becomes_part_of_a_new_captioner(config, captioned, tmp_path):
    """It predicts the same as in its folder, through training by words and by rewards."""
    run(config)
    head, _ = load_head(config.output, 192, 1)
    settings = debug(captioned, tmp_path / "run", epochs=0.2)
    settings = replace(settings, model=replace(settings.model, image_size=96, tags=config.output))
    for stage in (settings, replace(settings, stage="scst", model=ModelConfig())):
        model = captioner.load(train(stage), "cpu").model
        tokens = torch.randn(2, 26, 192)
        torch.testing.assert_close(model.predict_tags(tokens), head(tokens))
    assert model.tags.vocabulary == VOCABULARY
    with pytest.raises(ValueError, match=r"the tag head '.*' comes from other preprocessing: input_size"):
        build_captioner(replace(settings.model, image_size=80), ["a red square"] * 9)
    with pytest.raises(ValueError, match="comes from another encoder, lookupvit_tiny"):
        build_captioner(replace(settings.model, encoder="vit_tiny_patch16_224"), ["a red square"] * 9)
    with pytest.raises(ValueError, match="no tag head at"):
        build_captioner(replace(settings.model, tags=tmp_path), ["a red square"] * 9)
