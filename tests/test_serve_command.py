"""The engine behind the API, a server that is busy or slow, and the command that starts one."""

import io
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import captioner
from captioner import cli

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

import httpx
from fastapi.testclient import TestClient

from captioner.search import Search
from captioner.serving.app import create_app
from captioner.serving.engine import Closed, Engine, Job, QueueFull
from captioner.serving.settings import Limits


@pytest.fixture
def model(saved_model):
    return captioner.load(saved_model, "cpu")


def files():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    return {"images": ("a.png", buffer.getvalue())}


class Slow:
    """A captioner that notes its batches, and waits until it may go on."""

    def __init__(self):
        self.batches, self.go, self.fail = [], threading.Event(), False

    def search(self, pixels, keys, search, grid=None):
        self.batches.append(keys)
        self.go.wait(10)
        if self.fail:
            raise RuntimeError("broken")
        return [[key] for key in keys]


def make_jobs(count, name="a", **options):
    return [Job(torch.zeros(3, 2, 2), f"{name}{n}", Search(**options)) for n in range(count)]


def test_images_of_several_requests_are_captioned_together():
    slow = Slow()
    engine = Engine(slow, batch_size=4, queue=10, wait=0)
    first = make_jobs(1, "first")
    engine.submit(first)
    while not slow.batches:
        time.sleep(0.001)
    jobs = [make_jobs(2, "a"), make_jobs(2, "b", captions=2), make_jobs(3, "c")]
    for group in jobs:
        engine.submit(group)
    with pytest.raises(QueueFull):
        engine.submit(make_jobs(4))
    jobs[2][1].result.cancel()
    slow.go.set()
    assert [job.result.result(10) for job in jobs[1]] == [["b0"], ["b1"]]
    engine.close()
    assert slow.batches == [["first0"], ["a0", "a1", "c0"], ["b0", "b1"], ["c2"]]
    with pytest.raises(Closed):
        engine.submit(make_jobs(1))
    assert not engine.alive


def test_a_batch_that_fails_stops_nothing():
    slow = Slow()
    slow.go.set()
    engine, slow.fail = Engine(slow), True
    [bad], [good] = make_jobs(1), make_jobs(1, "good")
    engine.submit([bad])
    with pytest.raises(RuntimeError):
        bad.result.result(10)
    slow.fail = False
    engine.submit([good])
    assert good.result.result(10) == ["good0"]
    engine.close()


def test_a_busy_server_says_so_and_recovers(model, monkeypatch):
    go, search = threading.Event(), model.search

    def slow(*args):
        go.wait(10)
        return search(*args)

    monkeypatch.setattr(model, "search", slow)
    with TestClient(create_app(model, Limits(requests=3), queue=4)) as client, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(client.post, "/v1/caption", files=files()) for _ in range(8)]
        while sum(answer.done() for answer in answers) < 5:
            time.sleep(0.01)
        assert client.get("/health").status_code == 200
        go.set()
        statuses = sorted(answer.result().status_code for answer in answers)
        assert statuses == [200] * 3 + [503] * 5
        assert client.post("/v1/caption", files=files()).status_code == 200


def test_a_request_that_takes_too_long_is_answered(model, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(model, "search", lambda pixels, *args: [[]] * len(pixels) if go.wait(10) else [])
    with TestClient(create_app(model, Limits(seconds=0.2))) as client:
        answer = client.post("/v1/caption", files=files())
        assert answer.status_code == 503
        assert "within 0.2 seconds" in answer.json()["error"]["message"]
        go.set()


def run(*args):
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", *map(str, args)])
    return stopped.value.code


def test_a_server_that_cannot_start_says_why_in_one_line(saved_model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CAPTIONER_PASSWORD", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "empty").touch()
        for options, message in (
            (["--port", port], f"cannot listen on 127.0.0.1, port {port}: Address already in use; change --host or"),
            (["--host", "no.such.host.invalid", "--port", 0], "cannot listen on no.such.host.invalid"),
            (["--host", "x" * 300, "--port", 0], "cannot listen on xxx"),
            (["--user", "ann", "--port", 0], "there is no password: set CAPTIONER_PASSWORD"),
            (["--user", "ann", "--password-file", tmp_path / "gone"], "cannot read"),
            (["--user", "ann", "--password-file", tmp_path / "empty"], "there is no password"),
            (["--password-file", tmp_path / "empty"], "no effect: there is no user"),
            (["--user", "a:b"], "has no colon"),
            (["--port", 70000], "port must be between 0 and 65535"),
            (["--queue", 2], "the queue has 2 places"),
            (["--timeout", 0], "timeout must be positive"),
        ):
            assert run(*options, "--model", saved_model) in (1, 2)
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run("--model", saved_model) == 1
    assert "serving needs the package uvicorn: pip install 'captioner[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(saved_model, tmp_path):
    (tmp_path / "password").write_text("secret\n")
    options = ["--model", saved_model, "--port", "0", "--user", "ann", "--password-file", tmp_path / "password"]
    command = [sys.executable, "-m", "captioner", "serve", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stderr.readline().split()[-1].removesuffix("/docs")
            client = httpx.Client(base_url=address, auth=("ann", "secret"), transport=httpx.HTTPTransport(retries=3))
            answer = client.post("/v1/caption", files=files(), timeout=60)
            assert answer.json()["results"][0]["caption"]
            assert httpx.get(f"{address}/metrics").status_code == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) in (0, -signal.SIGTERM, 143)
            assert process.stderr.read() == ""
        finally:
            process.kill()
