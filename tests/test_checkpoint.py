"""Never lose work: kills, signals, damage, full disks."""

import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training_runs import ROOT, debug, losses, stop_at

import captioner
from captioner.data.token_cache import encoder_fingerprint
from captioner.encoders import create_encoder
from captioner.training import checkpoint, decoder
from captioner.training.checkpoint import digests, find_damage, list_checkpoints, recover_folder, replace_folder
from captioner.training.decoder import train
from captioner.training.export import save_best
from captioner.training.interruption import Interruption


def with_dropout(config):
    """Random numbers decide the loss, so that a resumed run is equal only if they go on where they were."""
    return replace(config, model=replace(config.model, dropout=0.2))


@pytest.fixture(scope="module")
def unbroken(captioned, tmp_path_factory):
    """The folder of a run of 12 steps, validated at each fourth, that was never stopped."""
    config = debug(captioned, tmp_path_factory.mktemp("unbroken"), epochs=3, log_every=2, grids=("2x2", "3x3"))
    config = with_dropout(config)
    train(config)
    return config


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
    validate = decoder.validate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    monkeypatch.setattr(decoder, "validate", interrupted)
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
        monkeypatch.setattr("captioner.training.interruption.GRACE", -1.0)
        os.kill(os.getpid(), signal.SIGINT)
        assert killed
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_signal_to_every_process_of_the_run_loses_nothing(captioned, tmp_path):
    command = [sys.executable, "train.py", "debug", "--data.root", captioned, "--data.workers", 2, "--epochs", 500]
    command += ["--save-steps", 1, "--evaluate-every", 500, "--output", tmp_path]
    with subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not list_checkpoints(tmp_path / "checkpoints"):
            time.sleep(0.02)
        assert len(list_children(process.pid)) >= 2
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.05)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 143, stderr
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
    command = [sys.executable, "train.py", "debug", "--data.root", captioned, "--data.captions-per-image", 2]
    command += ["--epochs", 3, "--log-every", 2, "--model.dropout", 0.2, "--save-steps", 1, "--output", tmp_path]
    command += ["--grids", "2x2", "3x3"]
    env = os.environ | {"CAPTIONER_DEBUG": "1"}
    moments = random.Random(0)
    for kill in (True, True, True, False):
        known = len(list((tmp_path / "checkpoints").glob("*"))) and list_checkpoints(tmp_path / "checkpoints")[-1]
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, stderr=stderr, stdout=stderr)
            if kill:
                while process.poll() is None and list_checkpoints(tmp_path / "checkpoints")[-1:] in ([], [known]):
                    time.sleep(0.005)
                time.sleep(moments.uniform(0, 0.4))
                process.kill()
            code = process.wait(timeout=300)
        assert code in ((-signal.SIGKILL, 0) if kill else (0,)), (tmp_path / "stderr").read_text()
    for key in ("loss", "CIDEr", "loss_val"):
        assert losses(tmp_path, key) == losses(unbroken.output, key)
    assert find_damage(list_checkpoints(tmp_path / "checkpoints")[-1]) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


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


def test_without_any_whole_checkpoint_a_run_refuses_to_begin_anew(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=1)
    train(config)
    truncate(tmp_path / "checkpoints" / "step_00000004" / "model.safetensors")
    with pytest.raises(ValueError, match=r"every checkpoint in '.*' is damaged; delete that folder to start over"):
        train(config)


@contextlib.contextmanager
def full_disk():
    """As on a full disk, writing fails midway, wherever a file grows beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_earlier_checkpoint_and_the_best_model(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=1)
    best = train(config)
    said = r"cannot write checkpoint '.*08' \(.*\); free .*00000004' is kept"
    with full_disk(), pytest.raises(OSError, match=said):
        train(replace(config, epochs=2))
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert find_damage(kept) is None
    loaded = captioner.load(best, "cpu")
    with full_disk(), pytest.raises(OSError, match=r"cannot write the model '.*best' \(.*\); free some disk space"):
        save_best(Accelerator(cpu=True), loaded.model, loaded.processor, best, "float32")
    again = captioner.load(best, "cpu").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in loaded.model.state_dict().items())
    assert not (tmp_path / ".best").exists()


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
    with pytest.raises(ValueError, match=r"at step \d+; lower --learning-rate and run again, which resumes"):
        train(replace(config, epochs=2, learning_rate=1e30, clip=1e30, save_steps=1))
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    state = torch.load(newest / "optimizer.bin", weights_only=True)
    assert all(torch.isfinite(moments["exp_avg"]).all() for moments in state["state"].values())


def test_what_to_resume_from_can_be_said(unbroken, tmp_path):
    config = replace(unbroken, output=tmp_path, epochs=2)
    train(config)
    with pytest.raises(ValueError, match="--resume is never; name another --output"):
        train(replace(config, resume="never"))
    with pytest.raises(ValueError, match="no checkpoint at 'nowhere': name a folder such as"):
        train(replace(config, resume="nowhere"))
    (tmp_path / "log.jsonl").unlink()
    train(replace(config, resume=str(tmp_path / "checkpoints" / "step_00000004")))
    assert list(losses(tmp_path)) == [6, 8]


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
    with pytest.raises(ValueError, match=r"00000004' is damaged, .*; --resume auto takes the newest whole one"):
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
    with pytest.raises(ValueError, match="was saved with decoder"):
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
        ({"encoder": "vit_tiny_patch16_224"}, "was saved with model.encoder 'lookupvit"),
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
    with pytest.raises(ValueError, match="saved by 4 processes, this run has 1; launch with --num_processes 4"):
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
    (folder / "progress.json").write_text(json.dumps(progress | {"files": digests(folder)}))
    with pytest.raises(ValueError, match="holds more than tensors, refused"):
        train(config)
    assert not os.path.exists("/tmp/captioner_was_here")


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
