import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small, and several run at once

import numpy as np
import torch
from commands import run
from PIL import Image
from score_data import coco
from training_runs import COLOURS, debug
from transformers import GenerationConfig, GPT2Config

SHARED = Path(__file__).parents[2] / "shared" / "data"
CAPTIONS = ["a dog runs through the grass", "two men on a beach", "a cat sits on a red chair", "a child on a swing"]


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the project's development data, ../shared/data")
    return SHARED


@pytest.fixture
def no_java(monkeypatch):
    """Have METEOR left out, which takes seconds to start; of programs, none is found."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def tiny_encoder() -> dict:
    return {
        "name": "lookupvit_tiny_patch16_224",
        "kwargs": {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2, "grid": (2, 2)},
    }


@pytest.fixture(scope="session")
def tokenizer():
    from captioner.processing import train_tokenizer

    return train_tokenizer(CAPTIONS * 5, 300)


@pytest.fixture
def processor(tokenizer):
    from captioner import CaptionerProcessor

    return CaptionerProcessor(tokenizer, image={"input_size": (3, 64, 64)})


@pytest.fixture
def make_model(tiny_encoder, tokenizer):
    """Return a function that builds a tiny captioner with the given decoder configuration."""
    from captioner import CaptionerConfig, CaptionerModel

    def make(text_config=None, **kwargs):
        torch.manual_seed(0)
        text_config = text_config or GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        model = CaptionerModel(CaptionerConfig(encoder_config=tiny_encoder, text_config=text_config, **kwargs))
        model.generation_config = GenerationConfig(
            bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=8, num_beams=1
        )
        return model.eval()

    return make


@pytest.fixture
def saved_model(make_model, processor, tmp_path) -> Path:
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three small images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a.jpg", "red"), ("b.png", "green"), ("c.webp", "blue")):
        Image.new("RGB", (80, 60), colour).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def noise(tmp_path_factory) -> Path:
    """COCO-format captions of noise: 40 images to train on, 8 to validate on."""
    root = tmp_path_factory.mktemp("noise")
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        content = {"images": [], "annotations": []}
        for number in range(count):
            pixels = random.integers(0, 256, (4, 5, 3), np.uint8)
            Image.fromarray(pixels).resize((40, 32)).save(root / "images" / f"{split}{number}.png")
            content["images"].append({"id": number, "file_name": f"{split}{number}.png"})
            texts = (f"the {split} image number {number}", "some noise in many colours .")
            content["annotations"] += [{"image_id": number, "caption": text} for text in texts]
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def cache_config(noise):
    """Return a function that makes the settings of a cache of the noise, or of other data."""
    from captioner.commands.cache import CacheConfig
    from captioner.data.config import DataConfig

    def make(output, captioner=None, root=noise, **kwargs) -> CacheConfig:
        data = DataConfig(root=str(root), workers=0)
        return CacheConfig(output=output, data=data, captioner=captioner and str(captioner), batch_size=3, **kwargs)

    return make


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """COCO-format captions of plain colours: 32 images to train on, 8 to validate on."""
    root = tmp_path_factory.mktemp("captioned")
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    for split, count in (("train", 32), ("val", 8)):
        content = {"images": [], "annotations": []}
        for number in range(count):
            name, rgb = list(COLOURS.items())[number % 4]
            file = f"{split}{number}.png"
            Image.new("RGB", (32, 32), tuple(min(255, c + number) for c in rgb)).save(root / "images" / file)
            content["images"].append({"id": number, "file_name": file})
            texts = (f"a plain {name} square", f"this image is all {name} .")
            content["annotations"] += [{"image_id": number, "caption": text} for text in texts]
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def unbroken(captioned, tmp_path_factory):
    """The settings and folder of a run of 12 steps, validated at each fourth, that was never stopped.

    It has dropout, so that a resumed run is equal only if its random numbers go on where they were.
    """
    from captioner.training.loop import train

    config = debug(captioned, tmp_path_factory.mktemp("unbroken"), epochs=3, log_every=2, grids=("2x2", "3x3"))
    config = replace(config, model=replace(config.model, dropout=0.2))
    train(config)
    return config


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """A folder of plain images, one subfolder a colour, four images each."""
    root = tmp_path_factory.mktemp("classes")
    for name, rgb in COLOURS.items():
        (root / name).mkdir()
        for number in range(4):
            Image.new("RGB", (48, 40), tuple(min(255, c + 5 * number) for c in rgb)).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def annotations(write):
    return write("captions_val.json", coco())


@pytest.fixture
def model(saved_model):
    """A captioner that was saved and loaded."""
    from captioner import load

    return load(saved_model, "cpu")


@pytest.fixture
def image():
    return Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.fixture
def caption(saved_model):
    """Return a function that runs `captioner caption` with a small captioner and returns its exit code."""
    return lambda *args: run("caption", *args, "--model", saved_model, "--max-new-tokens", "5")
