import ast
import json
from pathlib import Path

import pytest
import timm
import torch
from commands import succeed
from safetensors.torch import save_file
from toy_encoder import WindowEncoder
from training_runs import losses

from captioner.encoders import TokenEncoder, create_encoder, describe_encoder, own_encoders, rebuild_encoder

PACKAGE = Path(__file__).parents[1] / "captioner"


def test_a_new_encoder_goes_through_every_job_at_grids_of_its_own(captioned, classes, tmp_path, monkeypatch, capsys):
    """Every job must ask the encoder for the grid that is meant; its default, 3x3, is never meant here."""
    asked, forward = [], WindowEncoder.forward_tokens

    def watched(self, pixel_values, grid=None):
        asked.append(grid)
        return forward(self, pixel_values, grid)

    def grids():
        seen = set(asked)
        asked.clear()
        return seen

    monkeypatch.setattr(WindowEncoder, "forward_tokens", watched)
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "teacher.safetensors")
    encoder, tokens, model = tmp_path / "encoder", tmp_path / "tokens", tmp_path / "model"
    args = ["--captions", captioned, "--encoder", "window_patch8_32", "--encoder-options", "embed_dim=16"]
    args += ["--teachers.0.name", "resnet10t", "--teachers.0.checkpoint", tmp_path / "teacher.safetensors"]
    args += ["--teachers.0.num-classes", "7", "--image-size", "32", "--grids", "2", "4", "--steps", "8"]
    succeed("pretrain", "debug", *args, "--probe-train", classes, "--probe-val", classes, "--output", encoder)
    assert grids() == {(1, 1), (2, 2), (4, 4)}  # 1x1 to try sizes; then both are drawn, and probed
    records = [json.loads(line) for line in (encoder / "log.jsonl").read_text().splitlines()]
    assert [record["grid"] for record in records if "probe_top1" in record] == [2, 4]
    assert all(loss < 1e3 for loss in losses(encoder, "grid").values())
    exported = create_encoder(f"local-dir:{encoder}")
    assert (exported.embed_dim, exported.grid) == (16, (3, 3))

    data = ["--data.root", captioned, "--data.workers", "0"]
    base = ["--model.encoder", f"local-dir:{encoder}"]
    asked.clear()
    succeed("cache", *data, *base, "--grids", "2x2", "4x4", "--output", tokens)
    assert grids() == {(2, 2), (4, 4)}
    assert json.loads((tokens / "cache.json").read_text())["grids"] == {"2x2": [4, 16], "4x4": [16, 16]}

    args = ["debug", *data, *base, "--model.grid", "2x2", "--grids", "2x2", "4x4", "--epochs", "1"]
    succeed("train", *args, "--output", tmp_path / "online")
    assert grids() == {(2, 2), (4, 4)}
    succeed("train", *args, "--data.tokens", tokens, "--output", model)
    rounded = [losses(folder) for folder in (tmp_path / "online", model)]
    assert rounded[0].keys() == rounded[1].keys()
    assert list(rounded[0].values()) == pytest.approx(list(rounded[1].values()), abs=0.02)  # tokens in half precision

    config = json.loads((model / "best" / "config.json").read_text())
    assert config["encoder_config"] == {"name": "window_patch8_32", "kwargs": {"embed_dim": 16}}
    assert config["grid"] == [2, 2]
    asked.clear()
    evaluation = ["--model", model / "best", "--split", "val"]
    succeed("evaluate", *data, *evaluation, "--grid", "4x4", "--output", tmp_path / "scores")
    assert grids() == {(4, 4)}
    succeed("evaluate", *data, *evaluation, "--grid", "4x4", "--data.tokens", tokens, "--output", tmp_path / "cached")
    assert not grids()
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("scores", "cached"))
    assert sum(a == b for a, b in zip(one, other, strict=True)) >= len(one) - 1
    for grid, expected in (((), (2, 2)), (("--grid", "2x4"), (2, 4))):
        capsys.readouterr()
        succeed("caption", captioned / "images" / "val0.png", "--model", model / "best", *grid)
        assert grids() == {expected}
        assert capsys.readouterr().out.startswith(f"{captioned}")


def test_a_grid_that_a_new_encoder_cannot_have_is_refused():
    encoder = create_encoder("window_patch8_32")
    with pytest.raises(ValueError, match="compressed grid 5x2 is not within the feature map 4x4") as refused:
        encoder.forward_maps(torch.zeros(1, 3, 32, 32), (5, 2))
    assert "grid" in refused.value.settings


def test_a_new_encoder_is_a_timm_model_and_can_be_rebuilt():
    model = timm.create_model("window_patch8_32", num_classes=5)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    description = describe_encoder("window_patch8_32", embed_dim=12, num_classes=4, checkpoint_path="x")
    assert description == {"name": "window_patch8_32", "kwargs": {"embed_dim": 12}}
    assert rebuild_encoder(description).embed_dim == 12
    assert "window_patch8_32" not in own_encoders()
    with pytest.raises(ValueError, match=r"no encoder named 'nosuch_patch8_32' in timm; import the module that"):
        rebuild_encoder({"name": "nosuch_patch8_32", "kwargs": {}})


def test_what_a_subclass_forgets_is_named(monkeypatch):
    class Bare(TokenEncoder):
        def __init__(self):
            super().__init__(embed_dim=4, num_prefix_tokens=0, stride=8)

    class Choosing(Bare):
        chooses_grid = True

    with pytest.raises(NotImplementedError, match=r"Bare must implement forward_tokens\(pixel_values, grid\)"):
        Bare().forward_maps(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="Choosing chooses its grid, so it needs a default one"):
        Choosing()
    with pytest.raises(TypeError, match="'num_prefix_tokens' and 'stride'"):
        TokenEncoder(embed_dim=4)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Bare())
    with pytest.raises(ValueError, match="the encoder 'window_patch8_32' has no default_cfg; let build_model_with_cfg"):
        create_encoder("window_patch8_32")
    with pytest.raises(ValueError, match="a Bare cannot start from the weights of another network"):
        Bare().init_from("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="global_pool is 'token'; a Bare has avg"):
        Bare().reset_classifier(3, "token")


OWN = {"LookupViT", "STViT", "STViTSwin", "ViTEncoder", "ToSA", "ToreViT", "ToreLookupViT"}
KINDS = {"PooledEncoder", "NetworkStem", "MHBC", "LookupBlock"} | OWN


def questions_about_encoders(source: str) -> list[str]:
    """Return the expressions of a file that ask what kind of encoder there is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("captioner.encoders"):
            found += [alias.name for alias in node.names if alias.name in KINDS]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asks = node.func.id in ("isinstance", "hasattr") or (node.func.id == "getattr" and len(node.args) == 3)
            kind = ast.unparse(node.args[1]) if asks else ""
            kind = kind.replace("EncoderDecoderCache", "")  # a class of transformers
            if asks and ("encoder" in ast.unparse(node.args[0]) or "Encoder" in kind):
                found.append(ast.unparse(node))
    return found


OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "encoders"]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_outside_asks_for_a_kind_of_encoder(path):
    found = questions_about_encoders(path.read_text())
    if path == PACKAGE / "__init__.py":  # it names what the package offers
        found = [name for name in found if name not in ("LookupViT", "PooledEncoder")]
    assert not found


def test_the_search_for_such_questions_finds_them():
    source = """
from captioner.encoders.stems import NetworkStem
def f(model, encoder, x):
    return isinstance(encoder, LookupViT), hasattr(model.encoder, "grid"), getattr(encoder, "grid", None)
def g(x): return isinstance(x, PooledEncoder), getattr(x, "grid", None), isinstance(x, int)
"""
    assert len(questions_about_encoders(source)) == 5
