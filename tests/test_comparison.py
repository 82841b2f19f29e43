import json
from pathlib import Path

import pytest
from processes import run_together

from captioner.encoders import create_encoder
from captioner.pretraining.loop import export_encoder

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "comparison.py"


@pytest.mark.slow
def test_the_comparison_has_a_line_for_each_encoder_and_grid_and_goes_on(captioned, classes, tmp_path, no_java):
    args = [SCRIPT, "--root", captioned, "--output", tmp_path, "--work", tmp_path / "work"]
    args += ["--recipe", "debug", "--epochs", "1", "--split", "val", "--evaluate-images", "4", "--views", "2"]
    args += ["--image-size", "64", "--grids", "2x2", "3x3", "3x3", "--batch", "2"]
    args += ["--probe-train", classes, "--probe-val", classes]
    for name in ("lookupvit", "vit"):
        encoder = create_encoder(f"{name}_tiny_patch16_224", depth=2)
        export_encoder(encoder, {"depth": 2}, 64, tmp_path / name)
        args += [f"--{name}", tmp_path / name]
    done = run_together(*args, processes=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(" training images and ") == 2
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [(row["encoder"], row["grid"], row["tokens"]) for row in rows] == [
        ("ViT", "all", 17),
        ("LookupViT", "2x2", 5),
        ("LookupViT", "3x3", 10),
    ]
    assert all(row["probe"] > 0.5 and row["gflops"] > 0 and "CIDEr" in row["scores"] for row in rows)
    assert len((tmp_path / "comparison.md").read_text().splitlines()) == 5
    assert "<svg" in (tmp_path / "comparison.svg").read_text()

    again = run_together(*args, "--views", "1", processes=1)
    assert again.returncode == 1
    assert "was made with other settings" in again.stderr
    again = run_together(*args, processes=1)
    assert again.returncode == 0
    assert "training and" not in again.stdout  # no decoder was trained anew
