"""Captions in the metadata of the images themselves."""

import os
import stat

import pytest
from PIL import Image

from captioner import open_image
from captioner.data.caption_metadata import Metadata

pyexiv2 = pytest.importorskip("pyexiv2", reason="needs the extra 'metadata'")


def read(path):
    with pyexiv2.Image(str(path)) as image:
        return image.read_xmp().get("Xmp.dc.description"), image.read_iptc().get("Iptc.Application2.Caption")


def row(path, caption="a café"):
    return {"path": str(path), "caption": caption, "error": None}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_the_caption_is_there_and_the_pixels_are_the_same(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = 6
    Image.effect_noise((60, 40), 90).convert("RGB").save(path, exif=exif, icc_profile=None)
    path.chmod(0o640)
    before = open_image(path)
    Metadata(overwrite=False).write(row(path))
    xmp, iptc = read(path)
    assert xmp == {'lang="x-default"': "a café"}
    assert iptc == (None if ending == "webp" else "a café")
    assert open_image(path).tobytes() == before.tobytes()
    assert Image.open(path).getexif()[0x010F] == "a maker"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == [path.name]
    Metadata(overwrite=True).write(row(path, "x" * 5000))
    assert len(read(path)[0]['lang="x-default"']) == 5000


def test_the_command_leaves_descriptions_as_they_are_unless_it_may_replace_them(caption, images, tmp_path, capsys):
    with pyexiv2.Image(str(images / "a.jpg")) as image:
        image.modify_xmp({"Xmp.dc.description": {'lang="x-default"': "mine", 'lang="fr"': "la mienne"}})
    (tmp_path / "link.jpg").symlink_to(images / "c.webp")
    Image.new("RGB", (9, 9)).save(images / "d.gif")
    (images / "e.jpg").write_bytes(b"broken")
    assert caption(images, tmp_path / "link.jpg", "--metadata") == 1
    error = capsys.readouterr().err
    assert "2 captions in the images themselves, beside 1 from before; 2 of 4 images could not be captioned" in error
    assert "no caption can be written into" in error
    assert read(images / "a.jpg")[0]['lang="x-default"'] == "mine"
    assert read(images / "c.webp")[0]['lang="x-default"']
    assert (tmp_path / "link.jpg").is_symlink()
    assert caption(images / "a.jpg", images / "b.png", "--metadata") == 0
    assert "all 2 images are captioned in the images themselves" in capsys.readouterr().err
    assert caption(images / "a.jpg", "--metadata", "--overwrite") == 0
    xmp, iptc = read(images / "a.jpg")
    assert xmp['lang="fr"'] == "la mienne"
    assert xmp['lang="x-default"'] == iptc != "mine"


def test_a_full_disk_leaves_the_image_as_it_was(caption, images, monkeypatch, capsys):
    before = (images / "a.jpg").read_bytes()

    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("captioner.data.caption_metadata.open_whole", fill)
    assert caption(images, "--metadata") == 1
    assert "No space left on device; the image is as it was" in capsys.readouterr().err
    assert (images / "a.jpg").read_bytes() == before


def test_a_description_that_would_change_the_pixels_is_not_written(caption, images, monkeypatch, capsys):
    before = (images / "a.jpg").read_bytes()
    monkeypatch.setattr(Metadata, "describe", lambda self, data, caption: (images / "b.png").read_bytes())
    assert caption(images / "a.jpg", "--metadata") == 1
    assert "would not have the same pixels" in capsys.readouterr().err
    assert (images / "a.jpg").read_bytes() == before


def test_options_that_do_not_fit_are_one_line(caption, images, monkeypatch, capsys):
    for options, message in (
        (["--captions", "2"], "an image holds one description"),
        (["--beside", "txt"], "choose one"),
        (["--output", "x.csv"], "choose one"),
    ):
        assert caption(images, "--metadata", *options) == 2
        assert message in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    monkeypatch.setitem(__import__("sys").modules, "pyexiv2", None)
    assert caption(images, "--metadata") == 1
    assert "needs the package pyexiv2: pip install 'captioner[metadata]'" in capsys.readouterr().err
