"""Stage text: sentences, their tags, and what later stages take from it."""

import gzip
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import debug, losses, stop_at

import captioner
from captioner.data.sentences import LONGEST, read_sentences
from captioner.errors import SettingError
from captioner.labels import IGNORED, put_before
from captioner.tags import TagVocabulary
from captioner.training.config import InputConfig, TrainConfig
from captioner.training.loop import train
from captioner.training.objectives import BlankImage, CrossEntropy
from captioner.training.text import TagWords, TextStream

COLOURS = TagVocabulary.of_names(["red", "green", "blue", "square"])
TEXT = [f"a {colour} square on a {other} ground" for colour in COLOURS.names[:3] for other in ("white", "red", "black")]


def test_sentences_are_read_from_every_form(tmp_path, write, caplog):
    lines = "".join(json.dumps({"id": n, "caption": text}) + "\n" for n, text in enumerate(["a  cat", "a dog"]))
    expected = ["a cat", "a dog"]
    assert read_sentences([write("a.jsonl", lines)]) == expected
    assert read_sentences([write("a.txt", lines.replace("caption", "text"))]) == expected
    assert read_sentences([write("b.txt", "a cat\r\na dog\n"), write("c.csv", "caption\na cow\n")]) == [
        *expected,
        "a cow",
    ]
    for name in ("d.jsonl.gz", "e.unknown"):
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
        assert read_sentences([tmp_path / name]) == expected
    assert not caplog.records


def test_lines_without_a_sentence_are_counted_in_one_line(write, caplog):
    path = write("a.txt", f"a cat\n\n \n{'x ' * LONGEST}\na dog\n")
    assert read_sentences([path]) == ["a cat", "a dog"]
    (record,) = caplog.records
    assert record.message.endswith("2 sentences; left out: 2 empty lines, 1 lines of more than 1000 characters")
    with pytest.raises(SettingError, match="left out: 2 empty lines") as raised:
        read_sentences([path], on_bad="refuse")
    assert raised.value.settings == ("on_bad",)
    rows = write("b.jsonl", '{"caption": "a cat"}\n{"caption": ""}\n{"caption": 7}\n')
    assert read_sentences([rows]) == ["a cat"]
    assert "1 empty lines, 1 unreadable lines" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n\n", "contains no sentence"),
        ("a.txt", b"x" * 5000, "contains no sentence"),
        ("a.txt", "ж\n".encode() + b"\xff\n", "line 2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a.txt", b"a cat\nb\0\0\n", "line 2, holds a NUL character"),
        ("a.jsonl", b'{"caption": "a"}\nno\n', "line 2, is not JSON"),
        ("a.jsonl", b'{"words": "a"}\n', "has no column 'captions', only words"),
        ("a.json", b'{\n"annotations": []}', "is JSON, and neither JSON Lines"),
        ("a.gz", gzip.compress(b"a cat\n" * 99, mtime=0)[:-20], "is damaged: it cannot be unpacked"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_sentences([tmp_path / name])


def test_tokens_before_a_text_are_not_learned(processor):
    text = processor.text(["a dog", "a cat sits on a red chair"])
    found = put_before(text, [[7, 8, 9], []])
    assert found["input_ids"].shape[1] == max(text["attention_mask"].sum(1) + torch.tensor([3, 0]))
    for row, before in enumerate(([7, 8, 9], [])):
        for name, front in (("input_ids", before), ("labels", [IGNORED] * len(before))):
            mask, old = found["attention_mask"][row].bool(), text["attention_mask"][row].bool()
            assert found[name][row][mask].tolist() == [*front, *text[name][row][old].tolist()]
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    assert (found["labels"][found["attention_mask"] == 0] == IGNORED).all()
    assert put_before(text, [[], []]) is text


def test_tags_are_left_out_and_shuffled_as_the_settings_say(processor):
    random = np.random.default_rng(0)
    tags = [0, 1, 2, 3]
    words = TagWords(COLOURS, processor, InputConfig(tag_dropout=0.25))
    drawn = [words.drop(tags, random) for _ in range(400)]
    assert 0.2 < np.mean([not some for some in drawn]) < 0.3
    assert {len(some) for some in drawn} == {0, 4}
    assert len({tuple(some) for some in drawn}) == 25
    words = TagWords(COLOURS, processor, InputConfig(tag_dropout=0.0, single_tag_dropout=0.8))
    assert 0.5 < np.mean([len(words.drop(tags, random)) / 4 for _ in range(400)]) < 0.7
    assert words.of("a Blue square") == [2, 3]
    assert processor.tokenizer.decode(words.tokens([2, 3])).split() == ["blue", "square"]
    assert TagWords(None, processor, InputConfig()).of("a blue square") == []


def test_steps_have_sentences_of_similar_length_and_epochs_every_sentence(processor):
    sentences = ["a dog" + " runs" * (n % 7) for n in range(66)]
    words = TagWords(None, processor, InputConfig())
    stream = TextStream(sentences, processor, words, 0, per_step=8)
    assert stream.size == 64
    steps = stream.order(0).reshape(8, 8)
    spread = [np.ptp(stream.texts.lengths[step]) for step in steps]
    assert np.mean(spread) < 2
    assert len(set(stream.order(0))) == 64
    assert len(set(stream.order(0)) | set(stream.order(1))) > 64
    assert len(TextStream(sentences[:3], processor, words, 0, per_step=8).order(0)) == 8


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_sentences_are_read_as_after_zeros(make_model, processor, fusion):
    model = make_model(fusion=fusion)
    words = TagWords(COLOURS, processor, InputConfig(tag_dropout=0.0))
    stream = TextStream(TEXT, processor, words, 0, ((2, 2), (3, 3)), per_step=4)
    objective = CrossEntropy(0.0, BlankImage(model, (3, 64, 64), ((2, 2), (3, 3))))
    for start, tokens in ((0, {5, 10}), (4, {5, 10})):
        batch = stream.collate([stream[i] for i in range(start, start + 4)])
        made = objective.prepare(model, batch)
        assert made["image_tokens"].shape[1] in tokens
        assert not made["image_tokens"].any()
        loss, _ = objective.loss(model, made)
        inputs = {name: made[name] for name in ("input_ids", "attention_mask", "labels")}
        expected = model(image_tokens=made["image_tokens"].expand(4, -1, -1), **inputs).loss
        assert loss.item() / (made["labels"] != IGNORED).sum() == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture(scope="session")
def text_run(captioned, tmp_path_factory):
    """The settings and folder of a run of stage text that was never stopped."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n".join(TEXT * 3))
    (folder / "tags.txt").write_text("\n".join(COLOURS.names))
    config = debug(captioned, folder / "run", stage="text", epochs=2, evaluate_every=1, learning_rate=3e-3)
    data = replace(config.data, text=(folder / "text.txt",))
    config = replace(config, data=data, model=replace(config.model, tags=folder / "tags.txt", dropout=0.1))
    train(config)
    return config


def test_language_is_learned_with_and_without_tags(text_run):
    log = [json.loads(line) for line in (text_run.folder / "log.jsonl").read_text().splitlines()]
    found = [record for record in log if "loss_val" in record]
    assert len(found) == 2
    assert found[-1]["loss_val"] < found[0]["loss_val"] - 0.3
    assert found[-1]["loss_val"] != found[-1]["loss_val_no_tags"]
    assert not (text_run.folder / "samples").exists()


def test_a_resumed_text_stage_equals_an_unbroken_one(text_run, tmp_path, monkeypatch):
    config = replace(text_run, output=tmp_path)
    stop_at(monkeypatch, 5, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(config)
    monkeypatch.undo()
    with pytest.raises(SettingError, match=r"was saved with (tokenizer|text) digest"):
        train(replace(config, data=replace(config.data, text=())))
    train(config)
    assert losses(config.folder) == losses(text_run.folder)
    assert losses(config.folder, "loss_val") == losses(text_run.folder, "loss_val")


def test_the_best_model_has_the_lowest_loss(text_run, tmp_path):
    config = replace(text_run, output=tmp_path, learning_rate=1e-9, patience=1, epochs=9)
    train(config)
    progress = sorted((config.folder / "checkpoints").glob("step*"))[-1] / "progress.json"
    found = losses(config.folder, "loss_val")
    assert json.loads(progress.read_text())["best"] == pytest.approx(min(found.values()), abs=1e-5)


def test_stage_xe_starts_with_the_decoder_of_stage_text(text_run, captioned, capsys):
    config = replace(text_run, stage="xe", epochs=0.25, learning_rate=1e-9, model=replace(text_run.model, tags=None))
    with pytest.raises(SettingError, match=r"had width 64, and this run has 32; a stage that continues it must have"):
        train(replace(config, model=replace(config.model, width=32)))
    best = train(config)
    text, image = (captioner.load(folder, "cpu") for folder in (text_run.folder / "best", best))
    assert text.processor.tokenizer.get_vocab() == image.processor.tokenizer.get_vocab()
    for name, value in text.model.decoder.state_dict().items():
        assert torch.allclose(value, image.model.decoder.state_dict()[name], atol=1e-6)
    assert min(losses(config.output, "CIDEr")) == 0  # a taught decoder is validated before its first step


def test_another_encoder_takes_the_decoder_of_a_captioner(text_run, captioned, tmp_path):
    model = replace(text_run.model, tags=None, decoder=str(text_run.folder / "best"), encoder="vit_tiny_patch16_224")
    config = replace(text_run, output=tmp_path, stage="xe", epochs=0.25, evaluate_images=2, learning_rate=1e-9)
    with pytest.raises(SettingError, match="reads images by prefix, not by cross_attention"):
        train(replace(config, model=replace(model, image_size=32, grid=None, fusion="cross_attention")))
    best = train(replace(config, model=replace(model, image_size=32, grid=None)))
    loaded, text = (captioner.load(folder, "cpu") for folder in (best, text_run.folder / "best"))
    assert loaded.processor.tokenizer.get_vocab() == text.processor.tokenizer.get_vocab()
    blank = [part.model.projector(torch.zeros(1, 1, part.model.encoder.embed_dim)) for part in (loaded, text)]
    assert torch.allclose(*blank, atol=1e-5)  # what stage text learned to read in place of an image


def test_a_text_stage_that_cannot_train_is_refused(text_run, tmp_path):
    with pytest.raises(SettingError, match="stage text trains the decoder, but tune is 'projector'"):
        replace(text_run, model=replace(text_run.model, tune="projector"))
    with pytest.raises(SettingError, match="no captions to validate on") as raised:
        train(TrainConfig(stage="text", data=replace(text_run.data, root=())))
    assert raised.value.settings == ("root", "val_root")
    data, inputs = replace(text_run.data, text=()), InputConfig(text_share=0.2)
    with pytest.raises(SettingError, match=r"are to be 0.2 of the texts, and no file is named"):
        train(replace(text_run, stage="xe", output=tmp_path, data=data, inputs=inputs))
