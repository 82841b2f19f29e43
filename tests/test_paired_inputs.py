"""What the decoder reads in paired stages: tags, blank images, sentences; and the texts that rewards are mixed with."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from training_runs import debug, losses, small_encoder, stop_at

import captioner
from captioner.data.batches import CaptionStream
from captioner.data.fingerprint import encoder_fingerprint
from captioner.data.readers import read_captions
from captioner.encoders import describe_encoder, frozen_encoder
from captioner.errors import SettingError
from captioner.labels import IGNORED
from captioner.processing import image_settings
from captioner.tag_head import TagConfig, TagHead
from captioner.tags import TagVocabulary
from captioner.training.config import InputConfig, ScstConfig
from captioner.training.inputs import MixedStream, PairedInputs, join_texts
from captioner.training.loop import train
from captioner.training.objectives import CrossEntropy
from captioner.training.scst import SelfCritical, silence_dropout
from captioner.training.text import TagWords, TextStream

TAGS = TagVocabulary.of_names(["red", "green", "blue", "white", "square"])
TEXT = [
    "a red square",
    "the blue square is plain",
    "all of it is green",
    "a white page",
    "a red page beside a blue page",
]


@pytest.fixture
def tagged(make_model, processor):
    """A captioner with an untrained head, whose tags have probabilities around one half."""
    tokens = tuple(
        map(tuple, processor.tokenizer([f" {name}" for name in TAGS.names], add_special_tokens=False)["input_ids"])
    )
    return make_model(tags=TagConfig(TAGS, hidden=8, min_tag=0.5, max_tags=3, tokens=tokens).to_dict())


def make_inputs(model, processor, **kwargs):
    vocabulary = None if model.tags is None else model.tags.vocabulary
    config = InputConfig(**{"tag_dropout": 0.0} | kwargs)
    return PairedInputs(Accelerator(cpu=True), TagWords(vocabulary, processor, config), config)


def batch_of(model, processor, captions=("a dog", "two men on a beach", "a cat")):
    torch.manual_seed(1)
    text = processor.text(captions)
    return {"image_tokens": torch.randn(2, 5, model.encoder.embed_dim), "owners": torch.tensor([0, 0, 1]), **text}


def test_captions_come_after_the_tags_of_their_image(tagged, processor):
    inputs, batch = make_inputs(tagged, processor), batch_of(tagged, processor)
    made = inputs.prepare(tagged, batch)
    picked = tagged.pick_tags(batch["image_tokens"])
    assert any(picked)
    assert made["image_tokens"].shape == (3, 5, 32)
    assert not made["image_tokens"][2].any()
    assert made["owners"].tolist() == [0, 0, 1]
    for row, owner in enumerate([0, 0, 1]):
        front = made["input_ids"][row, : made["input_ids"][row].tolist().index(1)].tolist()
        names = processor.tokenizer.decode(front).split()
        assert sorted(names) == sorted(TAGS.names[tag] for tag in picked[owner])
        assert (made["labels"][row, : len(front) + 1] == IGNORED).all()
    loss, _ = CrossEntropy(0.0, inputs=inputs).loss(tagged, made)
    loss.backward()
    assert all(parameter.grad is None for parameter in tagged.tag_head.parameters())


def test_tags_and_images_are_left_out_as_often_as_is_set(tagged, processor):
    batch = batch_of(tagged, processor)
    batch |= {"image_tokens": batch["image_tokens"].repeat(60, 1, 1), "owners": torch.arange(120)}
    batch |= processor.text(["a dog"] * 120)
    made = make_inputs(tagged, processor, tag_dropout=0.5, image_dropout=0.25).prepare(tagged, batch)
    assert 0.35 < (made["input_ids"][:, 0] == 1).float().mean() < 0.65
    assert 0.15 < (made["owners"] == 120).float().mean() < 0.35
    plain = make_inputs(tagged, processor, tag_dropout=1.0).prepare(tagged, batch)
    assert torch.equal(plain["input_ids"], batch["input_ids"])
    counts = {
        len(
            make_inputs(tagged, processor, tag_spread=0.5).pick_tags(
                tagged, batch["image_tokens"][:1], np.random.default_rng(n)
            )[0]
        )
        for n in range(40)
    }
    assert {0, 3} < counts


def test_sentences_are_added_by_position_and_in_proportion(captioned, make_model, processor):
    model, words = make_model(), TagWords(TAGS, processor, InputConfig(tag_dropout=0.0))
    images = CaptionStream(read_captions(captioned, "train"), processor, 2, seed=0)
    stream = MixedStream(images, TextStream(TEXT, processor, words, 0), 0.4)
    assert [len(stream.places(i)) for i in range(10)].count(1) == 4
    assert [n for i in range(50) for n in stream.places(i)] == list(range(20))
    batch = stream.collate([images[i] for i in range(5)])
    assert batch["sentences"]["labels"].shape[0] == 2
    made = make_inputs(model, processor).prepare(model, batch)
    assert made["owners"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert not made["image_tokens"][5].any()
    whole = {name: made[name] for name in ("input_ids", "attention_mask", "labels")}
    objective = CrossEntropy(0.0)
    parts = [
        ({"image_tokens": made["image_tokens"][:5]} | {name: batch[name] for name in (*whole, "owners")}),
        ({"image_tokens": made["image_tokens"][5:]} | batch["sentences"]),
    ]
    expected = sum(objective.loss(model, part)[0].item() for part in parts)
    assert objective.loss(model, made)[0].item() == pytest.approx(expected, rel=1e-4)
    assert "sentences" not in stream.collate([images[0] | {"place": 0}])


def test_texts_of_different_lengths_are_joined(processor):
    one, other = processor.text(["a dog"]), processor.text(["two men on a beach"])
    joined = join_texts(one, other)
    assert torch.equal(
        joined["attention_mask"].sum(1), torch.cat([one["attention_mask"].sum(1), other["attention_mask"].sum(1)])
    )
    assert (joined["labels"][joined["attention_mask"] == 0] == IGNORED).all()


def test_samples_are_learned_after_their_tags_and_beside_human_texts(tagged, processor, monkeypatch):
    inputs = make_inputs(tagged, processor)
    references = [["a dog"], ["two men"], ["a cat"]]
    silence_dropout(tagged.decoder)
    settings = ScstConfig(samples=3, xe_weight=0.25)
    objective = SelfCritical(Accelerator(cpu=True), processor, references, settings, 6, inputs=inputs)
    batch = batch_of(tagged, processor) | {"rows": torch.tensor([2, 0])}
    made = objective.prepare(tagged, batch)
    assert made["owners"].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1]
    advantage = np.random.default_rng(0).normal(size=6)
    monkeypatch.setattr(objective, "advantage", lambda batch: (advantage, {}))
    loss, _ = objective.loss(tagged, made)
    rows = {name: made[name] for name in ("input_ids", "attention_mask", "labels")}
    each = [
        CrossEntropy(0.0)
        .loss(
            tagged,
            {name: value[row : row + 1] for name, value in rows.items()}
            | {"image_tokens": made["image_tokens"][made["owners"][row]][None]},
        )[0]
        .item()
        for row in range(9)
    ]
    assert loss.item() == pytest.approx(float(np.dot(each, [*advantage, 0.25, 0.25, 0.25])), rel=1e-3, abs=1e-3)


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    """The folder of an untrained tag head for the small encoder."""
    folder = tmp_path_factory.mktemp("head")
    encoder = frozen_encoder(small_encoder())
    torch.manual_seed(0)
    made = TagHead(encoder.embed_dim, len(TAGS), 8, encoder.num_prefix_tokens)
    source = encoder_fingerprint(encoder, describe_encoder(small_encoder()), image_settings(encoder.default_cfg))
    content = TagConfig(TAGS, hidden=8, min_tag=0.5, max_tags=3).to_dict() | {
        "width": encoder.embed_dim,
        "source": source,
    }
    (folder / "tags.json").write_text(json.dumps(content))
    save_file(made.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def mixed(captioned, head, tmp_path_factory):
    """The settings of a run with tags, blank images and sentences, that was never stopped."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "text.txt").write_text("\n".join(TEXT))
    config = debug(captioned, folder / "run", epochs=1.5, evaluate_every=0.75)
    data = replace(config.data, text=(folder / "text.txt",))
    inputs = InputConfig(tag_dropout=0.3, single_tag_dropout=0.5, tag_spread=0.1, image_dropout=0.2, text_share=0.3)
    config = replace(config, data=data, model=replace(config.model, tags=head, dropout=0.1), inputs=inputs)
    train(config)
    return config


def test_a_resumed_run_with_everything_equals_an_unbroken_one(mixed, tmp_path, monkeypatch):
    config = replace(mixed, output=tmp_path)
    stop_at(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(config)
    monkeypatch.undo()
    with pytest.raises(SettingError, match=r"was saved with inputs.image_dropout 0.2, this run has 0.1"):
        train(replace(config, inputs=replace(config.inputs, image_dropout=0.1)))
    train(config)
    assert losses(tmp_path) == losses(mixed.output)
    assert losses(tmp_path, "loss_val") == losses(mixed.output, "loss_val")


def test_rewards_go_on_with_everything(mixed):
    scst = ScstConfig(samples=2, xe_weight=0.1, object_weight=1.0, meteor_weight=1.0)
    config = replace(mixed, stage="scst", scst=scst, epochs=0.5, learning_rate=1e-5)
    train(config)
    log = [json.loads(line) for line in (config.folder / "log.jsonl").read_text().splitlines()]
    first = next(record for record in log if "reward" in record)
    parts = {name: first[f"reward_{name}"] for name in ("CIDEr", "METEOR", "objects")}
    assert first["reward"] == pytest.approx(sum(parts.values()), abs=1e-4)
    assert captioner.load(config.folder / "best", "cpu").model.tags.vocabulary == TAGS


def test_the_vocabulary_of_stage_text_has_to_fit(mixed, head, tmp_path):
    (tmp_path / "tags.txt").write_text("\n".join([*TAGS.names[:-1], "circle"]))
    config = replace(mixed, output=tmp_path / "run", stage="text", epochs=0.5, evaluate_images=2)
    train(replace(config, model=replace(config.model, tags=tmp_path / "tags.txt")))
    config = replace(config, stage="xe")
    with pytest.raises(SettingError, match="has 1 tags that the decoder of .* has not learned, such as 'sq") as raised:
        train(config)
    assert "tags" in raised.value.settings
    with pytest.raises(SettingError, match="no tag head at"):
        train(replace(config, output=tmp_path / "other", model=replace(config.model, tags=tmp_path / "tags.txt")))
