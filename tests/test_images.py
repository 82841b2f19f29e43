import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from captioner import images
from captioner.images import ImageError, open_image, opening, pixels


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
        "float": encoded(Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)), "TIFF"),
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


def test_every_form_of_an_image_is_the_same(tmp_path):
    data = encoded(Image.new("RGB", (8, 8), "blue"), "PNG")
    path = tmp_path / "x.png"
    path.write_bytes(data)
    sources = [path, str(path), data, {"path": str(path), "bytes": None}, {"path": None, "bytes": data}]
    sources += [Image.open(path), io.BytesIO(data), path.open("rb"), bytearray(data), memoryview(data)]
    sources += [
        {"path": None, "bytes": bytearray(data)},
        np.asarray(Image.open(path)),
        np.asarray(Image.open(path)) / 255,
    ]
    sources.append(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
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
    monkeypatch.setattr(opening, "MAX_BYTES", 1024)
    for source in (path, path.read_bytes(), path.open("rb"), io.BytesIO(path.read_bytes())):
        with pytest.raises(ImageError, match=r"files over"):
            open_image(source)


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


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La", "LAB"]


@pytest.mark.parametrize("mode", [*MODES, "I;16", "I;16L", "I;16B", "I;16N"])
def test_pil_images_of_every_mode(mode):
    image = Image.new(mode, (30, 20))
    assert (open_image(image).mode, open_image(image).size) == ("RGB", (30, 20))
    with pytest.raises(ImageError, match="has no pixels"):
        open_image(Image.new(mode, (0, 20)))
    image.close()
    with pytest.raises(ImageError, match="cannot be read: Operation on closed image"):
        open_image(image)


def test_lab_is_converted_by_its_profile():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.new("RGB", (8, 8), "red"), *profiles, outputMode="LAB")
    red, green, blue = open_image(lab).getpixel((0, 0))
    assert red > 240 > 20 > max(green, blue)


def test_pil_images_that_are_not_yet_decoded_are_checked_as_files_are():
    whole = encoded(Image.effect_noise((200, 200), 90), "JPEG")
    with pytest.raises(ImageError, match="truncated"):
        open_image(Image.open(io.BytesIO(whole[:-2000])))
    postscript = encoded(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(ImageError, match="EPS, which is refused"):
        open_image(Image.open(io.BytesIO(postscript)))
    text = zlib.compress(bytes(2 << 20))
    data = encoded(Image.new("RGB", (8, 8), "red"), "PNG")
    place = data.index(b"IEND") - 4
    chunk = b"zTXtk\0\0" + text
    data = (
        data[:place] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place:]
    )
    assert open_image(Image.open(io.BytesIO(data))).getpixel((0, 0)) == (255, 0, 0)


def test_the_number_of_pixels_is_limited_in_every_form(monkeypatch):
    monkeypatch.setattr(pixels, "MAX_PIXELS", 100)
    image = Image.new("RGB", (11, 10))
    forms = [image, np.asarray(image), torch.zeros(3, 10, 11), encoded(image, "PNG"), io.BytesIO(encoded(image, "PNG"))]
    for form in [*forms, Image.open(forms[-1]), {"path": None, "bytes": forms[3]}]:
        with pytest.raises(ImageError, match="11x10 px; over .* is refused"):
            open_image(form)


def test_lines_of_pixels_are_refused():
    """Scaled so that their short side is 224 pixels, they would fill the memory."""
    assert open_image(Image.new("L", (1000, 1))).size == (1000, 1)
    for form in (Image.new("L", (1001, 1)), np.zeros((2002, 2), np.uint8), encoded(Image.new("L", (1, 1001)), "PNG")):
        with pytest.raises(ImageError, match="one side over 1000 times the other is refused"):
            open_image(form)


def grey(values, form="TIFF"):
    """Encode an array as a grey image, open it, and return its 8-bit values."""
    return np.asarray(open_image(encoded(Image.fromarray(np.asarray(values)), form)))[..., 0]


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
def test_brightness_of_16_bits_does_not_depend_on_the_brightest_pixel(form):
    dark = np.linspace(0, 4095, 100).reshape(10, 10).astype(np.uint16)
    bright = dark.copy()
    bright[0, 0] = 65535
    assert (grey(dark, form)[1:] == grey(bright, form)[1:]).all()
    assert (grey(dark, form) == dark // 257).all()


def test_brightness_of_floats_does_not_depend_on_the_brightest_pixel():
    dark = np.linspace(0, 0.25, 100, dtype=np.float32).reshape(10, 10)
    bright = dark.copy()
    bright[0, :4] = 1, 900, -3, np.nan
    assert (grey(dark)[1:] == grey(bright)[1:]).all()
    assert grey(bright)[0, :4].tolist() == [255, 255, 0, 0]
    assert grey(dark).max() == 64
    for values in (dark * 1020, dark * 4 - 1):
        with pytest.raises(ImageError, match="floating-point pixels go from 0 to 1: scale them"):
            grey(values)


def tiff(samples, bits, zero_is_black=1):
    """Write a TIFF of 2x1 grey samples."""
    numbers = {256: 2, 257: 1, 258: bits, 259: 1, 262: zero_is_black, 273: 8, 277: 1, 278: 1, 279: len(samples)}
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, number) for tag, number in numbers.items())
    return b"II*\0" + struct.pack("<I", 12) + samples.ljust(4) + struct.pack("<H", len(numbers)) + entries + bytes(4)


def test_a_depth_that_a_file_declares_is_its_range():
    pgm = b"P5\n2 1\n4095\n" + struct.pack(">HH", 4095, 2048)
    assert [open_image(pgm).getpixel((x, 0))[0] for x in (0, 1)] == [255, 127]
    twelve_bits = tiff(bytes([0xFF, 0xF8, 0x00]), bits=12)  # 4095 and 2048
    assert [open_image(twelve_bits).getpixel((x, 0))[0] for x in (0, 1)] == [255, 127]
    negative = tiff(struct.pack("<HH", 65535, 0), bits=16, zero_is_black=0)
    assert [open_image(negative).getpixel((x, 0))[0] for x in (0, 1)] == [0, 255]


def test_arrays_are_of_the_shapes_and_types_of_images():
    red = np.asarray(Image.new("RGB", (6, 4), "red"))
    clear = np.dstack([red, np.zeros((4, 6), np.uint8)])
    same = [red, red.astype(np.uint16) * 257, red / 255, (red / 255).astype(np.float16), red[::-1, ::-1]]
    same += [torch.from_numpy(red.transpose(2, 0, 1).copy()), torch.from_numpy(red.transpose(2, 0, 1) / 255).bfloat16()]
    for array in same:
        assert (np.asarray(open_image(array)) == red).all()
    for array in (clear, red[..., :1], red[..., 0], red[..., 0] > 9, torch.ones(4, 6), torch.ones(1, 4, 6)):
        assert (np.asarray(open_image(array)) == 255).all()
    wrong = {
        "give several images as a list": [red[None], torch.zeros(2, 3, 4, 6)],
        "has the shape": [red.transpose(2, 0, 1), torch.zeros(5, 6, 3), red[0, 0]],
        "ndarray is no image": [np.array(["a.jpg", "b.jpg"]), red.astype(object)],
        "is of the type": [red.astype(int), torch.zeros(3, 4, 6).int(), red.astype(complex)],
        "has no pixels": [red[:0], torch.zeros(3, 0, 6)],
        "go from 0 to 1": [red.astype(float), (torch.rand(3, 4, 6) - 0.5) / 0.5],
    }
    for message, arrays in wrong.items():
        for array in arrays:
            with pytest.raises(ImageError, match=message):
                open_image(array)


def test_files_are_read_from_their_start_and_in_binary(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")  # and stands at its end
    assert open_image(file).size == (8, 8)
    file.close()
    with pytest.raises(ImageError, match="closed file"):
        open_image(file)
    with pytest.raises(ImageError, match="open it in binary mode"):
        open_image(io.StringIO("x"))
    (tmp_path / "x.jpg").write_bytes(b"broken")
    with (tmp_path / "x.jpg").open("rb") as named, pytest.raises(ImageError, match="x.jpg' is not an image"):
        open_image(named)


def test_warnings_that_are_raised_change_nothing(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # of more pixels, Pillow warns
    data = encoded(Image.new("RGB", (20, 10)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = warnings.filters[:]
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(8) as pool:
            assert {image.size for image in pool.map(open_image, [data] * 64)} == {(20, 10)}
        assert warnings.filters == before


def test_messages_are_one_line_whatever_the_name():
    for name in ("line\nfeed.jpg", "sep\u2028.jpg", "x" * 5000 + ".jpg", "zero\0byte.jpg", "latin\udce9.jpg"):
        with pytest.raises(ImageError) as caught:
            open_image(name)
        assert len(str(caught.value).splitlines()) == 1
        str(caught.value).encode()
        assert "Errno" not in str(caught.value)


def test_a_format_that_is_not_read_is_named(tmp_path):
    (tmp_path / "a.PSD").write_bytes(b"8BPS\0\1" + bytes(100))
    with pytest.raises(ImageError, match="Photoshop is not read, convert it to JPEG or PNG"):
        open_image(tmp_path / "a.PSD")


def test_a_closed_image_is_called_that(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = (tmp_path / "a.png").open("rb")
    images = [Image.open(tmp_path / "a.png"), Image.open(file)]
    images[0].close()
    file.close()
    for image in images:
        with pytest.raises(ImageError, match="was closed before its pixels were read"):
            open_image(image)


@pytest.mark.parametrize("address", ["https://example.com/a.jpg", "file:///a.jpg", "data:image/png;base64,AAAA"])
def test_addresses_are_not_opened(address):
    with pytest.raises(ImageError, match="does not exist; addresses are not opened"):
        open_image(address)
