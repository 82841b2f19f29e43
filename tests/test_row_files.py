import json
import logging

import pytest
from PIL import Image

from captioner.data.readers import read_captions
from captioner.errors import SettingError

HEADER = "image,caption\n"
TWO = [["a dog, red"], ["a cat"]]


@pytest.fixture
def table(tmp_path):
    """Return a function that reads the captions of a file with this content, beside the images a.jpg and b.jpg."""
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    def read(content, name="captions.csv", **kwargs):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_captions(tmp_path / name, **kwargs)["captions"][:]

    return read


DIALECTS = {
    "comma": HEADER + 'a.jpg,"a dog, red"\nb.jpg,a cat\n',
    "semicolon": "image;caption\na.jpg;a dog, red\nb.jpg;a cat\n",
    "tab": "image\tcaption\na.jpg\ta dog, red\nb.jpg\ta cat\n",
    "bar": "image_name| comment_number| comment\na.jpg| 0| a dog, red\nb.jpg| 0| a cat\n",
    "Windows lines": HEADER.replace("\n", "\r\n") + 'a.jpg,"a dog, red"\r\nb.jpg,a cat\r\n',
    "old Mac lines": HEADER.replace("\n", "\r") + 'a.jpg,"a dog, red"\rb.jpg,a cat\r',
    "space before a quote": 'image, caption\na.jpg, "a dog, red"\nb.jpg, a cat\n',
    "header in other case": ' File Name , CAPTION \na.jpg,"a dog, red"\nb.jpg,a cat\n',
    "header in quotes": '"image";"caption"\n"a.jpg";"a dog, red"\n"b.jpg";"a cat"\n',
    "named separator": "sep=;\nimage;caption\na.jpg;a dog, red\nb.jpg;a cat\n",
    "rows without values": "\n" + HEADER + 'a.jpg,"a dog, red"\n\n,\n  \nb.jpg,a cat\n,\n',
    "line break in quotes": HEADER + 'a.jpg,"a dog,\nred"\nb.jpg,a cat\n',
    "UTF-8 with a mark": b"\xef\xbb\xbf" + (HEADER + 'a.jpg,"a dog, red"\nb.jpg,a cat\n').encode(),
    "UTF-16": (HEADER + 'a.jpg,"a dog, red"\nb.jpg,a cat\n').encode("utf-16"),
    "other usual names": 'filename,sentence\na.jpg,"a dog, red"\nb.jpg,a cat\n',
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_tables(table, dialect):
    assert table(DIALECTS[dialect]) == TWO


@pytest.mark.parametrize("name", ["x.CSV", "x.tsv", "captions.txt", "x.TXT", "x.json", "x", "x.data"])
def test_a_table_is_read_whatever_its_ending(table, name):
    assert table(DIALECTS["tab"], name) == TWO


BROKEN = [
    ("a.jpg,a dog, red\nb.jpg,a cat\n", "line 2 has 3 fields, the header 2; a value that holds a comma must stand in"),
    ("a.jpg,a dog\nb.jpg\n", "line 3 has 1 field, the header 2"),
    ("a.jpg,a dog\nruns fast\nb.jpg,a cat\n", "line 3 has 1 field, the header 2; a value that holds a line break"),
    ('a.jpg,"a dog\nb.jpg,a cat\n', "line 2 opens a quote that is never closed"),
    ('a.jpg,a dog\nb.jpg,"a cat', "line 3 opens a quote that is never closed"),
    ('a.jpg,"a dog\nb.jpg,"a cat"\n', "line 2 continues after a closing quote"),
    ('a.jpg,"big" dog\n', "line 2 continues after a closing quote"),
    ('a.jpg,"a dog\nb.jpg,a cat"\n', "line 2 has a quote that is closed only in line 3"),
    ("a.jpg,a d\0og\n", "line 2, holds a NUL character"),
    ('\n"a.jpg","one\ntwo"\nb.jpg\n', "line 5 has 1 field"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_a_row_that_is_not_whole_is_refused_with_its_line(table, rows, message):
    with pytest.raises(ValueError, match=r"captions\.csv'") as raised:
        table(HEADER + rows)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_table_without_a_header_is_told_by_its_first_line(table):
    with pytest.raises(ValueError, match="has no column 'image', only a.jpg, a dog"):
        table("a.jpg,a dog\n")


def test_headers_that_cannot_be_meant(table):
    cases = [
        ("image,caption,caption\na.jpg,a,b\n", "names the column 'caption' more than once"),
        ("foo;bar,baz\na;b,c\n", "may be one of commas and of semicolons"),
        ("a.jpg,a dog\nb.jpg,a cat\n", "no column 'image', only a.jpg, a dog"),
        ("image,text,comment\na.jpg,a dog,b\n", "'text' and 'comment' both fit the column of captions"),
        ("image,Caption,caption \na.jpg,a dog,b\n", "'Caption' and 'caption' both fit the column"),
        ("", "is empty"),
        (HEADER, "no captioned images"),
        ('[{"image": "a.jpg"}]', "is JSON and no table"),
        (HEADER.encode("utf-16-le"), "holds a NUL character; a text file must be UTF-8, or UTF-16 with a byte order"),
    ]
    for content, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            table(content)
        assert "captions.csv" in str(raised.value)
    assert table("image,text,comment\na.jpg,a dog,b\n", caption_column="text") == [["a dog"]]
    assert table("image,text,caption\na.jpg,b,a dog\n") == [["a dog"]]
    with pytest.raises(SettingError, match="no column 'comment', only image, text"):  # what is named is not replaced
        table("image,text\na.jpg,a dog\n", caption_column="comment")


def test_other_encodings_are_told_or_refused(table, caplog):
    caplog.set_level(logging.WARNING)
    assert table((HEADER + "a.jpg,ein dünner Hund\n").encode("cp1252")) == [["ein dünner Hund"]]
    assert "is not UTF-8 (line 2): it is read as Windows-1252" in caplog.text
    for broken in (HEADER + "a.jpg,ü\n").encode() + b"b.jpg,\xfc\n", HEADER.encode() + b"\nb.jpg,\x81\xff\n":
        with pytest.raises(ValueError, match=r"line 3: byte 0x.. is not UTF-8"):
            table(broken)


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


GOOD = {"image": "a.jpg", "caption": "a dog, red"}


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.json"])
def test_lines_of_json(table, name):
    assert table(lines(GOOD, "", {"image": "b.jpg", "caption": ["a cat"]}, ""), name) == TWO
    assert table("\ufeff" + lines(GOOD, {"image": "b.jpg", "caption": "a\u2028cat"}), name) == TWO


def test_a_json_list_of_rows(table):
    assert table(json.dumps([GOOD, {"image": "b.jpg", "caption": ["a cat"]}]), "x.json") == TWO


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "b.jpg", "capt', "line 2, is not JSON: Unterminated string"),
        ('["b.jpg", "a cat"]', "line 2, holds no object"),
        ("5", "line 2, holds no object"),
        ("b.jpg,a cat", "line 2, is not JSON"),
        ("[" * 100_000, "line 2, is not JSON"),
        ('{"image": "b.jpg", "caption": "a cat", "caption": "a cow"}', "line 2: an object has the name 'caption' more"),
    ],
)
def test_a_line_that_is_no_row_is_refused(table, line, message):
    with pytest.raises(ValueError, match=message):
        table(lines(GOOD, line), "x.jsonl")


def test_rows_that_lack_a_value_are_counted(table, caplog):
    found = table(lines({"image": "b.jpg"}, GOOD, {"caption": "a cat"}, {"image": None, "caption": "a"}, {}), "x.jsonl")
    assert found == [["a dog, red"]]
    assert "3 missing images (line 3, line 4, line 5)" in caplog.text
    assert "1 images without captions (b.jpg)" in caplog.text
    with pytest.raises(SettingError, match="3 missing images") as raised:
        table(lines(GOOD, {"caption": "a cat"}, {}, {}), "x.jsonl", on_bad="refuse")
    assert raised.value.settings == ("on_bad",)


def test_cells_without_a_value_are_no_captions_and_no_images(table, caplog):
    assert table(HEADER + "a.jpg,nan\nb.jpg,a cat\nNaN,a cow\n,an owl\n\"b.jpg\",\"['one', 'two']\"\n") == [
        ["a cat", "one", "two"]
    ]
    assert "2 missing images (line 4, line 5); 1 empty captions (a.jpg); 1 images without captions" in caplog.text
    assert table('{"image": "a.jpg", "caption": NaN}\n{"image": "b.jpg", "caption": "a", "image_id": NaN}', "x.jsonl")
    assert "1 empty captions (a.jpg)" in caplog.text


def test_two_values_under_one_name_are_refused_in_any_json(table):
    with pytest.raises(ValueError, match=r"x.json': an object has the name 'image' more than once"):
        table('[{"image": "a.jpg", "image": "b.jpg", "caption": "a dog"}]', "x.json")
