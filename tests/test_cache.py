import io
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from processes import Script, run_together
from training_runs import launch

import captioner
from captioner import cli
from captioner.commands.cache import CacheConfig, fill_cache
from captioner.commands.evaluate import EvaluateConfig, evaluate
from captioner.data import cache_filling
from captioner.data.batches import CaptionStream
from captioner.data.config import DataConfig
from captioner.data.encoding import disk_bytes, make_view
from captioner.data.readers import read_captions
from captioner.data.token_cache import TokenCache, open_cache
from captioner.errors import SettingError
from captioner.images import ImageError
from captioner.training.config import EncoderConfig

ROOT = Path(__file__).parents[1]


def read_all(folder) -> dict[str, torch.Tensor]:
    """Read every image's tokens (V, M, D), by grid and name."""
    found = {}
    for grid in json.loads((folder / "cache.json").read_text())["grids"]:
        cache = TokenCache(folder, grids=[grid])
        tokens = torch.cat(cache.shards[grid])
        found |= {f"{grid} {name}": tokens[row] for name, row in cache.rows.items()}
    return found


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=2e-3) for k in one)


def driver(config: dict, *, shard: int, before: str = "") -> list[str]:
    """Return the command that fills a cache in a process of its own, in shards of so many images."""
    args = [part for name, value in config.items() for part in (f"--{name}", *map(str, np.atleast_1d(value)))]
    code = f"from captioner.data import cache_filling; cache_filling.SHARD_IMAGES = {shard}\n{before}\n"
    return [sys.executable, "-c", f"{code}from captioner import cli; cli.main({['cache', *args]!r})"]


def test_crops_lie_within_the_image():
    image = Image.new("RGB", (7, 3))
    random = np.random.default_rng(0)
    for _ in range(100):
        view = make_view(image, 2, 0.3, random)
        assert 1 <= view.width <= 7
        assert 1 <= view.height <= 3
        assert view.width * view.height >= 0.15 * 21  # sides are rounded to pixels
    assert make_view(image, 0, 0.3, random) is image


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(cache_config, noise, saved_model, tmp_path):
    fill_cache(cache_config(tmp_path / "whole", saved_model, grids=("2x2", "4x4")))
    folder = tmp_path / "broken"
    config = {"data.root": noise, "data.workers": 0, "captioner": saved_model, "output": folder, "batch-size": 1}
    slowly = "import time; from captioner.data.encoding import ImageViews as P; get = P.__getitem__\n"
    slowly += "P.__getitem__ = lambda self, row: (time.sleep(0.05), get(self, row))[1]"
    command = driver(config | {"grids": ["2x2", "4x4"]}, shard=2, before=slowly)
    kept: dict[str, int] = {}
    for shards in (3, 6):
        process = Script(*command[1:])
        while len(list(folder.glob("tokens-*"))) < shards:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        now = {path.name: path.stat().st_mtime_ns for path in folder.glob("tokens-*")}
        assert now.items() >= kept.items()
        kept = now
    assert len(kept) < 24
    (folder / ".tokens-0.safetensors.part").write_bytes(b"left by a kill in the middle of writing")
    fill_cache(cache_config(folder, saved_model, grids=("2x2", "4x4")))
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("tokens-*")}.items() >= kept.items()
    assert not list(folder.glob(".*"))
    assert same(read_all(folder), read_all(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_share_the_work(cache_config, noise, saved_model, tmp_path):
    fill_cache(cache_config(tmp_path / "one", saved_model))
    command = ["captioner/__main__.py", "cache", "--data.root", noise, "--data.workers", "0"]
    command += ["--captioner", saved_model, "--output", tmp_path / "two", "--splits"]
    result = launch(*command, "train", "val")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "two").glob("tokens-*"))) == 2
    assert "tokens of 48 images" in result.stdout
    assert same(read_all(tmp_path / "one"), read_all(tmp_path / "two"))


def test_shards_are_dealt_out_and_images_of_an_embedded_set_are_named(
    cache_config, noise, saved_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache_filling, "SHARD_IMAGES", 16)
    fill_cache(cache_config(tmp_path / "files", saved_model, splits=("train",)))
    assert len(list((tmp_path / "files").glob("tokens-*"))) == 3
    table = read_captions(noise, "train")
    rows = [
        {
            "image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": Path(row["image"]["path"]).name},
            "captions": row["captions"],
            "image_id": row["image_id"],
        }
        for row in table
    ]
    embedded = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": embedded}).save_to_disk(tmp_path / "set")
    fill_cache(cache_config(tmp_path / "embedded", saved_model, tmp_path / "set", splits=("train",)))
    assert same(read_all(tmp_path / "files"), read_all(tmp_path / "embedded"))


def test_splits_are_added_to_a_cache(cache_config, noise, saved_model, tmp_path, capsys):
    folder = tmp_path / "tokens"
    fill_cache(cache_config(folder, saved_model, splits=("val",)))
    loaded = captioner.load(saved_model, "cpu")
    table = read_captions(noise, "train")
    with pytest.raises(ValueError, match="lacks 40 of 40 images of the split 'train'; `captioner cache` adds"):
        open_cache(folder, loaded.model, loaded.processor).images(table)
    capsys.readouterr()
    fill_cache(cache_config(folder, saved_model, splits=("train", "val")))
    assert "40 of 48 images to encode (2x2: 5 tokens of width 32; views: 1): 12.8 kB of disk" in capsys.readouterr().out
    assert len(open_cache(folder, loaded.model, loaded.processor).images(table)) == 40
    with pytest.raises(SettingError, match="made with grids 2x2, not 3x3") as caught:
        fill_cache(cache_config(folder, saved_model, grids=("3x3",)))
    assert caught.value.settings == ("output",)


def test_images_without_ids_and_names_are_told_apart(cache_config, saved_model, tmp_path):
    """The rows of each split are numbered from 0, and the images have as many bytes."""
    splits = {}
    for split, shade in (("train", 200), ("val", 10)):
        rows = [{"image": Image.new("RGB", (9, 9), (shade, 40 * n, 0)), "captions": ["a"]} for n in range(3)]
        for row in rows:
            file = io.BytesIO()
            row["image"].save(file, "BMP")
            row["image"] = {"bytes": file.getvalue(), "path": None}
        splits[split] = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    loaded = captioner.load(saved_model, "cpu")
    for folder, parts in (("at_once", [("train", "val")]), ("one_by_one", [("train",), ("val",)])):
        for part in parts:
            fill_cache(cache_config(tmp_path / folder, saved_model, tmp_path / "set", splits=part))
        for split in splits:
            table = read_captions(tmp_path / "set", split)
            images = open_cache(tmp_path / folder, loaded.model, loaded.processor).images(table)
            tokens = images.batch([images.open(n) for n in range(3)])["image_tokens"]
            pixels = torch.stack([loaded.processor.pixels(row["image"]) for row in table])
            assert torch.allclose(tokens.float(), loaded.model.encode(pixels), atol=5e-3)


@pytest.mark.parametrize(("ending", "side"), [("png", 30), ("bmp", 9)])
def test_two_images_of_one_name_are_refused(cache_config, saved_model, tmp_path, ending, side):
    """Two uncompressed images of one size have as many bytes, too."""
    for split, colour in (("train", "red"), ("val", "blue")):
        (tmp_path / f"{split}2017").mkdir()
        Image.new("RGB", (side if split == "val" else 9, 9), colour).save(tmp_path / f"{split}2017" / f"1.{ending}")
        content = {"images": [{"id": 1, "file_name": f"1.{ending}"}], "annotations": [{"image_id": 1, "caption": "a"}]}
        (tmp_path / f"captions_{split}2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"different images have the id and name '1 1.{ending}'"):
        fill_cache(cache_config(tmp_path / "tokens", saved_model, tmp_path))


def test_an_unreadable_image_is_left_out_and_read_once_repaired(
    cache_config, noise, saved_model, tmp_path, capsys, no_java
):
    root, folder = tmp_path / "data", tmp_path / "tokens"
    shutil.copytree(noise, root)
    good = (root / "images" / "train5.png").read_bytes()
    (root / "images" / "train5.png").write_bytes(b"broken")
    (root / "images" / "val0.png").write_bytes(b"broken")
    assert fill_cache(cache_config(folder, saved_model, root)) == 2
    captured = capsys.readouterr()
    assert "tokens of 46 images" in captured.out
    assert "captioner cache: 2 of 48 images could not be read and are left out" in captured.err
    assert captured.err.count("captioner cache: skipped") == 2
    args = ["cache", "--data.root", root, "--data.workers", 0, "--captioner", saved_model, "--output", folder]
    with pytest.raises(SystemExit, match="1"):  # as `caption` exits; they are not tried again, but still left out
        cli.main([*map(str, args)])
    captured = capsys.readouterr()
    assert "0 of 48 images to encode" in captured.out
    assert "captioner cache: 2 of 48 images could not be read and are left out" in captured.err

    loaded = captioner.load(saved_model, "cpu")
    cache = open_cache(folder, loaded.model, loaded.processor)
    table = read_captions(root, "train")
    images = cache.images(table)
    with pytest.raises(ImageError, match="train5.png"):
        images.open(5)
    stream = CaptionStream(table, loaded.processor, 1, seed=0, images=images)
    assert 5 not in {stream[i]["image"] for i in range(80)}
    data = DataConfig(root=str(root), workers=0, tokens=folder)
    evaluate(EvaluateConfig(model=str(saved_model), data=data, split="val", output=tmp_path / "out"))
    captions = [result["caption"] for result in json.loads((tmp_path / "out" / "results.json").read_text())]
    assert [i for i, caption in enumerate(captions) if not caption] in ([0], list(range(8)))

    (root / "images" / "train5.png").write_bytes(good)
    fill_cache(cache_config(folder, saved_model, root))
    assert "1 of 48 images to encode" in capsys.readouterr().out
    assert open_cache(folder, loaded.model, loaded.processor).images(table).open(5) == 5


def test_the_disk_is_estimated_before_and_never_overrun(cache_config, saved_model, tmp_path, monkeypatch):
    assert disk_bytes(123_287, 1, {"5x5": (26, 384)}) == pytest.approx(2.46e9, rel=0.01)
    assert disk_bytes(123_287, 1, {"all": (197, 384)}) == pytest.approx(18.65e9, rel=0.01)
    fill_cache(cache_config(tmp_path / "tokens", saved_model, splits=("train",), views=2))
    size = next((tmp_path / "tokens").glob("tokens-*")).stat().st_size
    assert disk_bytes(40, 2, {"2x2": (5, 32)}) < size < disk_bytes(40, 2, {"2x2": (5, 32)}) + 40 * 90 + 500
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(OSError, match=r"is too small: the tokens need 12.8 kB, and 5 kB are free; "):
        fill_cache(cache_config(tmp_path / "more", saved_model, splits=("train",)))
    assert not list((tmp_path / "more").glob("tokens-*"))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the shell")
def test_a_disk_full_midway_is_one_line_and_keeps_what_is_done(cache_config, noise, saved_model, tmp_path):
    folder = tmp_path / "tokens"
    fill_cache(cache_config(folder, saved_model, splits=("val",)))
    config = {"data.root": noise, "data.workers": 0, "captioner": saved_model, "output": folder}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))"
    result = run_together(*driver(config, shard=40, before=limit)[1:], processes=1)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("captioner cache: cannot write")] == lines[-1:]
    assert "the finished shards stay: make room and run the same command again" in lines[-1]
    assert "Traceback" not in result.stderr
    assert not list(folder.glob(".*"))
    assert len(TokenCache(folder).rows) == 8
    fill_cache(cache_config(folder, saved_model))
    assert len(TokenCache(folder).rows) == 48


def test_one_line_errors(noise, saved_model, tmp_path, capsys):
    base = ("cache", "--data.root", noise, "--captioner", saved_model, "--output", tmp_path / "out")
    for args, message in (
        ((*base, "--grids", "9x9"), "compressed grid 9x9 is not within the lookup grid 4x4"),
        ((*base, "--splits", "test"), "no annotations under"),
        (("cache", "--output", tmp_path / "out", "--captioner", saved_model), "--data.root"),
        (("evaluate", *base[1:3], "--split=val", "--model", saved_model, "--data.tokens", tmp_path), "no token cache"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(arg) for arg in args])
        assert stopped.value.code == 1, args
        error = capsys.readouterr().err
        assert message in error, args
        assert error.strip().count("\n") == 0, error


def test_a_cache_takes_the_grid_of_its_captioner(cache_config, make_model, processor, noise, tmp_path):
    make_model(grid=(3, 3)).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    fill_cache(cache_config(tmp_path / "tokens", tmp_path / "model", splits=("val",)))
    assert TokenCache(tmp_path / "tokens").manifest["grids"] == {"3x3": [10, 32]}
    loaded = captioner.load(tmp_path / "model", "cpu")
    assert len(open_cache(tmp_path / "tokens", loaded.model, loaded.processor).rows) == 8


def test_an_encoder_beside_a_captioner_is_refused(saved_model):
    with pytest.raises(SettingError, match="which has its own encoder"):
        CacheConfig(captioner=str(saved_model), model=EncoderConfig(image_size=64))
