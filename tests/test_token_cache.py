import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

import captioner
from captioner import recipes
from captioner.commands.cache import fill_cache
from captioner.commands.evaluate import EvaluateConfig, evaluate
from captioner.data.batches import CaptionStream
from captioner.data.config import DataConfig
from captioner.data.readers import read_captions
from captioner.data.token_cache import open_cache
from captioner.errors import SettingError
from captioner.grids import parse_grid
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor
from captioner.training.config import EncoderConfig, ScstConfig
from captioner.training.loop import train

ROOT = Path(__file__).parents[1]


def forbid_images(monkeypatch):
    def refuse(*args):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(CaptionerProcessor, "pixels", refuse)


def test_tokens_are_the_encoders_in_every_grid_and_view(cache_config, noise, saved_model, tmp_path):
    folder = tmp_path / "tokens"
    fill_cache(cache_config(folder, saved_model, grids=("2x2", "3x3"), views=3))
    table = read_captions(noise, "train")
    loaded = captioner.load(saved_model, "cpu")
    for grid in ((2, 2), (3, 3)):
        cache = open_cache(folder, loaded.model, loaded.processor, grid)
        images = cache.images(table)
        assert (images.views, len(images)) == (3, 40)
        numbers = [17, 3, 39, 3]
        pixels = [loaded.processor.pixels(table[n]["image"]) for n in numbers]
        mirrored = [loaded.processor.pixels(ImageOps.mirror(Image.open(table[n]["image"]["path"]))) for n in numbers]
        for view, expected in ((None, pixels), ([1] * 4, mirrored)):
            tokens = images.batch([images.open(n) for n in numbers], view)["image_tokens"]
            assert tokens.dtype == torch.float16
            assert torch.allclose(tokens.float(), loaded.model.encode(torch.stack(expected), grid), atol=5e-3)
        crops = images.batch(numbers, [2] * 4)["image_tokens"]
        assert torch.equal(crops[1], crops[3])
        assert not torch.allclose(crops, tokens, atol=5e-2)
    with pytest.raises(ValueError, match=r"holds the grids 2x2, 3x3, not 4x4; a cache of these"):
        open_cache(folder, loaded.model, loaded.processor, (4, 4))


def debug(root, output, tokens=None, **kwargs):
    config = recipes.debug()
    data = DataConfig(root=str(root), workers=0, captions_per_image=2, tokens=tokens)
    return replace(config, output=output, data=data, model=replace(config.model, image_size=64), epochs=1, **kwargs)


@pytest.mark.parametrize("grids", [(), ("2x2", "3x3")])
def test_training_from_the_cache_equals_training_from_images(cache_config, noise, tmp_path, monkeypatch, grids):
    config, seen, encode = cache_config(tmp_path / "tokens", grids=("2x2", "3x3")), [], CaptionerModel.encode

    def watched(self, pixel_values, grid=None):
        seen.append(grid)
        return encode(self, pixel_values, grid)

    monkeypatch.setattr(CaptionerModel, "encode", watched)
    fill_cache(replace(config, model=EncoderConfig("lookupvit_tiny_patch16_224", image_size=64)))
    train(debug(noise, tmp_path / "online", grids=grids))
    assert set(seen) == {None, *map(parse_grid, grids)}  # None, the model's own, is what validation asks for
    forbid_images(monkeypatch)
    train(debug(noise, tmp_path / "cached", tmp_path / "tokens", grids=grids))
    online, cached = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("online", "cached")
    )
    assert len(online) == len(cached) == 6
    for one, other in zip(online, cached, strict=True):
        for key in one.keys() & {"loss", "loss_val"}:
            assert one[key] == pytest.approx(other[key], abs=2e-3)


def test_rewards_are_learned_from_the_cache(cache_config, noise, tmp_path, monkeypatch):
    config = cache_config(tmp_path / "tokens", grids=("2x2", "3x3"))
    fill_cache(replace(config, model=EncoderConfig("lookupvit_tiny_patch16_224", image_size=64)))
    forbid_images(monkeypatch)
    config = debug(noise, tmp_path / "run", tmp_path / "tokens", grids=("2x2", "3x3"))
    train(config)
    train(replace(config, stage="scst", scst=ScstConfig(samples=2)))
    log = [json.loads(line) for line in (tmp_path / "run" / "scst" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if "reward" in record] == [1, 2, 3, 4, 5]


def test_evaluation_from_the_cache_gives_the_same_captions(
    cache_config, noise, saved_model, tmp_path, monkeypatch, no_java
):
    fill_cache(cache_config(tmp_path / "tokens", saved_model, splits=("val",)))
    for name, tokens in (("online", None), ("cached", tmp_path / "tokens")):
        data = DataConfig(root=str(noise), workers=0, tokens=tokens)
        evaluate(EvaluateConfig(model=str(saved_model), data=data, split="val", output=tmp_path / name))
        forbid_images(monkeypatch)
    online, cached = ((tmp_path / name / "results.json").read_text() for name in ("online", "cached"))
    assert online == cached


def test_each_step_draws_a_view_by_its_position(cache_config, noise, saved_model, tmp_path):
    fill_cache(cache_config(tmp_path / "tokens", saved_model, splits=("train",), views=4))
    loaded = captioner.load(saved_model, "cpu")
    table = read_captions(noise, "train")
    images = open_cache(tmp_path / "tokens", loaded.model, loaded.processor).images(table)
    stream = CaptionStream(table, loaded.processor, 2, seed=0, images=images)
    drawn = [stream[i]["view"] for i in range(80)]
    assert set(drawn) == {0, 1, 2, 3}
    assert drawn == [CaptionStream(table, loaded.processor, 2, seed=0, images=images)[i]["view"] for i in range(80)]
    batch = stream.collate([stream[i] for i in range(5)])
    assert batch["image_tokens"].shape == (5, 5, 32)
    texts = [
        table[int(stream.order(0)[i])]["captions"][n - stream.firsts[int(stream.order(0)[i])]]
        for i in range(5)
        for n in stream[i]["captions"]
    ]
    for key, value in loaded.processor.text(texts).items():
        assert torch.equal(batch[key], value)


@pytest.fixture
def filled(cache_config, noise, saved_model, tmp_path):
    """A cache of both splits, with the images beside it to be spoiled."""
    root = tmp_path / "data"
    shutil.copytree(noise, root)
    fill_cache(cache_config(tmp_path / "tokens", saved_model, root))
    return tmp_path / "tokens"


def test_a_cache_of_something_else_is_refused(cache_config, filled, saved_model, make_model, tmp_path):
    loaded = captioner.load(saved_model, "cpu")
    table = read_captions(tmp_path / "data", "val")
    model, processor = loaded.model, loaded.processor
    assert len(open_cache(filled, model.half(), processor).images(table)) == 8  # saved in half precision: the same
    other = make_model()
    other.encoder.cls_token.data += 0.01
    with pytest.raises(ValueError, match="comes from other weights of lookupvit_tiny.* needs a cache of its own"):
        open_cache(filled, other, processor)
    larger = CaptionerProcessor(processor.tokenizer, image={"input_size": (3, 96, 96)})
    with pytest.raises(ValueError, match=r"other preprocessing: input_size \[3, 64, 64\], where the model has \[3, 96"):
        open_cache(filled, model, larger)
    model.config.encoder_config["kwargs"] |= {"num_heads": 4}
    with pytest.raises(ValueError, match="comes from lookupvit_tiny_patch16_224 with .*num_heads=2.*num_heads=4"):
        open_cache(filled, model, processor)
    model.float().save_pretrained(tmp_path / "wider")
    processor.save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="comes from lookupvit_tiny"):  # and it is not gone on with either
        fill_cache(cache_config(filled, tmp_path / "wider", tmp_path / "data"))


def test_a_damaged_or_foreign_cache_is_refused(cache_config, filled, saved_model, tmp_path):
    loaded = captioner.load(saved_model, "cpu")
    shard = next(filled.glob("tokens-*"))
    whole = shard.read_bytes()
    for data in (whole[:-1], whole[:100], b"", b"junk" * 100):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match="truncated or damaged .*delete that file and run the same"):
            open_cache(filled, loaded.model, loaded.processor)
    shard.unlink()
    table = read_captions(tmp_path / "data", "train")
    with pytest.raises(ValueError, match="lacks 40 of 40"):
        open_cache(filled, loaded.model, loaded.processor).images(table)
    fill_cache(cache_config(tmp_path / "flipped", saved_model, views=2))
    shutil.copy(next((tmp_path / "flipped").glob("tokens-*")), filled)
    with pytest.raises(ValueError, match="belongs to another token cache; delete that file"):
        open_cache(filled, loaded.model, loaded.processor)
    for text in ("{", "[]", "{}"):
        (filled / "cache.json").write_text(text)
        with pytest.raises(ValueError, match="is not a token cache's"):
            open_cache(filled, loaded.model, loaded.processor)
    (filled / "cache.json").unlink()
    with pytest.raises(FileNotFoundError, match="no token cache at .*captioner cache` makes one"):
        open_cache(filled, loaded.model, loaded.processor)
    with pytest.raises(ValueError, match="neither empty nor a token cache"):
        fill_cache(cache_config(filled, saved_model))


def save_split(root: Path, split: str, colour: str) -> list[bytes]:
    """Save a split of three uncompressed images, which have as many bytes as those of every other split."""
    (root / f"{split}2017").mkdir(parents=True)
    images = [{"id": n, "file_name": f"{n}.bmp"} for n in range(3)]
    for image in images:
        Image.new("RGB", (9, 9), colour).save(root / f"{split}2017" / image["file_name"])
    content = {"images": images, "annotations": [{"image_id": n, "caption": "a"} for n in range(3)]}
    (root / f"captions_{split}2017.json").write_text(json.dumps(content))
    return [path.read_bytes() for path in sorted((root / f"{split}2017").iterdir())]


def test_another_image_of_the_same_name_and_size_is_refused(cache_config, saved_model, tmp_path, capsys):
    root, folder = tmp_path / "data", tmp_path / "tokens"
    red, blue = save_split(root, "train", "red"), save_split(root, "val", "blue")
    assert [len(data) for data in red] == [len(data) for data in blue]
    assert red != blue
    loaded = captioner.load(saved_model, "cpu")
    fill_cache(cache_config(folder, saved_model, root, splits=("train",)))
    with pytest.raises(SettingError, match=r"val2017/0.bmp' is not the image that was encoded under its id") as caught:
        fill_cache(cache_config(folder, saved_model, root, splits=("val",)))
    assert caught.value.settings == ("output",)
    cache = open_cache(folder, loaded.model, loaded.processor)
    with pytest.raises(ValueError, match=r"val2017/0.bmp' is not the image .*: the images have changed"):
        cache.images(read_captions(root, "val"))
    shutil.move(root, tmp_path / "moved")  # the same images at another place
    capsys.readouterr()
    fill_cache(cache_config(folder, saved_model, tmp_path / "moved", splits=("train",)))
    assert "0 of 3 images to encode" in capsys.readouterr().out
    assert len(cache.images(read_captions(tmp_path / "moved", "train"))) == 3


def test_a_cache_of_an_earlier_version_is_read(cache_config, filled, saved_model, tmp_path, capsys):
    """Its shards have no places and digests of the images; their sizes are compared all the same."""
    for path in filled.glob("tokens-*"):
        with safe_open(path, "pt") as file:
            header = file.metadata()
            save_file(
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                path,
                {name: header[name] for name in ("made_by", "images", "broken")},
            )
    loaded = captioner.load(saved_model, "cpu")
    table = read_captions(tmp_path / "data", "val")
    assert len(open_cache(filled, loaded.model, loaded.processor).images(table)) == 8
    capsys.readouterr()
    fill_cache(cache_config(filled, saved_model, tmp_path / "data"))
    assert "0 of 48 images to encode" in capsys.readouterr().out
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "images" / "val3.png")
    with pytest.raises(SettingError, match=r"val3.png' has \d+ bytes, but \d+ when it was encoded .*; a cache in"):
        fill_cache(cache_config(filled, saved_model, tmp_path / "data", splits=("val",)))


def test_images_that_changed_are_refused(filled, saved_model, tmp_path):
    loaded = captioner.load(saved_model, "cpu")
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "images" / "val3.png")
    table = read_captions(tmp_path / "data", "val")
    with pytest.raises(ValueError, match=r"val3.png' has \d+ bytes, but \d+ when it was encoded"):
        open_cache(filled, loaded.model, loaded.processor).images(table)
