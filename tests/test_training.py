import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from PIL import Image
from training_runs import COLOURS, debug, debug_args, launch, launch_by_accelerate, losses

import captioner
from captioner import recipes
from captioner.commands.evaluate import EvaluateConfig, evaluate
from captioner.commands.evaluate import run as run_evaluate
from captioner.data.config import DataConfig
from captioner.encoders import create_encoder
from captioner.encoders.stems import NetworkStem
from captioner.runs.sharding import check_sharding
from captioner.training.loop import train


def test_every_recipe_builds():
    for recipe in (*recipes.TRAIN.values(), *recipes.PRETRAIN.values()):
        assert recipe().output.parts[0] == "runs"
        assert "captioner " in recipe.__doc__ or "accelerate launch" in recipe.__doc__
    for recipe in recipes.PRETRAIN.values():
        config = recipe()
        stem = create_encoder(config.encoder, **config.encoder_options).patch_embed
        if isinstance(stem, NetworkStem):
            assert any((stem.name, stem.options) == (teacher.name, teacher.options) for teacher in config.teachers)


@pytest.mark.slow
def test_a_trained_captioner_says_what_it_sees_and_a_blind_one_does_not(captioned, tmp_path):
    scores = {}
    for blind in (False, True):
        config = debug(captioned, tmp_path / str(blind), epochs=12, evaluate_every=12, learning_rate=3e-3)
        best = train(replace(config, model=replace(config.model, blind=blind)))
        scores[blind] = list(losses(tmp_path / str(blind), "CIDEr").values())[-1]
    assert scores[False] > 2 * scores[True]
    captions = captioner.load(tmp_path / "False" / "best")([Image.new("RGB", (50, 40), c) for c in COLOURS.values()])
    assert [name in text for name, text in zip(COLOURS, captions, strict=True)] == [True] * 4
    assert {path.name for path in best.iterdir()} >= {"config.json", "model.safetensors", "processor_config.json"}
    assert json.loads((tmp_path / "True" / "run_config.json").read_text())["model"]["blind"] is True


def test_checkpoints_leave_the_frozen_encoder_out(captioned, tmp_path):
    from safetensors import safe_open

    train(debug(captioned, tmp_path, epochs=1))
    with safe_open(next(tmp_path.glob("checkpoints/*/model.safetensors")), "pt") as file:
        keys = list(file.keys())
    assert not [key for key in keys if key.startswith("encoder.")]
    assert [key for key in keys if key.startswith("decoder.")]


def test_half_precision_halves_the_saved_model(captioned, tmp_path):
    sizes = {}
    for dtype in ("float32", "float16"):
        best = train(debug(captioned, tmp_path / dtype, epochs=1, save_dtype=dtype))
        sizes[dtype] = (best / "model.safetensors").stat().st_size
        assert len({path.stat().st_mode for path in best.iterdir()}) == 1  # who may read one may read all
        model = captioner.load(best).model
        assert model.decoder.lm_head.weight is model.decoder.transformer.wte.weight
    assert sizes["float16"] == pytest.approx(sizes["float32"] / 2, rel=0.01)


def test_accumulation_does_not_change_the_loss(captioned, tmp_path):
    for name, batch, accumulation in (("one", 8, 1), ("four", 2, 4)):
        train(debug(captioned, tmp_path / name, epochs=1, batch_size=batch, accumulation=accumulation))
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert one == pytest.approx(four, abs=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(captioned, tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+; with a lower learning rate"):
        train(debug(captioned, tmp_path, epochs=4, learning_rate=1e30, clip=1e30))


@pytest.mark.parametrize(
    ("model", "grids", "message"),
    [
        ({}, ("2x2", "5x5"), "the model's own grid, the grid 3x3, which is none of the grids to train at, 2x2, 5x5"),
        ({"grid": None}, ("2x2", "3X3"), "own grid, the grid 5x5, which is none of"),
        (
            {"encoder": "vit_tiny_patch16_224", "grid": None},
            ("2x2", "3x3"),
            "own grid, a token for every cell",
        ),
        ({}, ("3x3", "15x15"), "15x15"),
        ({"max_length": 500}, ("3x3", "7x7"), "room for 512 tokens; those of the grid 7x7 and text need 550"),
        ({}, ("3x3", "five"), "grid 'five' is not of the form ROWSxCOLUMNS"),
        ({"encoder": "vit_tiny_patch16_224", "image_size": 65, "grid": None}, (), "does not take images of 65x65 px"),
        ({"image_size": 65}, (), "image of 65x65 px is not a multiple of the patch"),
        ({"image_size": 32}, (), "grid 3x3 is not within the lookup grid 2x2"),
    ],
)
def test_grids_and_sizes_that_do_not_fit_are_refused_before_training(captioned, tmp_path, model, grids, message):
    config = debug(captioned, tmp_path)
    with pytest.raises(ValueError, match=message):
        train(replace(config, model=replace(config.model, **model), grids=grids))
    assert not (tmp_path / "log.jsonl").exists()


def test_training_stops_early(captioned, tmp_path):
    with pytest.raises(ValueError, match="patience must be positive, not 0"):
        debug(captioned, tmp_path, patience=0)
    train(debug(captioned, tmp_path, epochs=20, learning_rate=1e-9, patience=2))
    assert len(losses(tmp_path, "CIDEr")) == 3


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(captioned, tmp_path, no_java):
    shared = ["--epochs", 1, "--grids", "2x2", "3x3", "7x7"]
    for processes, batch in ((1, 12), (2, 6)):  # the last batch has 8 of 12 images
        args = [*debug_args(captioned, tmp_path / str(processes)), *shared, "--batch-size", batch]
        result = launch("train.py", *args, processes=processes)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-4)
    for processes in (1, 2):
        args = ["--model", tmp_path / "1" / "best", "--data.root", captioned, "--split", "val", "--batch-size", 3]
        result = launch("evaluate.py", *args, "--output", tmp_path / f"eval{processes}", processes=processes)
        assert result.returncode == 0, result.stderr
    for name in ("results.json", "scores.json"):
        assert (tmp_path / "eval1" / name).read_text() == (tmp_path / "eval2" / name).read_text()


def test_evaluation_fails_where_an_image_cannot_be_opened(captioned, saved_model, tmp_path, no_java):
    root = shutil.copytree(captioned, tmp_path / "data")
    bad = sorted((root / "images").glob("val*"))[0]
    bad.write_bytes(b"no image")
    data = DataConfig(root=str(root), workers=0)
    config = EvaluateConfig(model=str(saved_model), data=data, split="val", output=tmp_path / "out")
    assert run_evaluate(config) == 1
    first = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert first["caption"] == ""
    assert bad.name in first["error"]
    warnings = json.loads((tmp_path / "out" / "scores.json").read_text())["warnings"]
    assert "images that cannot be opened, scored as if their caption were empty: 1" in warnings


def test_evaluation_writes_results_and_scores(captioned, saved_model, tmp_path, no_java):
    config = EvaluateConfig(
        model=str(saved_model), data=DataConfig(root=str(captioned), workers=0), split="val", output=tmp_path, limit=5
    )
    scores = evaluate(config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["image_id"] for result in results] == [0, 1, 2, 3, 4]
    assert all(isinstance(result["caption"], str) for result in results)
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["corpus"]["CIDEr"] == scores["CIDEr"]
    assert {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"} <= set(saved["corpus"])
    assert evaluate(config)["CIDEr"] == scores["CIDEr"]  # the same again is no loss
    for gone in (None, "scores.json", "run_config.json"):  # whichever files are left
        if gone:
            (tmp_path / gone).unlink()
        with pytest.raises(ValueError, match="results.json .*of a run with other settings, which this would replace"):
            evaluate(replace(config, limit=4))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    evaluate(replace(config, limit=4, overwrite=True))
    assert len(json.loads((tmp_path / "results.json").read_text())) == 4


@pytest.mark.slow
def test_two_processes_learn_from_rewards_and_stop_together(captioned, tmp_path):
    shared = [*debug_args(captioned, tmp_path, encoder=False), "--batch-size", 4]
    train(debug(captioned, tmp_path, epochs=1))
    scst = ["--stage", "scst", "--scst.samples", 2, "--epochs", 3, "--save-steps", 1, "--evaluate-every", 3]
    stop = tmp_path / "scst" / "checkpoints" / "step_00000003"
    result = launch_by_accelerate("train.py", *shared, *scst, stop_after=stop)
    assert result.returncode != 0
    assert "stopped at step" in result.stdout
    result = launch("train.py", *shared, *scst)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert list(losses(tmp_path / "scst")) == list(range(1, 13))
    assert len(losses(tmp_path / "scst", "reward")) == 12


@pytest.mark.slow
def test_sharded_training_is_the_same_training(captioned, tmp_path, monkeypatch):
    whole = debug(captioned, tmp_path / "whole", epochs=2)
    train(whole)
    settings = {"VERSION": 2, "STATE_DICT_TYPE": "FULL_STATE_DICT", "CPU_RAM_EFFICIENT_LOADING": "false"}
    for name, value in ({"AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"} | settings).items():
        monkeypatch.setenv(f"FSDP_{name}", str(value))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    shared = [*debug_args(captioned, tmp_path / "sharded"), "--batch-size", 4, "--epochs", 2, "--save-steps", 1]
    stop = tmp_path / "sharded" / "checkpoints" / "step_00000003"
    result = launch("tests/fsdp_on_cpus.py", *shared, stop_after=stop)
    assert "stopped at step" in result.stdout
    result = launch("tests/fsdp_on_cpus.py", *shared)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert losses(tmp_path / "sharded") == pytest.approx(losses(whole.output), abs=1e-4)
    assert losses(tmp_path / "sharded", "loss_val") == pytest.approx(losses(whole.output, "loss_val"), abs=1e-4)
    ours, theirs = (captioner.load(tmp_path / name / "best").model.state_dict() for name in ("whole", "sharded"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in ours)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"VERSION": 1}, "launch it with fsdp_version 2"),
        ({"VERSION": 2, "STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type FULL_STATE_DICT"),
        ({"VERSION": 2, "CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading false"),
    ],
)
def test_sharding_that_would_fail_later_is_refused_first(monkeypatch, settings, said):
    for name, value in ({"STATE_DICT_TYPE": "FULL_STATE_DICT"} | settings).items():
        monkeypatch.setenv(f"FSDP_{name}", str(value))
    plugin = FullyShardedDataParallelPlugin()
    state = SimpleNamespace(fsdp_plugin=plugin)
    sharded = SimpleNamespace(state=state, distributed_type="FSDP", is_fsdp2=plugin.fsdp_version == 2)
    with pytest.raises(ValueError, match=said):
        check_sharding(sharded, unsharded="encoder")
