"""The package as a person meets it: light names, and a clone that is not installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import captioner

PACKAGE = Path(captioner.__file__).parent


def test_light_names_load_nothing_heavy():
    code = """
import sys, captioner
captioner.ImageError, captioner.open_image, captioner.read_captions
print(sorted({"torch", "transformers", "timm", "datasets", "torchvision"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


def test_editors_see_every_public_name():
    source = (PACKAGE / "__init__.py").read_text()
    for name in captioner.__all__:
        assert name == "__version__" or f"import {name} as {name}\n" in source
        assert getattr(captioner, name) is not None
    assert (PACKAGE / "py.typed").is_file()
    assert dir(captioner) == sorted(captioner.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        captioner.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "stream"), [(["-m", "captioner"], "all"), (["-c", "import captioner; captioner.load()"], "last")]
)
def test_a_clone_that_is_not_installed_says_so(tmp_path, arguments, stream):
    shutil.copytree(PACKAGE, tmp_path / "captioner", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    command = [sys.executable, "-S", *arguments]  # without installed packages
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env={})
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert "not installed here" in lines[-1]
    assert "pip install ." in lines[-1]
    assert stream == "last" or len(lines) == 1
