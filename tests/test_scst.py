import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training_runs import debug, losses, stop_at
from transformers import GPT2Config, LlamaConfig, OPTConfig

import captioner
from captioner.errors import SettingError
from captioner.labels import IGNORED, label_generated
from captioner.metrics import CiderD, score, tokenize_caption
from captioner.tags import TagVocabulary
from captioner.training.config import ScstConfig
from captioner.training.loop import train
from captioner.training.rewards import END, CaptionReward, object_score
from captioner.training.scst import SelfCritical, silence_dropout

REFERENCES = [
    ["A dog runs through the grass.", "the brown dog is running"],
    ["Two men on a beach", "men walking at the sea"],
    ["a cat sits on a red chair", "the cat is asleep on a chair"],
]


def test_the_reward_is_cider_d_with_the_end_as_a_word():
    captions, images = ["A dog is running through grass", "two men at a", "a cat on a red chair"], np.arange(3)
    ended = [True, False, True]
    words = {n: [tokenize_caption(text) + END for text in texts] for n, texts in enumerate(REFERENCES)}
    expected = CiderD(words).score(
        [0, 1, 2], [tokenize_caption(text) + END * end for text, end in zip(captions, ended, strict=True)]
    )
    assert CaptionReward(REFERENCES)(images, captions, ended) == pytest.approx(expected, abs=1e-12)


def test_a_caption_cut_off_is_worth_less_than_one_that_ends():
    reward = CaptionReward(REFERENCES)
    whole, cut = reward(np.zeros(2, int), ["the dog is running", "the dog is running"], [True, False])
    assert whole > 1.1 * cut


def test_bleu_is_mixed_into_the_reward_by_its_weight():
    text, images = ["A dog runs through the grass."], np.zeros(1, int)
    plain, mixed = (CaptionReward(REFERENCES, weight)(images, text, [True]) for weight in (0.0, 0.5))
    assert mixed - plain == pytest.approx(0.5 * 1.0, abs=1e-6)  # a reference itself has BLEU-4 of 1
    worse = [CaptionReward(REFERENCES, weight)(images, ["a dog"], [True]) for weight in (0.0, 0.5)]
    assert 0 <= worse[1] - worse[0] < 0.1


@pytest.fixture
def make_objective(processor):
    def make(**kwargs) -> SelfCritical:
        return SelfCritical(Accelerator(cpu=True), processor, REFERENCES, ScstConfig(**kwargs), max_new_tokens=6)

    return make


def batch_of(model, count=2):
    torch.manual_seed(1)
    return {"image_tokens": torch.randn(count, 5, model.encoder.embed_dim), "rows": torch.tensor([2, 0])[:count]}


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_every_image_gets_its_samples(make_model, make_objective, fusion):
    model, objective = make_model(fusion=fusion), make_objective(samples=8)
    made = objective.prepare(model, batch_of(model))
    assert made["images"].tolist() == [2] * 8 + [0] * 8
    assert len(set(made["captions"])) > 8
    for text, ids in zip(made["captions"], made["input_ids"], strict=True):
        assert text == objective.processor.tokenizer.decode(ids[1:], skip_special_tokens=True)


def test_beams_may_stand_for_samples(make_model, make_objective):
    model, objective = make_model(), make_objective(samples=4, search="beam")
    made = objective.prepare(model, batch_of(model))
    rows = made["input_ids"].tolist()
    assert len({tuple(row) for row in rows[:4]}) == len({tuple(row) for row in rows[4:]}) == 4
    assert objective.prepare(model, batch_of(model))["input_ids"].tolist() == rows


def test_samples_are_labelled_up_to_their_end(make_objective):
    sequences = torch.tensor([[9, 8, 7, 6], [9, 8, 2, 0], [2, 0, 0, 0], [9, 2, 2, 2]])  # 2 ends, 0 or 2 pads
    sequences = torch.cat([torch.ones(4, 1, dtype=torch.long), sequences], 1)
    made = label_generated(sequences, 1, 2)
    assert made["input_ids"].tolist() == sequences.tolist()
    assert made["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert made["labels"].masked_fill(made["labels"] == IGNORED, -1).tolist() == [
        [-1, 9, 8, 7, 6],
        [-1, 9, 8, 2, -1],
        [-1, 2, -1, -1, -1],
        [-1, 9, 2, -1, -1],
    ]
    assert make_objective().decode(sequences)[1] == [False, True, True, True]


def test_pixels_are_encoded_once_for_all_samples(make_model, make_objective, monkeypatch):
    model, objective = make_model(), make_objective(samples=3, baseline="greedy")
    seen = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda pixels, grid=None: seen.append(len(pixels)) or encode(pixels, grid))
    made = objective.prepare(model, {"pixel_values": torch.randn(2, 3, 64, 64), "rows": torch.tensor([0, 1])})
    objective.loss(model, made)
    assert seen == [2]


def test_the_advantage_is_over_the_other_samples_or_the_greedy_caption(make_objective):
    batch = {
        "images": np.array([0, 0, 0, 1, 1, 1]),
        "captions": ["a dog runs", "the dog", "grass", "two men", "two men on a beach", "a cat"],
        "ended": [True, True, False, True, True, True],
        "greedy_captions": ["the brown dog", "men"],
        "greedy_ended": [True, True],
    }
    reward = CaptionReward(REFERENCES)
    rewards = reward(batch["images"], batch["captions"], batch["ended"])
    mean, measured = make_objective(samples=3).advantage(batch)
    assert mean[0] == pytest.approx(rewards[0] - (rewards[1] + rewards[2]) / 2)
    assert mean.reshape(2, 3).sum(1) == pytest.approx([0, 0])
    assert measured == {"reward": pytest.approx(rewards.mean())}
    greedy, measured = make_objective(samples=3, baseline="greedy").advantage(batch)
    base = reward(np.array([0, 1]), batch["greedy_captions"], batch["greedy_ended"])
    assert greedy == pytest.approx(rewards - np.repeat(base, 3))
    assert measured["reward_greedy"] == pytest.approx(base.mean())


def test_the_gradient_is_the_policy_gradient(make_model, make_objective, monkeypatch):
    """Against the definition: - sum of advantage times log-probability of each sampled caption."""
    model, objective = make_model(), make_objective(samples=4)
    silence_dropout(model.decoder)
    made = objective.prepare(model, batch_of(model))
    advantage = np.random.default_rng(0).normal(size=8)  # a model without training says nothing worth a reward
    monkeypatch.setattr(objective, "advantage", lambda batch: (advantage, {}))
    loss, _ = objective.loss(model, made)
    logprobs = model.log_probability(made["input_ids"], made["image_tokens"])
    assert loss.item() == pytest.approx(-(logprobs.double() @ torch.tensor(advantage)).item(), abs=1e-4)
    loss.backward()
    assert model.projector.fc1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
        OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32, dropout=0.5
        ),
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, attention_dropout=0.5
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_dropout_is_silenced_however_it_is_kept(make_model, config):
    config.vocab_size = 50
    model = make_model(config).train()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 4, "image_tokens": batch_of(model)["image_tokens"]}
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    silence_dropout(model.decoder)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="the mean baseline needs at least 2 samples, not 1"):
        ScstConfig(samples=1)
    assert ScstConfig(samples=1, baseline="greedy").samples == 1


def scst(config, **kwargs):
    return replace(config, stage="scst", **kwargs)


@pytest.fixture(scope="module")
def trained(captioned, tmp_path_factory):
    """The settings of a run of cross-entropy that learned something."""
    config = debug(captioned, tmp_path_factory.mktemp("trained"), epochs=12, evaluate_every=12, learning_rate=3e-3)
    train(config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_scst_continues_cross_entropy_and_raises_the_reward(trained, tmp_path, baseline):
    shutil.copytree(trained.output, tmp_path, dirs_exist_ok=True)
    rewards = ScstConfig(baseline=baseline, samples=20)  # enough that chance does not decide
    second = scst(trained, output=tmp_path, epochs=10, evaluate_every=10, learning_rate=8e-4, scst=rewards)
    best = train(second)
    assert best == tmp_path / "scst" / "best"
    rewards = list(losses(tmp_path / "scst", "reward").values())
    assert np.mean(rewards[-8:]) > 1.3 * np.mean(rewards[:4])
    before, after = losses(tmp_path, "CIDEr"), losses(tmp_path / "scst", "CIDEr")
    assert after[0] == before[48]  # it starts where cross-entropy ended, and says so
    if baseline == "mean":
        assert after[40] >= before[48]
    assert captioner.load(best).processor.tokenizer.eos_token_id == 2
    assert (tmp_path / "best").is_dir()


def test_scst_resumes_exactly(captioned, tmp_path, monkeypatch):
    first = debug(captioned, tmp_path / "xe", epochs=1, grids=("2x2", "3x3"))
    start = str(train(first))
    whole, broken = (
        scst(first, output=tmp_path / name, init_from=start, epochs=2, learning_rate=1e-3)
        for name in ("whole", "broken")
    )
    train(whole)
    stop_at(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        train(broken)
    monkeypatch.undo()
    train(broken)
    for key in ("loss", "reward", "CIDEr"):
        assert losses(whole.folder, key) == losses(broken.folder, key)
    assert len(losses(whole.folder)) == 8


def test_scst_needs_a_captioner_to_start_from(captioned, tmp_path):
    with pytest.raises(ValueError, match="stage scst starts from a trained captioner, and there is none at"):
        train(scst(debug(captioned, tmp_path)))
    with pytest.raises(ValueError, match="no captioner model at './nowhere'"):
        train(scst(debug(captioned, tmp_path), init_from="./nowhere"))


def test_score_agrees_with_the_reward_but_for_the_end():
    """The reward is what evaluation measures, so that raising one raises the other."""
    captions = {0: "a dog runs through grass", 1: "two men", 2: "the cat is on a chair"}
    measured = score(captions, dict(enumerate(REFERENCES)), metrics=("CIDEr",))
    rewards = CaptionReward(REFERENCES)(np.arange(3), list(captions.values()), [True] * 3)
    assert np.corrcoef([measured.image(n)["CIDEr"] for n in range(3)], rewards)[0, 1] > 0.9


def test_a_score_close_to_meteor():
    from captioner.metrics.quick_meteor import Words, quick_meteor, stem

    def value(caption, *references):
        return quick_meteor(Words(caption), [Words(text) for text in references])

    reference = "a dog runs through the grass"
    assert value(reference, "two men", reference) == 1.0
    assert value("", reference) == value("two men", reference) == value("a dog") == 0.0
    assert 1 > value("a dog running through the grass", reference) > value("a dog sits in the grass", reference) > 0
    assert value("a dog runs", reference) > value("runs dog a", reference)  # fragments
    assert value("a dog", reference) > value("through the", reference)  # words of content count more
    assert {stem(word) for word in ("ride", "rides", "riding")} == {"rid"}
    assert {stem(word) for word in ("run", "runs", "running")} == {"run"}
    assert stem("grass") == "grass"


def test_the_right_objects_are_rewarded():
    vocabulary = TagVocabulary.of_names(["dog", "cat", "chair", "beach"])
    reward = CaptionReward(REFERENCES, object_weight=2.0, vocabulary=vocabulary)
    captions = ["a dog", "a cat", "a cat on a chair", "a dog on a chair", "a man", "a man"]
    images = np.array([0, 0, 2, 2, 2, 1])
    scores = reward.scores(images, captions, [True] * 6)
    assert scores["objects"] == pytest.approx([1, 0, 1, 0.5, 0, 0])
    plain = CaptionReward(REFERENCES)(images, captions, [True] * 6)
    assert reward(images, captions, [True] * 6) == pytest.approx(plain + 2 * scores["objects"])
    assert object_score([0, 1], {0: 1.0, 2: 0.5}) == pytest.approx(2 * 0.5 * (1 / 1.5) / (0.5 + 1 / 1.5))
    assert object_score([], {}) == 1.0
    assert object_score([], {1: 0.2}) == object_score([1], {}) == 0.0


def test_a_weight_below_zero_or_unknown_objects_are_refused(captioned, tmp_path):
    with pytest.raises(SettingError, match="meteor_weight must be 0 or more, not -1"):
        ScstConfig(meteor_weight=-1)
    train(debug(captioned, tmp_path, epochs=0.25, evaluate_images=2))
    config = debug(captioned, tmp_path, stage="scst", scst=ScstConfig(object_weight=1.0))
    with pytest.raises(SettingError, match="object_weight needs a vocabulary of objects") as raised:
        train(config)
    assert raised.value.settings == ("objects",)
