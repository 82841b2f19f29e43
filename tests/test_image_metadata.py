"""What a file holds beside its pixels never makes an image unusable."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from captioner.images import ImageError, open_image
from captioner.images.metadata import strip_metadata

RED = (255, 0, 0)
ORIENTATION = 0x0112


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif(orientation=6):
    """EXIF that says the image is to be turned by 90 degrees."""
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data.tobytes()


def png_with(*chunks, behind=False):
    """A red PNG, 40x20, with further chunks before its pixels or behind them."""
    data = encode(Image.new("RGB", (40, 20), RED), "PNG")
    place = data.index(b"IEND" if behind else b"IDAT") - 4
    added = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return data[:place] + added + data[place:]


def jpeg_with(*segments):
    """A red JPEG, 40x20, with further segments at its start."""
    data = encode(Image.new("RGB", (40, 20), RED), "JPEG")
    added = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    return data[:2] + added + data[2:]


def is_red(image):
    red, green, blue = image.getpixel((5, 5))
    return red > 240 and max(green, blue) < 15


BROKEN_PNG = {
    "compressed text of 2 MiB": (b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2 << 20))),
    "compressed international text": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
    "text by an unknown method": (b"zTXt", b"k\0\5x"),
    "profile of 3 MiB": (b"iCCP", b"x\0\0" + zlib.compress(bytes(3 << 20))),
    "profile cut short": (b"iCCP", b"x"),
    "EXIF that is none": (b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
    "gamma cut short": (b"gAMA", b"1"),
    "density cut short": (b"pHYs", b"1"),
    "animation cut short": (b"acTL", b"1"),
    "frame out of order": (b"fcTL", bytes(3) + b"\7" + bytes(22)),
    "transparency cut short": (b"tRNS", b"\0"),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", BROKEN_PNG)
def test_chunks_of_a_png(name, behind):
    image = open_image(png_with(BROKEN_PNG[name], behind=behind))
    assert image.size == (40, 20)
    assert is_red(image)


def test_text_of_a_png_in_many_chunks():
    data = png_with(*((b"tEXt", b"k%d\0" % number + bytes(1 << 20)) for number in range(70)))
    assert open_image(data).size == (40, 20)


def test_a_wrong_checksum_of_text():
    data = png_with((b"tEXt", b"title\0a boat"))
    assert is_red(open_image(data.replace(b"a boat", b"a goat")))


@pytest.mark.parametrize(
    "segment",
    [
        (0xE0, b"JFIF"),
        (0xE1, b"Exif\0\0garbage!"),
        (0xE1, b"Exif\0\0"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0garbage"),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\2\xb0\7\0\1\0\0\0"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\1\0"),
        (0xEE, b"Adobe"),
        (0xFE, b""),
    ],
)
def test_segments_of_a_jpeg(segment):
    image = open_image(jpeg_with(segment))
    assert image.size == (40, 20)
    assert is_red(image)


def test_an_orientation_that_can_be_read_stays_beside_what_cannot():
    assert open_image(png_with(BROKEN_PNG["profile cut short"], (b"eXIf", exif()[6:]))).size == (20, 40)
    assert open_image(jpeg_with((0xE1, exif()), (0xE2, b"ICC_PROFILE\0"))).size == (20, 40)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_orientation_is_applied_once_and_left_out_where_it_makes_no_sense(form):
    image = Image.new("RGB", (40, 20), RED)
    assert open_image(encode(image, form, exif=exif())).size == (20, 40)
    assert open_image(encode(image, form, exif=exif(99))).size == (40, 20)
    with Image.open(io.BytesIO(encode(image, form, exif=exif()))) as opened:
        assert open_image(opened).size == (20, 40)


def test_profiles_and_exif_of_webp_and_avif():
    image = Image.new("RGB", (40, 20), RED)
    webp = encode(image, "WEBP", exif=exif(), icc_profile=bytes(100))
    assert open_image(webp[:-5]).size in ((40, 20), (20, 40))  # cut within the EXIF, which stands at the end
    assert is_red(open_image(encode(image, "WEBP", exif=b"Exif\0\0 none")))
    avif = encode(image, "AVIF", exif=exif())
    assert is_red(open_image(avif.replace(b"MM\0*", b"XX\0*")))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tags_of_a_tiff(compression, big):
    options = {"compression": compression, "big_tiff": big, "tiffinfo": {270: "a description", ORIENTATION: 6}}
    data = encode(Image.new("RGB", (40, 20), RED), "TIFF", **options)
    place = data.index(struct.pack("<HH", 270, 2))
    for kind in (99, 13):
        broken = data[: place + 2] + struct.pack("<H", kind) + data[place + 4 :]
        assert open_image(broken).size == (20, 40)
        assert is_red(open_image(broken))
    stripped = strip_metadata(data)
    assert open_image(stripped).tobytes() == open_image(data).tobytes()
    with Image.open(io.BytesIO(stripped)) as image:
        assert 270 not in image.tag_v2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_stripping_leaves_the_pixels(form):
    noise = Image.effect_noise((30, 20), 90).convert("RGB")
    described = Image.Exif()
    described[ORIENTATION], described[270] = 1, "a boat"
    data = encode(noise, form, exif=described, icc_profile=bytes(100))
    stripped = strip_metadata(data)
    assert stripped != data
    assert open_image(stripped).tobytes() == open_image(data).tobytes()
    if form in ("JPEG", "PNG"):
        assert b"a boat" not in stripped


def test_pixels_that_are_cut_are_refused_with_or_without_metadata():
    noise = Image.effect_noise((200, 200), 90)
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encode(noise.convert("RGB"), form)
        with pytest.raises(ImageError, match="image in memory "):
            open_image(data[: len(data) // 2])
    data = png_with((b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20))))
    with pytest.raises(ImageError, match="truncated|cannot be read"):
        open_image(data[: data.index(b"IDAT") + 10])


def test_damaged_metadata_never_raises_anything_else():
    rng = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        whole = encode(Image.new("RGB", (40, 20), RED), form, exif=exif())
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, min(len(data), 300), 4):
                data[place] = rng.integers(256)
            with contextlib.suppress(ImageError):
                open_image(bytes(data))
