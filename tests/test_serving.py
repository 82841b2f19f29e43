"""The HTTP API: captions, an interface like OpenAI's, limits, and what hostile requests get."""

import base64
import io
import json
import os

import pytest
from PIL import Image

import captioner

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from fastapi.testclient import TestClient
from hypothesis import HealthCheck

from captioner.serving.app import create_app
from captioner.serving.settings import Credentials, Limits

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "10"))

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

LIMITS = Limits(upload=200_000, images=4, pixels=1_000_000, requests=3, seconds=30)


@pytest.fixture
def model(saved_model):
    return captioner.load(saved_model, "cpu")


@pytest.fixture
def client(model):
    with TestClient(create_app(model, LIMITS), raise_server_exceptions=True) as client:
        yield client


def encode(colour="red", form="PNG", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def error_of(answer):
    fault = answer.json()["error"]
    assert set(fault) == {"message", "type"}
    assert "\n" not in fault["message"]
    return fault["message"]


def test_json_and_forms_get_the_captions_of_the_model(client, model):
    images = [encode("red"), encode("blue", "JPEG")]
    expected = model(images)
    answer = client.post("/v1/caption", json={"images": [b64(images[0]), f"data:image/jpeg;base64,{b64(images[1])}"]})
    assert answer.status_code == 200
    assert [result["caption"] for result in answer.json()["results"]] == expected
    files = [("images", ("a.png", images[0])), ("image", ("b.jpg", images[1]))]
    answer = client.post("/v1/caption", files=files, data={"captions": "2", "num_beams": "3", "grid": "3x3"})
    assert [result["name"] for result in answer.json()["results"]] == ["a.png", "b.jpg"]
    for result, image in zip(answer.json()["results"], images, strict=True):
        [found] = model.stream(image, captions=2, num_beams=3, grid="3x3")
        assert [one["caption"] for one in result["captions"]] == [one.caption for one in found.candidates]
        assert result["error"] is None


def test_options_are_those_of_captioning(client, model):
    def ask(**options):
        answer = client.post("/v1/caption", json={"images": [b64(encode())], **options})
        assert answer.status_code == 200
        return answer.json()["results"][0]

    assert ask(prompt="a dog")["caption"].startswith("a dog")
    assert ask(sample=True, seed=3, temperature=2) == ask(sample=True, seed=3, temperature=2)
    assert len({ask(sample=True)["caption"] for _ in range(5)}) > 1
    low = ask(min_confidence=1)
    assert low["caption"] is None
    assert "below 1.0" in low["error"]


def test_one_image_that_cannot_be_used_does_not_spoil_the_others(client):
    answer = client.post("/v1/caption", json={"images": [b64(b"broken"), b64(encode()), ""]})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [result["error"] is None for result in results] == [False, True, False]
    assert "'image 1' is not an image" in results[0]["error"]
    assert "is empty" in results[2]["error"]
    answer = client.post("/v1/caption", json={"images": [b64(b"broken")]})
    assert answer.status_code == 422
    assert "is not an image" in error_of(answer)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"images": []}, 422, "images: "),
        ({}, 422, "images: Field required"),
        ({"images": ["no base64!"]}, 422, "not valid base64"),
        ({"images": ["/etc/passwd"]}, 422, "cannot|not"),
        ({"images": ["file:///etc/passwd"]}, 422, "other URLs are not opened"),
        ({"images": ["http://localhost/a.png"]}, 422, "other URLs are not opened"),
        ({"images": ["QQ=="] * 5}, 422, "4 images, not 5"),
        ({"images": ["QQ=="], "captions": 0}, 422, "captions"),
        ({"images": ["QQ=="], "captions": 3, "num_beams": 2}, 422, "as many beams"),
        ({"images": ["QQ=="], "seed": 2}, 422, "seed has no effect"),
        ({"images": ["QQ=="], "sample": True, "num_beams": 3}, 422, "no beams"),
        ({"images": ["QQ=="], "colour": 2}, 422, "colour: Extra inputs"),
        ({"images": ["QQ=="], "grid": "axb"}, 422, "grid"),
        ({"images": [b64(encode())], "grid": "999x999"}, 422, "grid 999x999"),
        ({"images": [b64(encode())], "grid": "0"}, 422, "grid"),
        ({"images": [b64(encode())], "max_new_tokens": 100}, 422, "room for 64 tokens"),
        ({"images": [b64(encode())], "prompt": "dog " * 100}, 422, "room for 64 tokens"),
        ({"images": [b64(encode(size=(1500, 1500)))]}, 422, "over 1 megapixels"),
        ({"images": [b64(encode(size=(1500, 1)))]}, 422, "one side over 1000 times"),
        ([1], 422, "object"),
        (b'{"images": [', 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
        (b'{"images": ["QQ=="], "prompt": "\\ud800"}', 400, "JSON"),
        (b'{"images": ["QQ=="], "temperature": NaN, "sample": true}', 422, "temperature"),
        (b'{"images": ["\xff"]}', 400, "JSON"),
        (b"x" * 300_000, 413, "MiB"),
    ],
)
def test_requests_that_cannot_be_served_are_the_client_s_fault(client, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/v1/caption", content=content, headers={"Content-Type": "application/json; charset=utf-8"})
    assert answer.status_code == status, answer.text
    assert any(part in error_of(answer) for part in message.split("|"))
    assert client.post("/v1/caption", json={"images": [b64(encode())]}).status_code == 200  # it goes on


def test_forms_that_cannot_be_read_are_the_client_s_fault(client):
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    for content, statuses in (
        (b"", (400, 422)),
        (b"garbage", (400, 422)),
        (part, (400, 422)),
        (part + b"broken\r\n--x--\r\n", (422,)),
        ((part + b"QQ\r\n") * 9 + b"--x--\r\n", (400, 413)),
        (b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\ntext\r\n--x--\r\n', (422,)),
        (b'--x\r\nContent-Disposition: form-data; name="other"; filename="a"\r\n\r\ntext\r\n--x--\r\n', (422,)),
        (b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"a" * 50_000 + b"\r\n--x--\r\n", (400,)),
        (b'--x\r\nContent-Disposition: form-data; name="grid"\r\n\r\n3\r\n' * 2 + b"--x--\r\n", (422,)),
    ):
        answer = client.post("/v1/caption", content=content, headers=head)
        assert answer.status_code in statuses, (content[:100], answer.text)
        error_of(answer)
    for kind in ("multipart/form-data", "text/plain", "", "image/png", "multipart/form-data; boundary="):
        answer = client.post("/v1/caption", content=b"abc", headers={"Content-Type": kind})
        assert answer.status_code in (400, 415, 422)
        error_of(answer)


def test_a_body_that_hides_its_size_is_refused(client):
    def endless():
        for _ in range(1000):
            yield b"x" * 10_000

    answer = client.post("/v1/caption", content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_names_of_uploads_are_names_alone(client, tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encode())
    files = [("images", (name, data)) for name, data in ((str(path), b""), ("../../etc/passwd", b"x"))]
    answer = client.post("/v1/caption", files=files)
    assert answer.status_code == 422
    assert "is empty" in error_of(answer)


def chat(**more):
    url = f"data:image/png;base64,{b64(encode())}"
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "captioner", "messages": [{"role": "user", "content": parts}], **more}


def test_openai_s_clients_get_the_caption(client, model):
    answer = client.post("/v1/chat/completions", json=chat(max_tokens=5, user="ignored")).json()
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": model(encode(), max_new_tokens=5)}
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["completion_tokens"] > 0
    assert len(client.post("/v1/chat/completions", json=chat(n=3)).json()["choices"]) == 3
    cold = client.post("/v1/chat/completions", json=chat(temperature=0)).json()
    assert cold["choices"][0]["message"]["content"] == model(encode())
    warm = [client.post("/v1/chat/completions", json=chat(temperature=2, seed=s)).json() for s in (1, 1, 2)]
    texts = [each["choices"][0]["message"]["content"] for each in warm]
    assert texts[0] == texts[1] != texts[2]
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"]["content"] == model(encode())
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert client.get("/v1/models").json()["data"][0]["object"] == "model"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "gpt-4o"}, 404),
        ({"messages": []}, 422),
        ({"messages": [{"role": "user", "content": "hello"}]}, 422),
        ({"messages": chat()["messages"] * 2}, 422),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 422),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]}, 422),
        ({"n": 99}, 422),
        ({"temperature": -1}, 422),
    ],
)
def test_chats_that_cannot_be_served_are_the_client_s_fault(client, change, status):
    answer = client.post("/v1/chat/completions", json=chat() | change)
    assert answer.status_code == status
    error_of(answer)
    answer = client.post("/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_health_and_counts(client):
    client.post("/v1/caption", json={"images": [b64(encode()), b64(b"broken")]})
    client.get("/made/up")
    assert client.get("/health").json()["status"] == "ok"
    text = client.get("/metrics").text
    assert 'captioner_requests_total{path="/v1/caption",status="200"} 1.0' in text
    assert 'captioner_requests_total{path="other",status="404"} 1.0' in text
    assert 'captioner_images_total{result="captioned"} 1.0' in text
    assert 'captioner_images_total{result="of an unsupported format"} 1.0' in text
    assert "captioner_batch_size_sum 1.0" in text
    assert client.get("/docs").status_code == 200
    assert set(client.get("/openapi.json").json()["paths"]) >= {"/v1/caption", "/v1/chat/completions", "/health"}


def test_a_user_and_a_password_are_asked_for(model):
    wrong = ("Basic", "Basic !", "Bearer no", "Bearer ", "Digest x")
    with TestClient(create_app(model, LIMITS, Credentials("ann", "pass:ä"))) as client:
        assert client.get("/health").status_code == 200
        for path in ("/metrics", "/docs", "/openapi.json", "/v1/models"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Basic")
            for value in (*wrong, f"Basic {b64(b'ann:no')}", b"Basic \xff"):
                assert client.get(path, headers={"Authorization": value}).status_code == 401
            for value in (f"Basic {b64('ann:pass:ä'.encode())}", "Bearer pass:ä".encode()):
                assert client.get(path, headers={"Authorization": value}).status_code == 200


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_nothing_that_is_made_up_is_a_fault_of_the_server(client, mode):
    """Schemathesis makes requests from the description of the API, those that fit it and those that do not."""
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis
    from schemathesis.checks import positive_data_acceptance  # no schema says which bytes are an image

    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    for operation in schema.get_all_operations():
        if mode == "NEGATIVE" and operation.ok().method != "post":
            continue  # has nothing that could be wrong

        @hypothesis.given(case=operation.ok().as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=SLOW)
        @hypothesis.seed(0)
        def check(case):
            answer = case.call()
            assert answer.status_code < 500
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        check()
