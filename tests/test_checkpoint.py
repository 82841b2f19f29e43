"""Never lose work: kills, signals, damage, full disks."""

import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import Script
from training_runs import debug_args, full_disk, losses, stop_at, truncate

import captioner
from captioner.data.fingerprint import encoder_fingerprint
from captioner.errors import SettingError
from captioner.runs import checkpoint
from captioner.runs.checkpoint import find_damage, list_checkpoints
from captioner.runs.files import recover_folder, replace_folder
from captioner.runs.interruption import Interruption
from captioner.training import loop as decoder
from captioner.training import stages
from captioner.training.loop import train
from captioner.training.saving import save_best


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(unbroken, tmp_path, monkeypatch, number, code):
    config = replace(unbroken, output=tmp_path)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    stop_at(monkeypatch, 5, number)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000005"
    monkeypatch.undo()
    train(config)
    for key in ("loss", "learning_rate", "CIDEr", "loss_val"):
        assert losses(tmp_path, key) == losses(unbroken.output, key)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 4, 6, 8, 8, 10, 12, 12]


def test_a_signal_during_validation_stops_at_once_and_validation_comes_again(unbroken, tmp_path, monkeypatch):
    validate = stages.validate

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args, **options)

    monkeypatch.setattr(stages, "validate", interrupted)
    with pytest.raises(SystemExit, match="143"):
        train(replace(unbroken, output=tmp_path))
    monkeypatch.undo()
    assert not (tmp_path / "best").exists()
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000004"
    train(replace(unbroken, output=tmp_path))
    for key in ("loss", "CIDEr"):
        assert losses(tmp_path, key) == losses(unbroken.output, key)


def test_a_repeated_signal_is_the_same_wish_for_a_while_and_kills_later(monkeypatch):
    killed = []
    before = signal.signal(signal.SIGINT, lambda *_: killed.append(1))  # where it would kill
    with Interruption() as interruption:
        for _ in range(3):  # a scheduler, its launcher and the terminal
            os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received == signal.SIGINT
        assert not killed
        monkeypatch.setattr("captioner.runs.interruption.GRACE", -1.0)
        os.kill(os.getpid(), signal.SIGINT)
        assert killed
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_signal_to_every_process_of_the_run_loses_nothing(captioned, tmp_path):
    args = [*debug_args(captioned, tmp_path), "--data.workers", 2, "--epochs", 500]
    args += ["--save-steps", 1, "--evaluate-every", 500]
    process = Script("train.py", *args, session=True)
    while process.poll() is None and not list_checkpoints(tmp_path / "checkpoints"):
        time.sleep(0.02)
    assert len(list_children(process.pid)) >= 2
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    stdout, stderr = process.communicate()
    assert process.poll() == 143, stderr
    assert "Traceback" not in stderr
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert f"stopped at step {int(newest.name.removeprefix('step_'))} of" in stdout
    assert find_damage(newest) is None


def list_children(process):
    return (Path("/proc") / str(process) / "task" / str(process) / "children").read_text().split()


def test_what_a_kill_left_half_done_is_undone(unbroken, tmp_path, capsys):
    config = replace(unbroken, output=tmp_path, epochs=2)
    train(config)
    checkpoints = tmp_path / "checkpoints"
    for left in (".step_00000006", ".step_00000004.previous"):  # half written; superseded
        shutil.copytree(checkpoints / "step_00000004", checkpoints / left)
    (checkpoints / "step_00000008").rename(checkpoints / ".step_00000008.previous")  # between two renames
    train(config)
    assert f"resumed from {checkpoints / 'step_00000008'}" in capsys.readouterr().out
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000004", "step_00000008"]


def test_a_run_killed_before_its_first_checkpoint_begins_its_log_anew(unbroken, tmp_path):
    (tmp_path / "checkpoints").mkdir()  # the run made it, and was killed before it wrote a checkpoint into it
    (tmp_path / "log.jsonl").write_text('{"step": 2, "loss": 99.0}\n{"step": 4, "lo')
    train(replace(unbroken, output=tmp_path, epochs=1))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 4]


def test_checkpoints_are_written_by_minutes_and_the_newest_kept(unbroken, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        decoder, "save_checkpoint", lambda *args: written.append(args[2]) or checkpoint.save_checkpoint(*args)
    )
    train(replace(unbroken, output=tmp_path, epochs=2, save_minutes=0, keep_checkpoints=3))
    assert sorted(set(written)) == list(range(1, 9))
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000006", "step_00000007", "step_00000008"]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_has_the_losses_of_one_never_killed(captioned, unbroken, tmp_path):
    args = [*debug_args(captioned, tmp_path), "--epochs", 3, "--log-every", 2, "--model.dropout", 0.2]
    args += ["--save-steps", 1, "--grids", "2x2", "3x3"]
    moments = random.Random(0)
    for kill in (True, True, True, False):
        known = len(list((tmp_path / "checkpoints").glob("*"))) and list_checkpoints(tmp_path / "checkpoints")[-1]
        process = Script("train.py", *args, env={"CAPTIONER_DEBUG": "1"})
        if kill:
            while process.poll() is None and list_checkpoints(tmp_path / "checkpoints")[-1:] in ([], [known]):
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.4))
            process.kill()
        _, stderr = process.communicate()
        assert process.poll() in ((-signal.SIGKILL, 0) if kill else (0,)), stderr
    for key in ("loss", "CIDEr", "loss_val"):
        assert losses(tmp_path, key) == losses(unbroken.output, key)
    assert find_damage(list_checkpoints(tmp_path / "checkpoints")[-1]) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "said"),
    [
        (truncate, "optimizer.bin", "optimizer.bin has .* bytes instead of"),
        (flip, "model.safetensors", "model.safetensors is not what was written"),
        (truncate, "progress.json", "progress.json cannot be read"),
        (lambda path: path.unlink(), "random_states_0.pkl", "random_states_0.pkl is missing"),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(unbroken, tmp_path, caplog, damage, file, said):
    config = replace(unbroken, output=tmp_path, epochs=2)
    train(config)
    damage(tmp_path / "checkpoints" / "step_00000008" / file)
    train(config)
    assert [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert re.search(said, caplog.text)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000004", "step_00000008"]
    assert find_damage(tmp_path / "checkpoints" / "step_00000008") is None
    assert list(losses(tmp_path)) == [2, 4, 6, 8]


@pytest.mark.parametrize("files", [["a"], {"a": 1}, {"a": [1, 2, 3]}, {"a": ["x", "y"]}, None, "a"])
def test_a_list_of_files_in_another_form_is_damage(tmp_path, files):
    (tmp_path / "progress.json").write_text(json.dumps({"files": files}))
    assert find_damage(tmp_path).startswith("progress.json cannot be read")


def test_without_any_whole_checkpoint_a_run_refuses_to_begin_anew(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=1)
    train(config)
    truncate(tmp_path / "checkpoints" / "step_00000004" / "model.safetensors")
    with pytest.raises(ValueError, match=r"every checkpoint in '.*' is damaged; delete that folder"):
        train(config)


def test_a_full_disk_keeps_the_earlier_checkpoint_and_the_best_model(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=1)
    best = train(config)
    said = r"cannot write checkpoint '.*08' \(.*\); free some disk space and run again; '.*00000004' is still there"
    with full_disk(), pytest.raises(OSError, match=said):
        train(replace(config, epochs=2))
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert find_damage(kept) is None
    loaded = captioner.load(best, "cpu")
    with full_disk(), pytest.raises(OSError, match=r"cannot write the model '.*best' \(.*\); free some disk space"):
        save_best(Accelerator(cpu=True), loaded.model, loaded.processor, best, "float32")
    again = captioner.load(best, "cpu").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in loaded.model.state_dict().items())
    assert not list(tmp_path.glob(".*"))


def test_a_model_saved_in_bfloat16_keeps_its_token_cache(unbroken, tmp_path):
    loaded = captioner.load(unbroken.output / "best", "cpu")
    save_best(Accelerator(cpu=True), loaded.model, loaded.processor, tmp_path / "half", "bfloat16")
    again = captioner.load(tmp_path / "half", "cpu")
    prints = [
        encoder_fingerprint(m.model.encoder, m.model.config.encoder_config, m.processor.image) for m in (loaded, again)
    ]
    assert prints[0] == prints[1]
    assert not again.model.projector.fc1.weight.equal(loaded.model.projector.fc1.weight)


def test_weights_that_are_not_finite_are_never_saved(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=1)
    train(config)
    with pytest.raises(SettingError, match=r"at step \d+; with a lower learning rate, the run continues from the last"):
        train(replace(config, epochs=2, learning_rate=1e30, clip=1e30, save_steps=1))
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    state = torch.load(newest / "optimizer.bin", weights_only=True)
    assert all(torch.isfinite(moments["exp_avg"]).all() for moments in state["state"].values())


def test_a_folder_is_replaced_without_a_moment_of_nothing(tmp_path):
    new, final = tmp_path / "new", tmp_path / "best"
    for content in ("old", "young"):
        new.mkdir()
        (new / "file").write_text(content)
        replace_folder(new, final)
    assert (final / "file").read_text() == "young"
    final.rename(tmp_path / ".best.previous")  # as a kill between the two renames leaves it
    recover_folder(final)
    assert (final / "file").read_text() == "young"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
