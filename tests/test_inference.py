"""Captioning in Python: `captioner.load`, `Captioner.stream` and calling a captioner."""

import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import captioner
from captioner import CaptionerModel, ImageError
from captioner.errors import SettingError


def encode(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def test_every_form_of_an_image_has_the_same_caption(model, image, tmp_path):
    data = encode(image)
    (tmp_path / "a.png").write_bytes(data)
    array = np.array(image)
    forms = [image, data, bytearray(data), io.BytesIO(data), array, array / 255, torch.tensor(array).permute(2, 0, 1)]
    forms += [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        {"path": None, "bytes": data},
        {"path": str(tmp_path / "a.png")},
    ]
    expected = model(image)
    for form in forms:
        assert model(form) == expected
        assert [result.caption for result in model.stream(form)] == [expected]
    assert model(forms[:3] + forms[4:]) == [expected] * (len(forms) - 1)
    assert model.processor(images=array).pixel_values.shape == (1, 3, 64, 64)
    assert model.processor(images=(form for form in [image, array])).pixel_values.shape == (2, 3, 64, 64)


def test_several_images_come_in_any_iterable(model, image):
    expected = model(image)
    for images in ([image] * 2, (image, image), (item for item in [image] * 2), map(np.asarray, [image] * 2)):
        assert model(images) == [expected] * 2
    assert model([]) == []
    assert list(model.stream(iter([]))) == []


def test_a_generator_is_read_one_batch_at_a_time(model, image):
    read = []

    def images():
        for number in range(10):
            read.append(number)
            yield image

    results = model.stream(images(), batch_size=2)
    assert not read
    next(results)
    assert read == [0, 1]


def test_every_image_that_cannot_be_used_is_an_error_and_the_rest_is_captioned(model, image):
    closed = Image.new("RGB", (8, 8))
    closed.close()
    cut = encode(Image.effect_noise((200, 200), 90), "JPEG")[:-2000]
    bad = {
        "closed": closed,
        "truncated, not yet decoded": Image.open(io.BytesIO(cut)),
        "truncated": cut,
        "no pixels": Image.new("RGB", (0, 0)),
        "a batch": np.zeros((2, 8, 8, 3), np.uint8),
        "floats": np.full((8, 8), 200.0),
        "closed file": open(__file__, "rb").close() or open(__file__),  # noqa: SIM115
        "missing": "missing.jpg",
        "nothing": None,
        "a number": 5,
        "a list": [image],
        "a record": {"image": image},
    }
    results = list(model.stream([image, *bad.values(), image], batch_size=3, num_beams=1))
    assert [result.error is None for result in results] == [True, *[False] * len(bad), True]
    assert all(result.caption is None and result.reason and "\n" not in result.error for result in results[1:-1])
    assert results[0].caption == results[-1].caption
    for one in bad.values():
        if not isinstance(one, list):
            with pytest.raises(ImageError):
                model(one)


def test_results_are_named_by_path_where_there_is_one(model, image, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(image))
    with path.open("rb") as file:
        sources = [path, str(path), {"path": str(path), "bytes": path.read_bytes()}, file, image, io.BytesIO()]
        names = [result.path for result in model.stream(sources)]
    assert names == [str(path)] * 4 + ["image in memory"] * 2


def test_arrays_of_paths_are_lists_of_them(model, image, tmp_path):
    image.save(tmp_path / "a.png")
    paths = np.array([str(tmp_path / "a.png")] * 2)
    for several in (paths, paths.astype(object)):
        assert model(several) == [model(image)] * 2
    assert model(paths[0]) == model(image)  # which is an `np.str_`
    with pytest.raises(ImageError, match="ndarray is no image"):
        model(np.array(str(tmp_path / "a.png")))


def test_none_stands_for_the_default_of_any_option(model, image):
    assert list(model.stream([image, image], batch_size=None)) == list(model.stream([image, image]))
    assert model(image, batch_size=None, grid=None, num_beams=None, max_new_tokens=None) == model(image)


def test_counts_and_grids_may_be_numpy_s(model, image):
    options = {"batch_size": np.int32(2), "num_beams": np.int64(2), "max_new_tokens": np.uint8(3)}
    plain = {"batch_size": 2, "num_beams": 2, "max_new_tokens": 3}
    assert model(image, grid=(np.int64(3), np.int64(3)), **options) == model(image, grid="3x3", **plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number above 0, not 0"),
        ({"num_beams": 2.0}, "num_beams must be a whole number"),
        ({"num_beams": True}, "num_beams must be a whole number"),
        ({"max_new_tokens": np.int64(-1)}, "max_new_tokens must be a whole number"),
        ({"max_length": 4}, "max_new_tokens limits the length"),
        ({"num_return_sequences": 2}, "leave num_return_sequences out"),
        ({"grid": "5x"}, "ROWSxCOLUMNS"),
    ],
)
def test_options_are_checked_before_the_first_image(model, image, options, message):
    with pytest.raises(ValueError, match=message):
        model.stream([image], **options)


def test_log_probabilities_are_computed_on_request(model, image, monkeypatch):
    [with_them] = model.stream(image)
    assert with_them.logprob < 0
    monkeypatch.setattr(CaptionerModel, "log_probability", lambda *args, **kwargs: pytest.fail("computed"))
    [without] = model.stream(image, logprob=False)
    assert (without.caption, without.logprob) == (with_them.caption, None)
    assert model(image) == with_them.caption
    assert list(with_them.as_dict()) == ["path", "caption", "logprob", "error"]


def test_several_threads_use_one_captioner(model):
    images = [Image.effect_noise((64, 64), 20 * number).convert("RGB") for number in range(8)]
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        return [model(images[number], num_beams=1 + turn % 2) for turn in range(4)], number

    expected = [[model(image, num_beams=1 + turn % 2) for turn in range(4)] for image in images]
    with ThreadPoolExecutor(4) as pool:
        for captions, number in pool.map(work, range(8)):
            assert captions == expected[number]


def test_loading_is_quiet_and_changes_no_setting(saved_model):
    """In a process of its own: this one draws no bars from the start."""
    code = f"""
import captioner
from transformers.utils import logging
before = logging.get_verbosity(), logging.is_progress_bar_enabled()
captioner.load({str(saved_model)!r}, "cpu")
assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before == (logging.WARNING, True)
"""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_what_is_no_captioner_is_said_in_one_line(saved_model, tmp_path):
    (tmp_path / "empty").mkdir()
    weights = load_file(saved_model / "model.safetensors")
    name = next(key for key in weights if "projector" in key)
    cases = {
        "it has no config.json": tmp_path / "empty",
        "no such folder, and not a hub id": Path("./nowhere"),
        f"lacks 1 of its weights, such as {name}": saved_model,
    }
    save_file({key: value for key, value in weights.items() if key != name}, saved_model / "model.safetensors")
    for message, source in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            captioner.load(source, "cpu")
        assert "\n" not in str(caught.value)


def test_a_captioner_of_damaged_or_foreign_files_is_said_in_one_line(saved_model):
    names = ("config.json", "model.safetensors", "tokenizer_config.json", "processor_config.json")
    whole = {name: (saved_model / name).read_bytes() for name in names}
    config, tokenizer = json.loads(whole["config.json"]), json.loads(whole["tokenizer_config.json"])
    encoder = config["encoder_config"]
    shallow = {**encoder, "kwargs": {**encoder["kwargs"], "depth": 1}}
    wide = {**encoder, "kwargs": {**encoder["kwargs"], "embed_dim": 64}}
    code = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Slow", "theirs.Fast"]}}
    cases = [
        ("model.safetensors", whole["model.safetensors"][:-100], "is not a captioner model"),
        ("model.safetensors", b"", "is not a captioner model"),
        ("config.json", {**config, "text_config": [1]}, "is not a captioner model"),
        ("config.json", {**config, "text_config": {**config["text_config"], "n_layer": "x"}}, "Validation error"),
        ("config.json", {**config, "encoder_config": shallow}, r"has no place for \d+ of its weights, such as encoder"),
        (
            "config.json",
            {**config, "encoder_config": wide},
            r"\d+ weights of .* have other shapes",
        ),
        ("processor_config.json", [], "is not a captioner model"),
        ("tokenizer_config.json", {**tokenizer, **code}, "contains custom code"),
    ]
    for name, content, message in cases:
        (saved_model / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(SettingError, match=message) as caught:
            captioner.load(saved_model, "cpu")
        assert "\n" not in str(caught.value)
        assert caught.value.settings == ("model", "init_from", "captioner")
        (saved_model / name).write_bytes(whole[name])
    captioner.load(saved_model, "cpu")
