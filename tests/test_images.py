import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from captioner import images
from captioner.images import ImageError, open_image


def encoded(image, fmt, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


def test_every_kind_of_image_becomes_rgb(tmp_path):
    grey16 = Image.fromarray(np.full((20, 30), 40000, np.uint16))
    frames = [Image.new("P", (30, 20), i) for i in range(3)]
    cases = {
        "rgb": encoded(Image.new("RGB", (30, 20), "red"), "JPEG"),
        "grey": encoded(Image.new("L", (30, 20), 99), "PNG"),
        "cmyk": encoded(Image.new("CMYK", (30, 20), (0, 255, 255, 0)), "JPEG"),
        "alpha": encoded(Image.new("RGBA", (30, 20), (255, 0, 0, 0)), "PNG"),
        "grey16": encoded(grey16, "PNG"),
        "big-endian": encoded(Image.frombytes("I;16B", (30, 20), np.full(600, 40000, ">u2").tobytes()), "TIFF"),
        "key": encoded(Image.new("RGB", (30, 20), "red"), "PNG", transparency=(255, 0, 0)),
        "one bit": encoded(Image.new("1", (30, 20), 1), "PNG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "float": encoded(Image.fromarray(np.linspace(0, 1000, 600, dtype=np.float32).reshape(20, 30)), "TIFF"),
    }
    opened = {name: open_image(data) for name, data in cases.items()}
    assert {image.mode for image in opened.values()} == {"RGB"}
    assert {image.size for image in opened.values()} == {(30, 20)}
    assert opened["grey16"].getpixel((0, 0)) == (155, 155, 155)
    assert opened["big-endian"].getpixel((0, 0)) == (155, 155, 155)
    assert opened["alpha"].getpixel((0, 0)) == (255, 255, 255)
    assert opened["key"].getpixel((0, 0)) == (255, 255, 255)
    assert opened["one bit"].getpixel((0, 0)) == (255, 255, 255)
    assert opened["float"].getpixel((0, 0))[0] == 0
    assert opened["float"].getpixel((29, 19))[0] == 255
    red, green, blue = opened["cmyk"].getpixel((0, 0))
    assert red > 200 > 100 > max(green, blue)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    assert open_image(encoded(image, "JPEG", exif=exif)).size == (20, 40)


def test_paths_bytes_records_and_images_are_the_same(tmp_path):
    data = encoded(Image.new("RGB", (8, 8), "blue"), "PNG")
    path = tmp_path / "x.png"
    path.write_bytes(data)
    sources = [path, str(path), data, {"path": str(path), "bytes": None}, {"path": None, "bytes": data}]
    sources.append(Image.open(path))
    assert {open_image(source).tobytes() for source in sources} == {b"\0\0\xff" * 64}


def png_bomb(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_before_decoding():
    for side in (12_000, 60_000):
        with pytest.raises(ImageError, match="megapixels is refused"):
            open_image(png_bomb(side))


def test_broken_files_are_refused_with_their_name(tmp_path):
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    cases = {
        "truncated.jpg": (whole[: len(whole) // 2], "cannot be read"),
        "text.jpg": (b"this is no image", "not an image of a supported format"),
        "empty.png": (b"", "is empty"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a supported format"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}.*{message}"):
            open_image(path)
    with pytest.raises(ImageError, match="missing.jpg' does not exist"):
        open_image(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="is not a file"):
        open_image(tmp_path)
    for nothing in (None, 5, {"path": None, "bytes": None}):
        with pytest.raises(ImageError, match="is no image"):
            open_image(nothing)


def test_large_files_are_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    path.write_bytes(b"x" * 2048)
    monkeypatch.setattr(images, "MAX_BYTES", 1024)
    with pytest.raises(ImageError, match=r"large.jpg.*files over"):
        open_image(path)


@pytest.mark.parametrize("cut", range(0, 900, 37))
def test_damaged_bytes_never_raise_anything_else(cut):
    rng = np.random.default_rng(cut)
    for fmt in images.supported():
        data = bytearray(encoded(Image.effect_noise((24, 24), 40).convert("RGB"), fmt))
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(256)
        try:
            assert open_image(bytes(data[: len(data) - cut % 50])).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)
