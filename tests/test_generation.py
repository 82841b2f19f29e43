"""Our greedy and beam search: token for token the texts of transformers' `generate`."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from captioner.generation import call
from captioner.generation.beam_search import BeamSearch

VOCABULARY = 14
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
MAKE = {
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2, cross-attention": lambda: GPT2Config(**GPT2),
    "opt": lambda: OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    ),
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "smollm3": lambda: SmolLM3Config(**GROUPED),
    "pythia": lambda: GPTNeoXConfig(**SMALL),
}
SETTINGS = {
    "greedy": {"num_beams": 1},
    "beam": {"num_beams": 3},
    "all beams": {"num_beams": 4, "num_return_sequences": 4},
    "long": {"num_beams": 3, "length_penalty": 2.0, "num_return_sequences": 2},
    "short": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True, "num_return_sequences": 3},
    "patient": {"num_beams": 2, "early_stopping": "never"},
    "n-grams": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "penalty": {"num_beams": 3, "repetition_penalty": 1.5, "suppress_tokens": [5, 6]},
    "greedy penalty": {"num_beams": 1, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "two ends": {"num_beams": 3, "eos_token_id": [2, 7], "pad_token_id": 9, "num_return_sequences": 3},
    "one token": {"num_beams": 3, "max_new_tokens": 1},
    "no end": {"num_beams": 2, "eos_token_id": None},
}


@pytest.fixture
def build(make_model):
    """Return a function that builds a model whose captions differ in words and length."""

    def build(name="gpt2", seed=0, **kwargs):
        config = MAKE[name]()
        config.vocab_size = VOCABULARY
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
        fusion = "cross_attention" if "cross" in name else "prefix"
        model = make_model(config, fusion=fusion, **kwargs)
        torch.manual_seed(seed)
        for parameter in (*model.decoder.parameters(), *model.projector.parameters()):
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.25)
        return model

    return build


@pytest.fixture
def run(monkeypatch):
    """Return a function that generates by our search and by transformers', and says whether ours ran."""
    ran, search = [], BeamSearch.run
    monkeypatch.setattr(BeamSearch, "run", lambda self, batches: ran.append(1) or search(self, batches))
    ours = call.supports_search

    def run(model, images=6, **kwargs):
        torch.manual_seed(5)
        inputs = {"image_tokens": 3 * torch.randn(images, 5, model.encoder.embed_dim), "max_new_tokens": 9, **kwargs}
        ran.clear()
        monkeypatch.setattr(call, "supports_search", ours)
        got = model.generate(**inputs)
        used = bool(ran)
        monkeypatch.setattr(call, "supports_search", lambda fusion: False)
        return got, model.generate(**inputs), used

    return run


def lengths(texts):
    return {len(text.tolist()) if 2 not in text else text.tolist().index(2) for text in texts[:, 1:]}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MAKE)
def test_the_texts_are_those_of_transformers(name, setting, build, run):
    got, expected, used = run(build(name), **SETTINGS[setting])
    assert used
    assert torch.equal(got, expected)
    if setting == "beam":
        assert len(lengths(got)) > 1 or len({tuple(text.tolist()) for text in got}) > 1


@pytest.mark.parametrize("setting", ["greedy", "all beams", "n-grams", "penalty"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2, cross-attention", "llama", "pythia", "opt"])
def test_prompts_padded_or_not(name, setting, build, run):
    prompts = torch.tensor([[1, 4, 5], [1, 6, 7], [0, 1, 8], [0, 0, 1]])
    model, settings = build(name), SETTINGS[setting]
    got, expected, used = run(model, images=2, input_ids=prompts[:2], **settings)
    assert torch.equal(got, expected)
    assert used
    mask = (prompts != 0).long()
    got, expected, used = run(model, images=4, input_ids=prompts, attention_mask=mask, **settings)
    assert torch.equal(got, expected)
    assert used == ("repetition_penalty" not in settings)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setting", SETTINGS)
def test_ties_resolve_alike(setting, seed, build, run):
    model = build(seed=seed)
    embeddings = model.decoder.get_input_embeddings().weight.data
    if SETTINGS[setting]["num_beams"] == 1:
        embeddings[8:] = embeddings[4:10].clone()  # every word has a twin with the very same score
        assert torch.equal(*run(model, **SETTINGS[setting])[:2])
    embeddings[:4] = 0.0  # the four special tokens tie
    assert torch.equal(*run(model, **SETTINGS[setting])[:2])
    embeddings.zero_()  # all words tie, in every text
    assert torch.equal(*run(model, **SETTINGS[setting])[:2])


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("setting", ["greedy", "all beams", "short", "n-grams"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2, cross-attention", "qwen3"])
def test_images_that_wait_for_a_slot(name, setting, slots, build, run, monkeypatch):
    make = BeamSearch.__init__
    monkeypatch.setattr(BeamSearch, "__init__", lambda self, *args, **kwargs: make(self, *args, **kwargs, slots=slots))
    got, expected, used = run(build(name), images=11, **SETTINGS[setting])
    assert used
    assert torch.equal(got, expected)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "no end"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2, cross-attention", "smollm3"])
def test_log_probabilities_are_those_of_a_second_pass(name, setting, build, monkeypatch):
    model, tokens = build(name), 3 * torch.randn(4, 5, 32)
    settings = {"max_new_tokens": 9, **SETTINGS[setting]}
    model.generation_config.eos_token_id = settings.pop("eos_token_id", 2)
    second = model.log_probability
    monkeypatch.setattr(type(model), "log_probability", lambda *args: pytest.fail("a second pass"))
    texts, logprobs = model.generate_with_log_probability(tokens, **settings)
    assert torch.equal(texts, model.generate(image_tokens=tokens, **settings))
    repeated = tokens.repeat_interleave(settings.get("num_return_sequences", 1), 0)
    torch.testing.assert_close(logprobs, second(texts, repeated), atol=1e-4, rtol=0)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("name", ["gpt2", "gpt2, cross-attention", "llama"])
def test_several_texts_of_an_image_come_best_first(name, penalty, build):
    model, count = build(name), 4
    settings = {"num_beams": count, "num_return_sequences": count, "length_penalty": penalty, "max_new_tokens": 9}
    texts, logprobs = model.generate_with_log_probability(3 * torch.randn(5, 5, 32), **settings)
    assert texts.shape[0] == logprobs.shape[0] == 5 * count
    lengths = torch.tensor([row.index(2) + 1 if 2 in row else len(row) for row in texts[:, 1:].tolist()])
    scores = (logprobs / lengths**penalty).view(5, count)
    assert (scores.diff(dim=1) <= 1e-4).all()
    assert len({tuple(text) for text in texts[:count].tolist()}) == count


class Forbid(LogitsProcessor):
    """Forbid a token."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([12]), -torch.inf)


def test_logits_processors_of_a_call_are_applied(build, run):
    model = build()
    plain = run(model, num_beams=1)[0]
    assert (plain == 12).any()
    got, expected, used = run(model, num_beams=1, do_sample=False, logits_processor=LogitsProcessorList([Forbid()]))
    assert not used
    assert torch.equal(got, expected)
    assert not (got == 12).any()


def test_what_only_transformers_does_is_left_to_it(build, run):
    model = build()
    others = [{"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2, "do_sample": True}]
    others += [{"prefix_allowed_tokens_fn": lambda number, text: [4, 5, 6]}, {"sequence_bias": {(5,): 2.0}}]
    others += [{"use_cache": False}, {"forced_eos_token_id": 2}, {"renormalize_logits": True, "num_beams": 2}]
    for settings in others:
        torch.manual_seed(0)
        assert not run(model, **settings)[2]
    output, *_ = run(model, return_dict_in_generate=True, output_scores=True, num_beams=2)
    assert output.sequences_scores.shape == (6,)
    tokens = torch.randn(2, 5, 32)
    texts, logprobs = model.generate_with_log_probability(tokens, do_sample=True, max_new_tokens=4)
    torch.testing.assert_close(logprobs, model.log_probability(texts, tokens))


def test_decoders_that_do_not_keep_every_token_are_left_to_transformers(make_model, run):
    config = MistralConfig(**GROUPED, sliding_window=4, vocab_size=VOCABULARY)
    got, expected, used = run(make_model(config), num_beams=2)
    assert not used
    assert torch.equal(got, expected)


def test_wrong_settings_are_refused_as_transformers_refuses_them(build):
    with pytest.raises(ValueError, match="num_return_sequences"):
        build().generate(image_tokens=torch.randn(2, 5, 32), num_beams=2, num_return_sequences=3)


def test_attention_of_any_kind_and_reduced_precision(build, run):
    model = build()
    model.decoder.set_attn_implementation("eager")
    got, expected, used = run(model, num_beams=3)
    assert used
    assert torch.equal(got, expected)
    model = build().to(torch.bfloat16)
    assert run(model, num_beams=3)[0].shape[0] == 6
