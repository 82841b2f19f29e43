import random
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

import captioner
from captioner import CaptionerConfig, CaptionerModel
from captioner.labels import IGNORED, split_targets, token_loss
from captioner.text_decoder import PLAIN_HEADS, TextDecoder
from captioner.transformers_versions import checkpoint_activations

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODERS = {
    "gpt2": lambda: GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32),
    "llama": lambda: LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=64),
    "qwen2": lambda: Qwen2Config(**SMALL, num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True),
}
CASES = [(name, "prefix") for name in DECODERS] + [("gpt2", "cross_attention")]
CAPTIONS = ["a dog runs", "two men on a beach", "a cat", "a red chair on the grass"]


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("name", "fusion"), CASES)
def test_every_trainable_parameter_learns_and_no_frozen_one(name, fusion, make_model, processor, pixels):
    model = make_model(DECODERS[name](), fusion=fusion).train()
    model(pixel_values=pixels, **processor.text(CAPTIONS)).loss.backward()
    for key, parameter in model.named_parameters():
        frozen = key.startswith("encoder.")
        assert parameter.requires_grad is not frozen, key
        assert (parameter.grad is None) is frozen, key


@pytest.mark.parametrize(("name", "fusion"), CASES)
def test_save_and_load_is_bit_exact(name, fusion, make_model, processor, pixels, tmp_path):
    model = make_model(DECODERS[name](), fusion=fusion)
    model.save_pretrained(tmp_path)
    captioner.register()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, CaptionerModel)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.encoder.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    text = processor.text(CAPTIONS)
    assert torch.equal(model(pixels, **text).logits, loaded(pixels, **text).logits)
    assert torch.equal(model.generate(pixels), loaded.generate(pixels))


SWIN = {"img_size": 64, "depths": (1, 2, 4, 1)}
WITH_CONSTANTS = [
    ("swin_tiny_patch4_window7_224", {**SWIN, "window_size": 4}),  # an index of positions
    ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 1}),  # rotary positions
    ("stvit_swin_tiny_patch4_window7_224", {**SWIN, "embed_dim": 12, "window_size": 2, "grid": (2, 2)}),
]


@pytest.mark.parametrize(("name", "options"), WITH_CONSTANTS)
def test_loading_keeps_what_an_encoder_computes_at_construction(name, options, tmp_path):
    encoder = {"name": name, "kwargs": options}
    model = CaptionerModel(CaptionerConfig(encoder_config=encoder, text_config=DECODERS["gpt2"]())).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, options["img_size"], options["img_size"])
    tokens = model.encode(pixels)
    assert torch.equal(CaptionerModel.from_pretrained(tmp_path).encode(pixels), tokens)
    low = CaptionerModel.from_pretrained(tmp_path, dtype=torch.bfloat16).encode(pixels)
    torch.testing.assert_close(low.float(), tokens, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("name", "fusion"), CASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
        {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
)
def test_generation_and_its_log_probability(name, fusion, options, make_model, pixels):
    model = make_model(DECODERS[name](), fusion=fusion)
    tokens = model.encode(pixels)
    sequences = model.generate(image_tokens=tokens, max_new_tokens=6, **options)
    count = options.get("num_return_sequences", 1)
    assert sequences.shape[0] == 2 * count
    assert 2 <= sequences.shape[1] <= 7
    assert (sequences[:, 0] == 1).all()
    logprobs = model.log_probability(sequences, tokens)
    for row, sequence in enumerate(sequences):  # token by token, without batch or padding
        text, expected = torch.tensor([[1]]), 0.0
        for token in sequence[1:].tolist():
            logits = model(image_tokens=tokens[row // count][None], input_ids=text).logits[0, -1]
            expected += logits.log_softmax(-1)[token].item()
            text = torch.cat([text, torch.tensor([[token]])], 1)
            if token == 2:
                break
        assert logprobs[row].item() == pytest.approx(expected, abs=1e-4)


def test_greedy_generation_equals_the_argmax_of_the_forward_pass(make_model, pixels):
    model = make_model()
    text = torch.full((2, 1), 1)
    for _ in range(5):
        text = torch.cat([text, model(pixels, text).logits[:, -1:].argmax(-1)], 1)
    assert model.generate(pixels, max_new_tokens=5, eos_token_id=None).tolist() == text.tolist()


def test_pixels_and_their_tokens_give_the_same(make_model, processor, pixels):
    model, text = make_model(), processor.text(CAPTIONS)
    assert torch.equal(model(pixels, **text).logits, model(image_tokens=model.encode(pixels), **text).logits)


@pytest.mark.parametrize(("name", "fusion"), CASES)
def test_captions_of_one_image_share_its_encoding_and_prefix(name, fusion, make_model, processor, pixels):
    model, text = make_model(DECODERS[name](), fusion=fusion), processor.text(CAPTIONS)
    assert model.text_decoder.shares_prefix(2) is (fusion == "prefix")
    logits, gradients = [], []
    for images in (pixels, pixels.repeat_interleave(2, 0)):
        output = model(images, **text)
        output.loss.backward()
        logits.append(output.logits * text["attention_mask"][..., None])
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    torch.testing.assert_close(*logits)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("name", "fusion"), [*((name, "prefix") for name in [*PLAIN_HEADS, "granite"]), ("gpt2", "cross_attention")]
)
def test_logits_at_some_positions_are_those_of_the_whole_text(name, fusion, make_model, processor, pixels):
    special = {"granite": {"logits_scaling": 3.0}, "opt": {"word_embed_proj_dim": 16}}
    grouped = {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
    config = AutoConfig.for_model(name, **SMALL, **grouped, **special.get(name, {}))
    model, text = make_model(config, fusion=fusion), processor.text(random.Random(0).sample(CAPTIONS * 15, 60))
    inputs, targets = split_targets(text)
    positions = inputs["positions"]
    assert len(list(model.text_decoder.groups(positions))) == 2
    whole, some = model(pixels, **text).logits[:, :-1][positions], model.logits_at(pixels, **inputs)
    assert 0 < len(some) < positions.numel()
    torch.testing.assert_close(some, whole)
    assert torch.equal(targets, text["input_ids"][:, 1:][positions])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = [token_loss(logits, targets) / len(targets) for logits in (some, whole)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters) for loss in losses))


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("gpt2", {}),
        ("gpt2", {"add_cross_attention": True}),
        ("openai-gpt", {}),  # it has no cache of keys and values
        ("mistral", {"num_key_value_heads": 1, "sliding_window": 4}),  # fewer than the prefix has
    ],
)
def test_sharing_the_prefix_and_computing_in_groups_change_nothing(
    name, special, make_model, processor, pixels, monkeypatch
):
    model = make_model(AutoConfig.for_model(name, **SMALL, pad_token_id=0, **special))
    inputs, _ = split_targets(processor.text(random.Random(0).sample(CAPTIONS * 15, 60)))
    shared = model.logits_at(pixels, **inputs)
    monkeypatch.setattr(TextDecoder, "shares_prefix", lambda self, count: False)
    monkeypatch.setattr(TextDecoder, "groups", lambda self, positions: iter([(slice(None), positions.shape[1])]))
    torch.testing.assert_close(shared, model.logits_at(pixels, **inputs))


def test_without_positions_there_are_logits_for_every_token_of_the_texts(make_model, processor, pixels):
    model, text = make_model(), processor.text(CAPTIONS)
    mask = text["attention_mask"].bool()
    logits = model.logits_at(pixels, text["input_ids"], text["attention_mask"])
    torch.testing.assert_close(logits, model(pixels, **text).logits[mask])


def test_padding_changes_no_logits(make_model, processor, pixels):
    model = make_model()
    alone, padded = processor.text(["a cat"]), processor.text(["a cat", "a much longer caption about a red chair"])
    short = model(pixels[:1], alone["input_ids"], alone["attention_mask"]).logits
    long = model(pixels[:1], padded["input_ids"], padded["attention_mask"]).logits
    torch.testing.assert_close(short[0], long[0, : short.shape[1]], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_labelled_tokens(make_model, processor, pixels):
    model, text = make_model(), processor.text(CAPTIONS)
    output = model(pixels, **text)
    logprobs = output.logits[:, :-1].log_softmax(-1)
    labels = text["labels"][:, 1:]
    picked = [logprobs[i, j, labels[i, j]] for i, j in (labels != IGNORED).nonzero().tolist()]
    torch.testing.assert_close(output.loss, -torch.stack(picked).mean())


def test_the_image_blind_baseline_gets_nothing_from_the_image(make_model, processor, pixels):
    text = processor.text(CAPTIONS)
    seeing, blind = make_model(), make_model(blind=True)
    assert not torch.allclose(seeing(pixels, **text).logits, seeing(-pixels, **text).logits)
    assert torch.equal(blind(pixels, **text).logits, blind(-pixels, **text).logits)


def test_the_grid_is_chosen_at_call_time(make_model, pixels):
    model = make_model(grid=(3, 3))
    assert model.encode(pixels).shape[1] == 10
    assert model.encode(pixels, (4, 4)).shape[1] == 17
    assert model.generate(pixels, grid=(1, 1)).shape[0] == 2


def test_gradient_checkpointing_changes_nothing(make_model, processor, pixels):
    gradients = []
    for enable in (False, True):
        model = make_model(LlamaConfig(**SMALL, intermediate_size=64)).train()
        if enable:
            checkpoint_activations(model.decoder)
        model(pixels, **processor.text(CAPTIONS)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x), "no text"),
        (lambda m, x: m(input_ids=torch.ones(1, 2, dtype=torch.long)), "no image"),
        (lambda m, x: m(x, torch.ones(3, 2, dtype=torch.long)), "3 captions do not divide among 2 images"),
        (lambda m, x: m.generate(image_tokens=torch.zeros(1, 5, 48)), "48 wide, this encoder's are 32"),
        (lambda m, x: m.generate(x, torch.ones(3, 2, dtype=torch.long)), "3 prompts for 2 images; give one for each"),
        (lambda m, x: m.generate(x, max_new_tokens=60), "room for 64 tokens; image, prompt and 60 new tokens need 66"),
    ],
)
def test_misuse_is_named(call, message, make_model, pixels):
    with pytest.raises(ValueError, match=message):
        call(make_model(), pixels)


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="there is no fusion 'sum'; there are prefix, cross_attention"):
        CaptionerConfig(fusion="sum")
    with pytest.raises(ValueError, match="opt decoder has no cross-attention"):
        CaptionerConfig(text_config=OPTConfig(), fusion="cross_attention")


def test_only_the_classes_of_fusions_differ_by_fusion():
    package = Path(captioner.__file__).parent
    for path in package.rglob("*.py"):
        assert not re.search(r"fusion\"?\]?\s*(==|!=| in )", path.read_text()), path


@pytest.mark.parametrize(("name", "fusion"), CASES)
def test_padding_on_the_left_changes_no_logits(name, fusion, make_model, pixels):
    model = make_model(DECODERS[name](), fusion=fusion)
    ids = torch.tensor([[0, 0, 0, 1, 8, 9], [1, 8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    alone = model(pixels[:1], ids[:1, 3:]).logits
    for options in ({}, {"output_hidden_states": True}):  # with options, texts share no pass over the prefix
        logits = model(pixels, ids, mask, **options).logits
        torch.testing.assert_close(logits[:1, 3:], alone, rtol=1e-4, atol=1e-5)


def test_the_decoders_states_are_returned_where_they_are_asked_for(make_model, pixels):
    model = make_model()
    output = model(pixels, torch.ones(2, 3, dtype=torch.long), output_hidden_states=True)
    prefix = model.prefix(pixels)
    assert [state.shape for state in output.hidden_states] == [(2, prefix.shape[1] + 3, 32)] * 3
    assert "hidden_states" not in model(pixels, torch.ones(2, 3, dtype=torch.long))


def test_the_vocabulary_can_grow(make_model, pixels, tmp_path):
    model = make_model()
    model.resize_token_embeddings(307)
    assert model.config.vocab_size == model.get_output_embeddings().out_features == 307
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 306]] * 2)
    again = CaptionerModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(pixels, ids).logits, model(pixels, ids).logits)
