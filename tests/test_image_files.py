"""Finding images: folders, patterns, lists, and names of files."""

import io
import os

import pytest
from PIL import Image

from captioner.data.image_files import search_folder
from captioner.data.image_inputs import find_images
from captioner.images import SUFFIXES, supported
from captioner.images.names import escape_name, unescape_name
from captioner.pretraining.image_store import open_folder


@pytest.fixture
def touch(tmp_path):
    """Return a function that makes files in a temporary folder."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def found_in(folder):
    return [str(path.relative_to(folder)) for path in search_folder(folder).files]


def test_every_ending_of_the_allowed_decoders_is_an_image():
    Image.init()
    known = {ending for ending, form in Image.registered_extensions().items() if form in (*supported(), "MPO")}
    assert known <= SUFFIXES


def test_folders_are_searched_by_ending_in_any_case(touch):
    root = touch("b.JPG", "a.jfif", "deep/er/c.Apng", "d.jp2", "x.jpg/e.png", "[odd] name.webp")
    assert found_in(root) == ["[odd] name.webp", "a.jfif", "b.JPG", "d.jp2", "deep/er/c.Apng", "x.jpg/e.png"]


def test_what_is_left_out_is_counted_by_reason(touch):
    root = touch("a.jpg", "b.PSD", "c.psd", "d.CR2", "e.txt", "f.TXT", "g", ".h.jpg", ".git/i.jpg", "j.svg")
    found = search_folder(root)
    assert [path.name for path in found.files] == ["a.jpg"]
    assert found.unread == {"Photoshop": 2, "camera raw": 1, "SVG": 1}
    assert found.others == {".txt": 2, "without an ending": 1, "hidden": 2}
    assert "2 Photoshop (not read: convert it to JPEG or PNG)" in found.left_out()
    assert "\n" not in found.left_out()
    many = search_folder(touch(*(f"many/x.{number:03}" for number in range(30))) / "many").left_out()
    assert many.endswith("22 others")


def test_what_operating_systems_leave_is_ignored(touch):
    root = touch("a.jpg", "._a.jpg", "Thumbs.db", ".DS_Store", "desktop.ini", "__MACOSX/._a.jpg", "__MACOSX/b.jpg")
    touch("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/c.jpg")
    found = search_folder(root)
    assert [path.name for path in found.files] == ["a.jpg"]
    assert found.left_out() == ""


def test_a_hidden_folder_that_is_named_is_searched(touch):
    root = touch(".hidden/a.jpg")
    assert found_in(root) == []
    assert found_in(root / ".hidden") == ["a.jpg"]


def test_linked_folders_are_searched_once_and_loops_end(touch, tmp_path):
    root = touch("in/z_real/a.jpg", "out/b.jpg") / "in"
    (root / "a_link").symlink_to(root / "z_real")
    (root / "z_real" / "up").symlink_to(root)
    (root / "outside").symlink_to(tmp_path / "out")
    (root / "outside_again").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "itself").symlink_to("itself")
    (root / "dangling.jpg").symlink_to("gone.jpg")
    (root / "linked.jpg").symlink_to(root / "z_real" / "a.jpg")
    assert found_in(root) == ["dangling.jpg", "linked.jpg", "outside/b.jpg", "z_real/a.jpg"]


def test_folders_that_cannot_be_read_are_named(touch, monkeypatch):
    root, scan = touch("open/a.jpg", "locked/b.jpg"), os.scandir

    def refuse(folder):
        if os.path.basename(folder) == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_images([str(root)])
    assert [name for name, _ in found.images] == [str(root / "open" / "a.jpg")]
    assert found.problems == [f"the folder '{root / 'locked'}' cannot be read: Permission denied"]


def test_images_that_are_not_read_are_a_problem_and_other_files_are_not(touch):
    root = touch("a.jpg", "b.psd", "more/c.txt", "more/d.jpg", "none/e.txt")
    found = find_images([str(root), str(root / "more"), str(root / "none")])
    assert len(found.images) == 3
    assert [line.partition(": ")[2] for line in found.notes] == ["1 .txt"]
    assert "1 Photoshop" in found.problems[0]
    assert f"no images in the folder '{root / 'none'}'; left out: 1 .txt" in found.problems[1]


def test_inputs_are_taken_in_order_and_what_is_not_there_is_said(touch):
    root = touch("b.jpg", "a/c.jpg", "a/d.jpg", "e[1].jpg", "pattern1/f.jpg", "pattern2/g.jpg")
    inputs = ["b.jpg", "a", "e[1].jpg", "pattern*", "**/c.jpg", "gone.jpg", "gone/", "gone", "*.gif", "b.jpg"]
    found = find_images([str(root / name) + ("/" if name.endswith("/") else "") for name in inputs])
    names = [os.path.relpath(name, root) for name, _ in found.images]
    expected = ["b.jpg", "a/c.jpg", "a/d.jpg", "e[1].jpg", "pattern1/f.jpg", "pattern2/g.jpg", "a/c.jpg", "gone.jpg"]
    assert names == [*expected, "b.jpg"]
    assert found.problems == [
        f"there is no folder '{root}/gone/'",
        f"there is no file and no folder '{root}/gone'",
        f"no file matches '{root}/*.gif'",
    ]
    assert find_images(["x" * 300, "x\0y"]).images == []


def from_standard_input(data):
    return [name for name, _ in find_images(["-"], io.BytesIO(data)).images]


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"a.jpg\nb c.jpg\n\n d.jpg", ["a.jpg", "b c.jpg", " d.jpg"]),
        (b"a.jpg\r\nb.jpg\r\n", ["a.jpg", "b.jpg"]),
        (b"a\r.jpg\nb.jpg\r\n", ["a\r.jpg", "b.jpg\r"]),
        ("u\u2028\x0c\x85.jpg\nb.jpg".encode(), ["u\u2028\x0c\x85.jpg", "b.jpg"]),
        (b"l\xe9.jpg\n", ["l\udce9.jpg"]),
        (b"a.jpg\0b\nc.jpg\0", ["a.jpg", "b\nc.jpg"]),
        (b"a\0b\0c\0", ["a", "b", "c"]),
        (b"\xef\xbb\xbfa.jpg\n", ["a.jpg"]),
        ("\ufeffé.jpg\r\nb.jpg\r\n".encode("utf-16-le"), ["é.jpg", "b.jpg"]),
        (b"P3.jpg\nP4\n", ["P3.jpg", "P4"]),
        (b"", []),
    ],
)
def test_lists_are_split_at_line_feeds_or_zero_bytes(data, names):
    assert from_standard_input(data) == names


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA"])
def test_an_image_on_standard_input_is_recognised(form):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(buffer, form)
    for data in (buffer.getvalue(), buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3]):
        assert from_standard_input(data) == ["-"]


def test_images_without_zero_bytes_and_of_other_formats_are_recognised():
    assert from_standard_input(b"P3 1 1 255 9 9 9\n") == ["-"]
    assert from_standard_input(b"\0\0\0\x18ftypheic" + bytes(100)) == ["-"]
    assert from_standard_input(b"8BPS\0\1" + bytes(20)) == ["-"]


def test_any_name_is_one_line_and_read_back():
    characters = [chr(code) for code in (*range(1, 0x300), 0x2028, 0x2029, 0xFEFF, 0x1F600, 0xDC80, 0xDCFF, 0xD800)]
    names = ["".join(characters), *characters, "\\t", "\\\\n", "a\\", "\\x41", "\\u0041", "\\", "C:\\new\\table.jpg"]
    for name in names:
        written = escape_name(name)
        assert len(f"{written}|".splitlines()) == 1
        assert "\t" not in written
        written.encode()
        assert unescape_name(written) == name
    assert escape_name("smile 😀 ä.jpg") == "smile 😀 ä.jpg"
    assert escape_name("a\tb\udce9\u2028") == r"a\tb\xe9\u2028"


def test_pretraining_searches_folders_in_the_same_way(touch, caplog):
    root = touch("cats/a.jfif", "cats/.b.jpg", "dogs/c.png", "dogs/d.psd")
    source = open_folder(root)
    assert [(path.name, label) for path, label in source.items] == [("a.jfif", "cats"), ("c.png", "dogs")]
    assert "1 Photoshop" in caplog.text
    assert "1 hidden" in caplog.text


def test_a_pattern_for_all_folders_follows_links_once(touch, monkeypatch):
    root = touch("a/b.jpg", "a/.hidden/c.jpg", "[1]/d.jpg", "top.jpg")
    for name in ("up", "again"):  # with two links in a circle, there are endless names
        (root / "a" / name).symlink_to(root)
    monkeypatch.chdir(root)
    for pattern in ("**/*.jpg", "./**/*.jpg", "**/**/*.jpg"):
        assert [name for name, _ in find_images([pattern]).images] == ["[1]/d.jpg", "a/b.jpg", "top.jpg"]
    assert [name for name, _ in find_images([f"{root}/**/b.jpg"]).images] == [f"{root}/a/b.jpg"]
    assert find_images(["**/a"]).problems == ["no file matches '**/a'"]


def test_a_list_without_a_name_is_told():
    assert find_images(["-"], io.BytesIO(b"\n\n")).problems == ["standard input contains no name of an image"]
