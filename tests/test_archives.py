"""Images inside zip and tar archives, read in place."""

import io
import os
import tarfile
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from captioner import ImageError, cli, open_image
from captioner.data import archives
from captioner.data.archives import search_archive
from captioner.data.image_inputs import find_images
from captioner.data.path_filter import PathFilter

FILES = [
    "a.jpg",
    "deep/b.png",
    "deep/notes.txt",
    "c.psd",
    ".hidden.jpg",
    ".git/d.jpg",
    "__MACOSX/._a.jpg",
    "deep/._b.png",
]
FILES += ["../../escape.jpg", "/absolute.jpg", "line\nfeed.jpg", "back\\slash.jpg"]


def encode(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return str(path)


def add(archive, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def make_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files:
            add(archive, name, data)
    return str(path)


@pytest.fixture(params=["zip", "tar"])
def make(request, tmp_path):
    """Return a function that makes an archive of each kind."""
    return lambda files, name="x": (make_zip if request.param == "zip" else make_tar)(
        tmp_path / f"{name}.{request.param}", files
    )


def test_images_are_found_by_ending_and_read_in_place(make, tmp_path):
    path = make([(name, encode()) for name in FILES])
    found = search_archive(path)
    names = ["a.jpg", "deep/b.png", "../../escape.jpg", "/absolute.jpg", "line\nfeed.jpg", "back\\slash.jpg"]
    assert [member.name for member in found.members] == [f"{path}/{name}" for name in names]
    assert found.others == {".txt": 1, "hidden": 2}
    assert found.unread == {"Photoshop": 1}
    assert found.problem == ""
    assert all(open_image(member).size == (20, 10) for member in found.members)
    assert os.listdir(tmp_path) == [os.path.basename(path)]


def test_each_of_several_files_with_one_name_is_an_image(make):
    with warnings.catch_warnings(action="ignore"):
        path = make([("a.png", encode("red")), ("a.png", encode("blue"))])
    first, second = search_archive(path).members
    assert (first.name, second.name) == (f"{path}/a.png", f"{path}/a.png#2")
    assert open_image(first).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(second).getpixel((0, 0)) == (0, 0, 255)


def test_patterns_choose_among_the_files_of_archives(make):
    path = make([("2024/a.png", encode()), ("2025/b.png", encode())])
    found = find_images([path], path_filter=PathFilter(exclude=["2024/"]))
    assert [name for name, _ in found.images] == [f"{path}/2025/b.png"]
    assert "1 excluded by the patterns" in found.notes[0]


def test_an_archive_that_breaks_off_gives_what_is_before(make):
    path = make([(f"{number}.png", encode()) for number in range(20)])
    with open(path, "rb") as file:
        whole = file.read()
    for size in range(0, len(whole), 509):
        with open(path, "wb") as file:
            file.write(whole[:size])
        found = search_archive(path)
        assert "\n" not in found.problem
        assert found.problem or len(found.members) == 20
        for member in found.members:
            try:
                open_image(member)
            except ImageError as error:
                assert "\n" not in str(error)


def test_links_devices_and_sparse_files_are_left_out(tmp_path):
    (tmp_path / "secret.png").write_bytes(encode())
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.CHRTYPE)):
            add(archive, name, type=kind, linkname=str(tmp_path / "secret.png"))
        add(archive, "d.png", encode())
    info = zipfile.ZipInfo("a.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, str(tmp_path / "secret.png"))
        archive.writestr("d.png", encode())
    for ending, count in (("tar", 3), ("zip", 1)):
        found = search_archive(str(tmp_path / f"x.{ending}"))
        assert [os.path.basename(member.name) for member in found.members] == ["d.png"]
        assert found.others.total() == count


def test_a_bomb_is_refused_and_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("captioner.images.opening.MAX_BYTES", 10_000)
    path = make_zip(tmp_path / "x.zip", [("a.png", bytes(10**7))], compression=zipfile.ZIP_DEFLATED)
    [member] = search_archive(path).members
    with pytest.raises(ImageError, match="are refused"):
        open_image(member)


def test_other_compressions_of_zip_are_read(tmp_path):
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = make_zip(tmp_path / "x.zip", [("a.png", encode())], compression=kind)
        archives.zip_files.files.clear()
        assert open_image(search_archive(path).members[0]).size == (20, 10)


def test_an_encrypted_or_odd_file_is_an_image_error(tmp_path):
    path = make_zip(tmp_path / "x.zip", [("a.png", encode())])
    data = bytearray((tmp_path / "x.zip").read_bytes())
    for place, value in ((6, 1), (data.rindex(b"PK\x01\x02") + 8, 1)):
        data[place] |= value
    (tmp_path / "x.zip").write_bytes(data)
    [member] = search_archive(path).members
    with pytest.raises(ImageError, match="x.zip/a.png' cannot be read: .*encrypted"):
        open_image(member)


def test_archives_compressed_as_a_whole_are_refused_in_words(tmp_path):
    path = make_tar(tmp_path / "x.tar.gz", [("a.png", encode())], "w:gz")
    found = find_images([path])
    assert not found.images
    assert "is compressed as a whole" in found.problems[0]


def test_several_threads_read_several_archives(tmp_path):
    colours = ["red", "green", "blue", "white"] * 3
    paths = [
        make_zip(tmp_path / f"{n}.zip", [("a.png", encode(c)), ("b.png", encode())]) for n, c in enumerate(colours)
    ]
    members = [search_archive(path).members[0] for path in paths] * 5
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        return [open_image(member).getpixel((0, 0)) for member in members]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert results == [[Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours] * 5] * 4
    assert len(archives.zip_files.files) <= archives.OPEN


def test_the_command_captions_archives(make, saved_model, tmp_path, capsys):
    path, output = (
        make([("a.png", encode()), ("sub/b.png", encode("blue")), ("c.png", b"broken")]),
        tmp_path / "o.jsonl",
    )
    for options in ([], ["--resume"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["caption", path, "--model", str(saved_model), "--output", str(output), *options])
        assert stopped.value.code == 1
    assert output.read_text().count('"error": null') == 2
    assert "c.png' is not an image" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["caption", path, "--model", str(saved_model), "--beside", "txt"])
    error = capsys.readouterr().err
    assert error.count("is no file of its own") == 3
    assert find_images([str(tmp_path / "o.jsonl")]).images
    make([("notes.txt", b"")], "empty")
    found = find_images([str(tmp_path / "empty.*")])
    assert "no images in the archive" in found.problems[0]
