"""Any causal language model as decoder: built, tuned in three ways, saved, loaded."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import debug, losses
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import captioner
from captioner import cli
from captioner.errors import SettingError
from captioner.processing import train_tokenizer
from captioner.training.build import build_captioner, starting_point, trainable_parameters
from captioner.training.config import ModelConfig, TrainConfig
from captioner.training.loop import train
from captioner.training.lora import merged_weights, tune

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16, vocab_size=300
    ),
    "smollm2": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SMALL, tie_word_embeddings=False, dtype="bfloat16"),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, tie_word_embeddings=False),
    "pythia": GPTNeoXConfig(**SMALL, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def tokens(captioned):
    """The parts of a tokenizer: everything in the vocabulary, nothing yet called pad, bos or eos."""
    content = json.loads((captioned / "annotations" / "captions_train.json").read_text())
    return train_tokenizer([a["caption"] for a in content["annotations"]] * 3, 300).backend_tokenizer


@pytest.fixture(scope="module")
def make_decoder(tokens, tmp_path_factory):
    """Return a function that saves a small random language model as the hub would hold it."""

    def make(name="gpt2", vocab_size=None, **special) -> str:
        folder = tmp_path_factory.mktemp("decoder")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **(special or {"eos_token": "</s>"}))
        tokenizer.save_pretrained(folder)
        config = CONFIGS[name]
        config.vocab_size = vocab_size or len(tokenizer) + 8  # Qwen's adds special tokens of its own
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 2, None
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return str(folder)

    return make


def model_config(decoder, **kwargs) -> ModelConfig:
    return ModelConfig(encoder="lookupvit_tiny_patch16_224", grid="2x2", decoder=decoder, **kwargs)


def start(decoder, **kwargs):
    return starting_point(TrainConfig(model=model_config(decoder, **kwargs), num_beams=1, max_new_tokens=5), list)


def inputs(model, processor):
    return {"image_tokens": torch.randn(2, 5, model.encoder.embed_dim), **processor.text(["a red square", "blue"])}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_of_the_hub_is_taken_with_its_weights(make_decoder, name):
    folder = make_decoder(name)
    model, processor = start(folder)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in model.decoder.parameters()} == {torch.float32}
    for key, value in source.state_dict().items():
        assert torch.equal(model.decoder.state_dict()[key], value)
    tied = model.decoder.get_input_embeddings().weight is model.decoder.get_output_embeddings().weight
    assert tied == model.config.text_config.tie_word_embeddings
    assert processor.start_token_id == processor.tokenizer.eos_token_id == 2
    assert name == "qwen2" or processor.tokenizer.pad_token_id == 2  # Qwen's brings a pad token
    batch = inputs(model, processor)
    assert batch["labels"][1].tolist().count(2) == 1  # padding is no end, although the same token
    model(**batch).loss.backward()
    trained = [parameter.grad is not None for n, parameter in model.named_parameters() if not n.startswith("encoder.")]
    assert sum(trained) > 0.9 * len(trained)
    sequences = model.eval().generate(image_tokens=batch["image_tokens"], **processor.prompts(2), min_new_tokens=5)
    assert sequences.shape == (2, 1 + 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_trains_little_and_merges_into_what_it_computed(make_decoder, name, tmp_path):
    model, processor = start(make_decoder(name), tune="lora", lora_rank=4)
    full, _ = start(make_decoder(name))
    assert trainable_parameters(model) < 0.5 * trainable_parameters(full)
    names = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(n.startswith("projector.") or "lora_" in n for n in names)
    for n, parameter in model.named_parameters():  # as if trained
        if "lora_B" in n:
            torch.nn.init.normal_(parameter, std=0.2)
    batch = inputs(model, processor)
    model.eval().save_pretrained(tmp_path, state_dict=merged_weights(model, model.state_dict()))
    processor.save_pretrained(tmp_path)
    loaded = captioner.load(tmp_path, "cpu").model
    assert not [key for key in loaded.state_dict() if "lora" in key or "base_layer" in key]
    expected, got = model(**batch).logits, loaded(**batch).logits
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(got, full.eval()(**batch).logits, atol=1e-2)


def test_a_projector_alone_can_be_trained(make_decoder):
    model, processor = start(make_decoder(), tune="projector")
    model(**inputs(model, processor)).loss.backward()
    assert {n.split(".")[0] for n, parameter in model.named_parameters() if parameter.grad is not None} == {"projector"}
    with pytest.raises(ValueError, match="a decoder from scratch has to be trained whole"):
        build_captioner(model_config(None, tune="projector"), ["a dog"])


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "opt"])
@pytest.mark.parametrize("how", ["full", "projector", "lora"])
def test_gradient_checkpointing_changes_no_gradient(make_decoder, name, how):
    grads, folder = [], make_decoder(name)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        settings = {"lora_dropout": 0.0} if how == "lora" else {}
        config = TrainConfig(model=model_config(folder, tune=how, **settings), gradient_checkpointing=checkpointing)
        model, processor = starting_point(config, list)
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        model.train()
        torch.manual_seed(1)
        model(**inputs(model, processor)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    if name != "opt":  # whose dropout is not a module: its gradients differ by chance
        for key, grad in grads[0].items():
            assert torch.allclose(grad, grads[1][key], atol=1e-6)


@pytest.mark.slow
def test_a_lora_run_ends_in_a_folder_that_captions(captioned, make_decoder, tmp_path, capsys):
    config = debug(captioned, tmp_path, epochs=2, gradient_checkpointing=True)
    config = replace(config, model=model_config(make_decoder("smollm2"), tune="lora", prompt="an image of"))
    best = train(config)
    keys = next(tmp_path.glob("checkpoints/*/model.safetensors"))
    assert keys.stat().st_size < 0.7 * (best / "model.safetensors").stat().st_size  # the frozen decoder is left out
    train(replace(config, epochs=3))
    assert len(losses(tmp_path)) == 12
    with pytest.raises(SystemExit, match="0"):
        cli.main(["caption", str(captioned / "images" / "val0.png"), "--model", str(best)])
    path, caption = capsys.readouterr().out.strip().splitlines()[-1].split("\t")
    assert path.endswith("val0.png")
    assert "image of" not in caption
    scst = train(replace(config, stage="scst", epochs=1))
    assert scst == tmp_path / "scst" / "best"


@pytest.mark.parametrize(
    ("special", "vocab_size", "kwargs", "message"),
    [
        ({"pad_token": "<pad>"}, None, {}, "has no end token, so captions could not end; name one as eos_token"),
        ({"eos_token": "</s>"}, 100, {}, r"has \d+ tokens, its model only 100; they do not belong together"),
        ({"eos_token": "</s>"}, None, {"max_length": 130}, "has room for 128 tokens; image tokens and text need 135"),
        (
            {"eos_token": "</s>"},
            None,
            {"prompt": "a b c d e f g h i j k l m n o p q r s t", "max_length": 20},
            "no room",
        ),
    ],
)
def test_a_decoder_that_cannot_serve_is_named(make_decoder, special, vocab_size, kwargs, message):
    folder = make_decoder("gpt2", vocab_size, **special)
    with pytest.raises(ValueError, match=message):
        build_captioner(model_config(folder, **kwargs), [])


def test_a_decoder_from_scratch_has_room_for_the_tokens_of_large_images():
    config = ModelConfig(encoder="vit_tiny_patch16_224", image_size=384, layers=1, width=16, heads=1, vocab_size=300)
    model, _ = build_captioner(config, ["a dog"])
    assert model.config.text_config.max_position_embeddings == 1 + 24 * 24 + config.max_length


def test_a_decoder_that_is_not_there_is_named(tmp_path, make_decoder):
    with pytest.raises(ValueError, match="no decoder at '.*nobody'"):
        build_captioner(model_config(str(tmp_path / "nobody")), [])
    folder = make_decoder()
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # a download that was cut
    with pytest.raises(ValueError, match="no weights for decoder"):
        build_captioner(model_config(folder), [])
    weights.unlink()
    with pytest.raises(ValueError, match="no weights for decoder"):
        build_captioner(model_config(folder), [])


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_decoder_that_lacks_weights_is_refused(make_decoder, fusion):
    folder = make_decoder()
    path, name = Path(folder) / "model.safetensors", "transformer.h.0.mlp.c_fc.weight"
    build_captioner(model_config(folder, fusion=fusion), [])  # the weights of cross-attention are new
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(SettingError, match=f"lacks 1 of its weights, such as {name}") as caught:
        build_captioner(model_config(folder, fusion=fusion), [])
    assert caught.value.settings == ("decoder",)
    save_file(weights | {name: weights[name][:-1].contiguous()}, path, {"format": "pt"})
    with pytest.raises(SettingError, match=f"1 weights of .* have other shapes .*, such as {name}"):
        build_captioner(model_config(folder, fusion=fusion), [])


def test_lora_without_peft_says_what_to_install(make_decoder, make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 'captioner\[lora\]'"):
        tune(make_model(), ModelConfig(tune="lora"))
