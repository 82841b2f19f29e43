"""HEIC and JPEG XL, which packages that need not be installed decode."""

import importlib
import io
import struct

import pytest
from PIL import ExifTags, Image

from captioner.data.image_files import search_folder
from captioner.images import ImageError, open_image, opening, pixels, plugins, supported
from captioner.images.plugins import PLUGINS, jxl_size


@pytest.fixture(params=["HEIF", "JXL"])
def form(request):
    [plugin] = [plugin for plugin in PLUGINS if plugin.format == request.param]
    pytest.importorskip(plugin.module)
    assert request.param in supported()
    return request.param


def encode(form, size=(64, 48), **options):
    buffer = io.BytesIO()
    image = Image.new("RGB", size, "red")
    image.paste("blue", (0, 0, size[0] // 2, size[1] // 2))
    image.save(buffer, form, **options)
    return buffer.getvalue()


def is_blue(image, place):
    red, _, blue = image.getpixel(place)
    return blue > red


def test_they_are_opened(form, tmp_path):
    image = open_image(encode(form))
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert is_blue(image, (5, 5))
    assert not is_blue(image, (60, 5))


def test_they_are_turned_upright_once(form):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = open_image(encode(form, exif=exif.tobytes()))
    assert image.size == (48, 64)
    assert is_blue(image, (40, 5))
    assert not is_blue(image, (5, 5))


def test_damage_is_an_image_error(form):
    data = encode(form)
    for cut in range(0, len(data), 7):
        for damaged in (data[:cut], data[:cut] + b"\xff\x00" + data[cut + 2 :]):
            try:
                open_image(damaged)
            except ImageError as error:
                assert "\n" not in str(error)


def test_a_large_image_is_refused_before_it_is_decoded(form, monkeypatch):
    data = encode(form)
    monkeypatch.setattr(pixels, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    if form == "JXL":
        monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened, which decodes"))
    with pytest.raises(ImageError, match="64x48 px"):
        open_image(data)


@pytest.mark.parametrize("size", [(8, 8), (64, 48), (256, 256), (1, 700), (3000, 2), (513, 512), (160, 90), (9000, 1)])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(size):
    pytest.importorskip("pillow_jxl")
    for container in (False, True):
        data = encode("JXL", size, use_container=container, effort=1)
        assert jxl_size(data) == size
        assert jxl_size(data[:64]) == size
    parts = struct.pack(">I4s", 12, b"JXL ") + b"\r\n\x87\n" + struct.pack(">I4sI", 0, b"jxlp", 0)
    assert jxl_size(parts + encode("JXL", size, use_container=False)) == size
    assert jxl_size(encode("PNG", size)) is None
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(parts)


def test_a_jpeg_that_was_packed_as_jpeg_xl_is_opened(tmp_path):
    pytest.importorskip("pillow_jxl")
    Image.open(io.BytesIO(encode("PNG"))).save(tmp_path / "a.jpg")
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.jxl", lossless_jpeg=True)
    image = open_image(tmp_path / "a.jxl")
    assert image.size == (64, 48)
    assert is_blue(image, (5, 5))


def test_without_the_packages_both_are_named_and_not_read(tmp_path, monkeypatch):
    for name in ("a.heic", "b.jxl", "c.jpg"):
        (tmp_path / name).touch()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(plugins, "find_spec", lambda name: None)
            importlib.reload(opening)
            assert not {".heic", ".jxl"} & opening.SUFFIXES
            assert "install pillow-heif or convert it" in opening.advise("'a.HEIC'")
            assert "install pillow-jxl-plugin" in opening.remedy("JPEG XL")
    finally:
        importlib.reload(opening)
    assert len(search_folder(tmp_path).files) >= 1
