"""What a run goes on from, and what it refuses to go on from."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
from training_runs import losses, truncate

import captioner
from captioner import recipes
from captioner.encoders import create_encoder
from captioner.errors import SettingError
from captioner.pretraining.loop import pretrain
from captioner.runs.checkpoint import describe_files, find_damage, list_checkpoints
from captioner.training.loop import train


def test_what_to_resume_from_can_be_said(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=2)
    train(config)
    with pytest.raises(SettingError, match="an earlier run left the model .* and the log .* and the checkpoint .*08'"):
        train(replace(config, resume="never"))
    with pytest.raises(SettingError, match="no checkpoint at 'nowhere'; it is a folder such as"):
        train(replace(config, resume="nowhere"))
    elsewhere = str(unbroken.output / "checkpoints" / "step_00000012")
    with pytest.raises(SettingError, match="an earlier run left the model"):  # which another run's would replace
        train(replace(config, resume=elsewhere))
    (tmp_path / "log.jsonl").unlink()
    train(replace(config, resume=str(tmp_path / "checkpoints" / "step_00000004")))
    assert list(losses(tmp_path)) == [6, 8]


@pytest.mark.parametrize("choice", ["auto", "never"])
def test_a_finished_model_or_a_log_is_not_replaced(unbroken, tmp_path, choice):
    best = train(replace(unbroken, output=tmp_path, epochs=1))
    (best / "NOTES.md").write_text("of mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "step_" not in str(path)}
    shutil.rmtree(tmp_path / "checkpoints")
    config = replace(unbroken, output=tmp_path, epochs=1, seed=9, resume=choice)
    with pytest.raises(
        SettingError, match=r"left the model '.*best' and the log '.*log.jsonl', which .* replace"
    ) as caught:
        train(config)
    assert caught.value.settings == ("output",)
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(best)
    with pytest.raises(SettingError, match=r"an earlier run left the log '.*log.jsonl'"):
        train(config)
    assert (tmp_path / "log.jsonl").read_bytes() == before[tmp_path / "log.jsonl"]


def test_a_finished_encoder_is_not_replaced(captioned, tmp_path):
    config = replace(recipes.pretrain_debug(), output=tmp_path, captions=(str(captioned),), teachers=(), steps=2)
    pretrain(config)
    weights = (tmp_path / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(SettingError, match=r"left the model '.*model.safetensors' and the log"):
        pretrain(replace(config, seed=9))
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_a_checkpoint_of_captioner_0_1_is_gone_on_with(unbroken, tmp_path, caplog):
    shutil.copytree(unbroken.output, tmp_path / "run")
    (earlier, _) = list_checkpoints(tmp_path / "run" / "checkpoints")
    content = json.loads((earlier / "progress.json").read_text())
    for name, (_, digest) in content["files"].items():
        content["files"][name][1] = 2 * digest  # it wrote SHA-256, which is twice as long
    content["settings"] = {key: value for key, value in content["settings"].items() if "digest" not in key}
    (earlier / "progress.json").write_text(json.dumps(content))
    config = replace(unbroken, output=tmp_path / "run", resume=str(earlier))
    with pytest.raises(ValueError, match="was saved with model.width 64, this run has 32"):
        train(replace(config, model=replace(config.model, width=32)))
    train(config)
    assert "not compared: encoder digest, frozen decoder digest, tokenizer digest, data digest" in caplog.text
    assert losses(tmp_path / "run") == losses(unbroken.output)


def test_a_run_is_not_begun_in_the_folder_of_another_kind(captioned, unbroken, tmp_path):
    pretrain(replace(recipes.pretrain_debug(), output=tmp_path, captions=(str(captioned),), teachers=(), steps=1))
    with pytest.raises(SettingError, match="was saved with stage None, this run has 'xe'"):
        train(replace(unbroken, output=tmp_path))


def test_fewer_epochs_end_a_resumed_run(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=2)
    train(config)
    before = losses(tmp_path)
    train(replace(config, epochs=1))
    assert losses(tmp_path) == before


def test_a_damaged_checkpoint_that_was_asked_for_is_said_to_be(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=2)
    train(config)
    asked = tmp_path / "checkpoints" / "step_00000004"
    truncate(asked / "model.safetensors")
    with pytest.raises(ValueError, match=r"00000004' is damaged: .*; 'auto' takes the newest whole one"):
        train(replace(config, resume=str(asked)))


def test_a_run_is_not_resumed_with_another_tokenizer_or_encoder(captioned, unbroken, tmp_path, monkeypatch):
    config = replace(unbroken, output=tmp_path / "run", epochs=1)
    train(config)
    shutil.copytree(captioned, tmp_path / "other")
    path = tmp_path / "other" / "annotations" / "captions_train.json"
    path.write_text(path.read_text().replace("plain", "most unusual"))
    with pytest.raises(ValueError, match="was saved with tokenizer"):
        train(replace(config, data=replace(config.data, root=str(tmp_path / "other"))))
    with monkeypatch.context() as patched:
        patched.setattr("captioner.training.build.frozen_encoder", lambda name: shifted(create_encoder(name)))
        with pytest.raises(ValueError, match="was saved with encoder"):
            train(config)


def test_a_run_is_not_resumed_with_another_frozen_decoder_or_other_captions(captioned, unbroken, tmp_path):
    projector = replace(unbroken.model, tune="projector")
    shutil.copytree(unbroken.output / "best", tmp_path / "best")
    config = replace(unbroken, output=tmp_path / "run", epochs=1, init_from=str(tmp_path / "best"), model=projector)
    train(config)
    loaded = captioner.load(tmp_path / "best", "cpu")
    shifted(loaded.model.decoder)
    loaded.model.save_pretrained(tmp_path / "best")
    with pytest.raises(ValueError, match="was saved with frozen decoder digest"):
        train(config)
    shutil.copytree(captioned, tmp_path / "other")
    path = tmp_path / "other" / "annotations" / "captions_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["caption"], content["annotations"][-1]["caption"] = (
        content["annotations"][-1]["caption"],
        content["annotations"][0]["caption"],
    )
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was saved with data"):
        train(replace(unbroken, data=replace(unbroken.data, root=str(tmp_path / "other"))))


def shifted(encoder):
    for parameter in encoder.parameters():
        parameter.data += 0.5
    return encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, "was saved with model.width 64, this run has 32"),
        ({"encoder": "vit_tiny_patch16_224"}, "was saved with model.encoder 'local-dir:.*', this run has 'vit_tiny"),
        ({"blind": True}, "was saved with model.blind False, this run has True"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(captioned, unbroken, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(unbroken, model=replace(unbroken.model, **change)))
    assert find_damage(list_checkpoints(unbroken.output / "checkpoints")[-1]) is None


def test_a_checkpoint_of_another_number_of_processes_or_step_size_is_refused(unbroken, tmp_path):
    with pytest.raises(ValueError, match="was saved with images per step 8, this run has 4"):
        train(replace(unbroken, batch_size=4))
    config = replace(unbroken, output=tmp_path, epochs=1)
    train(config)
    progress = next(tmp_path.glob("checkpoints/*/progress.json"))
    progress.write_text(progress.read_text().replace('"processes": 1', '"processes": 4'))
    with pytest.raises(ValueError, match="saved by 4 processes, this run has 1; start it with 4"):
        train(config)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/captioner_was_here",)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_a_checkpoint_never_runs_code(unbroken, tmp_path, name):
    config = replace(unbroken, output=tmp_path, epochs=1)
    train(config)
    (folder,) = list_checkpoints(tmp_path / "checkpoints")
    with (folder / name).open("wb") as file:
        pickle.dump(Evil(), file, protocol=2)
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").unlink()
    (folder / "progress.json").write_text(json.dumps(progress | {"files": describe_files(folder)}))
    with pytest.raises(ValueError, match="holds more than tensors, refused"):
        train(config)
    assert not os.path.exists("/tmp/captioner_was_here")
