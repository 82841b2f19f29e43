"""A captioner with object tags: their words stand before the start token of a text."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from pyarrow import parquet
from transformers import LlamaConfig

import captioner
from captioner import CaptionerModel
from captioner.commands.caption import CaptionConfig, caption_files
from captioner.commands.evaluate import EvaluateConfig, evaluate
from captioner.data.config import TokenSourceConfig
from captioner.data.readers import read_captions
from captioner.generation import call
from captioner.generation.prompts import Prompts, split_prompts
from captioner.tag_head import TagConfig
from captioner.tags import TagVocabulary

VOCABULARY = TagVocabulary.of_names(["dog", "red chair", "beach"])


@pytest.fixture
def make_tagged(make_model, processor):
    """Return a function that builds a tiny captioner whose decoder reacts to every token, with three tags."""

    def make(text_config=None, **kwargs):
        tokens = tuple(map(tuple, processor.tag_ids(VOCABULARY.names)))
        tags = TagConfig(VOCABULARY, hidden=8, min_tag=0.3, max_tags=2, tokens=tokens)
        model = make_model(text_config, tags=tags.to_dict(), **kwargs)
        for part in (model.decoder, model.projector):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.25)
        model.tag_head.shift.copy_(torch.tensor([-9.0, 0.0, 1.0]))
        return model

    return make


@pytest.fixture
def tokens():
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


def llama(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)


KINDS = [("gpt2", "prefix"), ("gpt2", "cross_attention"), ("llama", "prefix")]
TAGS = [[2], [], [0, 1]]


@pytest.mark.parametrize(("name", "fusion"), KINDS)
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3, "num_return_sequences": 2}])
def test_texts_continue_the_words_of_tags(name, fusion, options, make_tagged, tokens, tokenizer, monkeypatch):
    """Both searches find what the logits of the whole text say, alone and in a batch; the words are not returned."""
    model = make_tagged(llama(tokenizer) if name == "llama" else None, fusion=fusion)
    options |= {"max_new_tokens": 6, "image_tokens": tokens, "repetition_penalty": 1.2}
    found = model.generate(tags=TAGS, **options)
    assert (found[:, 0] == 1).all()
    ours = call.supports_search
    monkeypatch.setattr(call, "supports_search", lambda fusion: False)
    assert torch.equal(found, model.generate(tags=TAGS, **options))
    monkeypatch.setattr(call, "supports_search", ours)
    count = options.get("num_return_sequences", 1)
    for row, tags in enumerate(TAGS):
        alone = model.generate(tags=[tags], **options | {"image_tokens": tokens[row : row + 1]})
        assert torch.equal(alone, found[row * count : (row + 1) * count, : alone.shape[1]])
    assert not torch.equal(found, model.generate(tags=[[], [], []], **options))


@pytest.mark.parametrize(("name", "fusion"), KINDS)
def test_log_probability_after_tags(name, fusion, make_tagged, tokens, tokenizer, processor):
    """It is that of the text after the words, as a plain forward pass reads them, with and without a prompt."""
    model = make_tagged(llama(tokenizer) if name == "llama" else None, fusion=fusion)
    prompts = processor(text=["a dog", "", "two men on"])
    options = {"tags": TAGS, "num_beams": 2, "max_new_tokens": 5}
    texts, summed = model.generate_with_log_probability(tokens, prompts.input_ids, prompts.attention_mask, **options)
    args = (texts, tokens, prompts.input_ids, prompts.attention_mask, TAGS)
    torch.testing.assert_close(summed, model.log_probability(*args), atol=1e-4, rtol=1e-4)
    for row, tags in enumerate(TAGS):
        words = model.tags.words_of(tags)
        own = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
        new = texts[row, prompts.input_ids.shape[1] :].tolist()
        new = new[: new.index(2) + 1] if 2 in new else new
        ids = torch.tensor([[*words, *own, *new]])
        logits = model(input_ids=ids, image_tokens=tokens[row : row + 1]).logits.log_softmax(-1)
        places = torch.arange(len(words) + len(own), ids.shape[1])
        expected = logits[0, places - 1, ids[0, places]].sum()
        torch.testing.assert_close(summed[row], expected, atol=1e-4, rtol=1e-4)


def test_the_head_gives_the_tags_of_a_call_without_them(make_tagged, tokens):
    model = make_tagged()
    probabilities = model.predict_tags(tokens)
    picked = model.pick_tags(tokens)
    assert all(0 not in group and len(group) <= 2 for group in picked)
    assert picked == [[2, 1] if row[2] > row[1] else [1, 2] for row in probabilities]
    options = {"image_tokens": tokens, "max_new_tokens": 5}
    assert torch.equal(model.generate(**options), model.generate(tags=picked, **options))
    texts, summed = model.generate_with_log_probability(tokens, max_new_tokens=5)
    torch.testing.assert_close(summed, model.log_probability(texts, tokens), atol=1e-4, rtol=1e-4)
    model.config.blind = True
    assert model.pick_tags(tokens) == [[], [], []]


def test_the_processor_puts_tags_before_the_start(make_tagged, tokens, processor):
    model = make_tagged()
    inputs = processor(text=["a dog", "", "two men on"], tags=[["beach"], [], ["dog", "red chair"]])
    plain = processor(text=["a dog", "", "two men on"])
    options = {"image_tokens": tokens, "max_new_tokens": 5}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**plain, tags=TAGS, **options))
    both = processor(text=["a dog", ""], tags=["dog"])
    assert both.input_ids[1][both.attention_mask[1].bool()].tolist() == [*model.tags.tokens[0], 1]
    with pytest.raises(ValueError, match="tags are given, too"):
        model.generate(**inputs, **options, tags=TAGS)


def test_prompts_are_split_at_the_start_token():
    ids = torch.tensor([[0, 7, 8, 1, 5], [0, 0, 0, 0, 1], [6, 1, 5, 4, 3]])
    prompts = split_prompts(ids, (ids > 0).long(), start=1)
    assert prompts.before == [[7, 8], [], [6]]
    assert prompts.input_ids.tolist() == [[0, 0, 1, 5], [0, 0, 0, 1], [1, 5, 4, 3]]
    read, mask = prompts.read()
    assert read.tolist() == [[0, 7, 8, 1, 5], [0, 0, 0, 0, 1], [6, 1, 5, 4, 3]]
    assert torch.equal(mask, (ids > 0).long())
    for plain in (torch.tensor([[1, 5], [1, 6]]), torch.tensor([[9, 5], [1, 6]])):
        assert split_prompts(plain, None, start=1).before is None
    assert Prompts(ids, torch.ones_like(ids)).read()[0] is ids


def test_no_tag_is_todays_captioner(make_tagged, make_model, tokens):
    model = make_tagged()
    plain = make_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    options = {"image_tokens": tokens, "num_beams": 2}
    assert torch.equal(plain.generate(**options), model.generate(tags=[[], [], []], **options))
    with pytest.raises(ValueError, match="has no tags"):
        plain.generate(tags=TAGS, **options)
    with pytest.raises(ValueError, match="has no tags"):
        plain.predict_tags(tokens)
    assert plain.pick_tags(tokens) == [[], [], []]


def test_a_captioner_with_tags_survives_saving(make_tagged, processor, tokens, tmp_path):
    model = make_tagged()
    model.tag_head.mean.normal_()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = CaptionerModel.from_pretrained(tmp_path)
    assert loaded.tags == model.tags
    assert torch.equal(loaded.predict_tags(tokens), model.predict_tags(tokens))
    assert not any(parameter.requires_grad for parameter in loaded.train().tag_head.parameters())
    assert torch.equal(captioner.load(tmp_path, "cpu").model.predict_tags(tokens), model.predict_tags(tokens))
    config = json.loads((tmp_path / "config.json").read_text())
    config["tags"]["tokens"][1] = [9999]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the decoder has no tokens of the tag 'red chair'"):
        captioner.load(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("tags", "fault"),
    [([[0], [1]], "2 lists of tags for 3 images"), ([[0], [3], []], "no tag 3; the captioner has 3, from 0")],
)
def test_wrong_tags_are_refused(tags, fault, make_tagged, tokens):
    with pytest.raises(ValueError, match=fault):
        make_tagged().generate(image_tokens=tokens, tags=tags)


def test_a_tag_that_the_tokenizer_cannot_write_is_refused(processor):
    with pytest.raises(ValueError, match="cannot write the tag '</s>'"):
        processor.tag_ids(["dog", "</s>"])


def test_tags_take_room_in_the_decoder(make_tagged, tokens):
    model = make_tagged()
    with pytest.raises(ValueError, match="room for 64 tokens"):
        model.generate(image_tokens=tokens, tags=[[0, 1, 2] * 4] * 3, max_new_tokens=50)


@pytest.fixture
def saved(make_tagged, processor, tmp_path):
    make_tagged().save_pretrained(tmp_path / "tagged")
    processor.save_pretrained(tmp_path / "tagged")
    return tmp_path / "tagged"


def test_tags_of_captions_in_python(saved, images):
    loaded = captioner.load(saved, "cpu")
    pixels = loaded.processor.pixels(images / "a.jpg")[None]
    tokens = loaded.encoder.encode(pixels)
    row = loaded.model.predict_tags(tokens)[0].tolist()
    (result,) = loaded.stream(images / "a.jpg")
    expected = sorted(((p, n) for p, n in zip(row, VOCABULARY.names, strict=True) if p >= 0.3), reverse=True)
    assert [(tag.tag, tag.probability) for tag in result.tags] == [(name, round(p, 4)) for p, name in expected]
    assert len(result.tags) == 2
    text = loaded(images / "a.jpg", tags=0)
    assert text == loaded.processor.captions(loaded.model.generate(image_tokens=tokens, tags=[[]]))[0]
    named = loaded(images / "a.jpg", tags=["Dog"])
    assert named == loaded.processor.captions(loaded.model.generate(image_tokens=tokens, tags=[[0]]))[0]
    (blind,) = loaded.stream(images / "a.jpg", tags=0)
    assert (blind.tags, blind.caption) == (result.tags, text)
    drawn = list(loaded.stream(images / "a.jpg", captions=2, do_sample=True, seed=3, tags=["dog", "beach"]))
    assert [tag.tag for tag in drawn[0].tags] == ["dog", "beach"]
    assert loaded.describe(tags=1) == loaded.describe() | {"tags": 1}
    assert loaded.describe(min_tag=0.5)["min_tag"] == 0.5


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"tags": -1}, "tags must be a whole number of at least 0, not -1"),
        ({"tags": "dog"}, "a list of names such as"),
        ({"tags": ["zebra"]}, "this captioner has no tag 'zebra'"),
        ({"min_tag": 1.5}, "min_tag is a probability between 0 and 1, not 1.5"),
    ],
)
def test_wrong_choices_of_tags_are_refused(saved, images, options, fault):
    with pytest.raises(ValueError, match=fault):
        captioner.load(saved, "cpu")(images / "a.jpg", **options)


def test_a_captioner_without_tags_says_so(saved_model, images):
    loaded = captioner.load(saved_model, "cpu")
    assert next(loaded.stream(images / "a.jpg")).tags == []
    assert loaded(images / "a.jpg", tags=0) == loaded(images / "a.jpg")
    assert "tags" not in loaded.describe()
    for options in ({"tags": 2}, {"min_tag": 0.2}, {"tags": ["dog"]}):
        with pytest.raises(ValueError, match="this captioner has no tags"):
            loaded(images / "a.jpg", **options)
    with pytest.raises(ValueError, match="this captioner has no tags"):
        caption_files(CaptionConfig((str(images),), model=str(saved_model), show_tags=True))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_tags_are_shown_beside_captions(ending, saved, images, tmp_path, capsys):
    output = tmp_path / f"captions.{ending}"
    config = CaptionConfig((str(images),), model=str(saved), output=output, show_tags=True)
    assert caption_files(config) == 0
    results = {result.path: result for result in captioner.load(saved, "cpu").stream(sorted(images.iterdir()))}
    written = [", ".join(f"{tag.tag} {tag.probability:.2f}" for tag in result.tags) for result in results.values()]
    tags = [[vars(tag) for tag in result.tags] for result in results.values()]
    if ending == "jsonl":
        assert [json.loads(line)["tags"] for line in output.read_text().splitlines()] == tags
    elif ending == "csv":
        assert [row["tags"] for row in csv.DictReader(output.open())] == written
    elif ending == "parquet":
        assert parquet.read_table(output)["tags"].to_pylist() == tags
    else:
        assert [line.split("\t")[2] for line in output.read_text().splitlines()] == written
        caption_files(replace(config, output=None))
        assert capsys.readouterr().out == output.read_text()
    (images / "d.png").write_bytes((images / "b.png").read_bytes())
    if ending == "csv":
        with pytest.raises(ValueError, match="show_tags"):
            caption_files(replace(config, resume=True, show_tags=False))
    assert caption_files(replace(config, resume=True)) == 0
    with pytest.raises(ValueError, match="tags"):
        caption_files(replace(config, resume=True, tags=0))


def test_scores_without_tags(saved, noise, tmp_path):
    """`tags` 0 gives the tag-blind scores: the captions are those of a captioner that reads no tags."""
    data = TokenSourceConfig(root=str(noise), workers=0)
    config = EvaluateConfig(str(saved), data, "val", tmp_path / "scores", max_new_tokens=6, show_tags=True)
    rows = {}
    for tags in (None, 0):
        evaluate(replace(config, tags=tags, overwrite=True))
        rows[tags] = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert [row["tags"] for row in rows[0]] == [row["tags"] for row in rows[None]]
    loaded = captioner.load(saved, "cpu")
    images = [row["image"] for row in read_captions(noise, "val")]
    expected = loaded(images, tags=0, num_beams=3, max_new_tokens=6)
    assert [row["caption"] for row in rows[0]] == expected
    assert [row["caption"] for row in rows[None]] != expected
