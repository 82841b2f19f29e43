import math

import pytest

from captioner.data.captions import plain_id, read_captions_of

LISTS = [
    ("['a dog', 'a red dog']", ["a dog", "a red dog"]),
    ('["a dog", "it\'s red"]', ["a dog", "it's red"]),
    (" ['a dog'] ", ["a dog"]),
    ("['a dog'\n 'a red dog']", ["a dog", "a red dog"]),  # as numpy prints arrays
    ("[\"it's 'big'\", 'a \"cat\"']", ["it's 'big'", 'a "cat"']),
    ("('a dog', 'a red dog')", ["a dog", "a red dog"]),
    ("{'b', 'a', 'c'}", ["b", "a", "c"]),  # in the order in which it was written
    (["a dog", "['a cat', 'a cow']"], ["a dog", "a cat", "a cow"]),
    (r"['a \d dog']", [r"a \d dog"]),
]
TEXTS = ["a dog", "[UNK]", "[one] and [two]", "(a dog)", "('quoted')", "{}", "[", "none of them", "a [cat]", "nano"]
TEXTS += ["set (one)", "array of dogs"]
EMPTY = ["", " \n", "nan", "NaN", "None", "null", "<NA>", "N/A", None, math.nan, "[]", "[nan]", "['']"]
UNREADABLE = [
    *(5, True, [["a"]], {"raw": "a"}, b"a"),
    *("[a dog, a red dog]", "[1, 2]", "['a', 5]", "[['a']]", "['a dog', 'a red", "[b'a']", "['a' 'b', 'c']"),
    *("array(['a dog', 'a cat'], dtype=object)", "frozenset({'a dog'})", "tuple(['a dog'])"),
    *('[{"raw": "a"}]', "{'raw': 'a'}", '{"raw": "a"}', "[" * 10_000 + "]" * 10_000),
]


@pytest.mark.parametrize(("value", "expected"), LISTS)
def test_a_list_kept_as_text_is_the_list(value, expected):
    assert read_captions_of(value) == (expected, 0, 0)


@pytest.mark.parametrize("value", TEXTS)
def test_a_caption_with_brackets_is_a_caption(value):
    assert read_captions_of(value) == ([value], 0, 0)


@pytest.mark.parametrize("value", EMPTY)
def test_what_stands_for_no_caption_is_none(value):
    assert read_captions_of(value) == ([], 1, 0)


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda value: repr(value)[:20])
def test_what_cannot_be_a_caption_is_counted(value):
    assert read_captions_of(value) == ([], 0, 1)


def test_each_item_of_a_list_is_counted():
    assert read_captions_of([" a  dog ", None, "nan", 7, "[1, 2]"]) == ([" a  dog "], 2, 2)
    assert read_captions_of("['a', None, nan]") == (["a"], 2, 0)
    assert read_captions_of([]) == ([], 0, 0)
    assert read_captions_of("half a pair \ud800") == (["half a pair ?"], 0, 0)


def test_ids_are_whole_numbers_or_text():
    assert [plain_id(value) for value in (7, 7.0, "7", "a")] == [7, 7, "7", "a"]
    assert [plain_id(value) for value in (7.5, True, None, math.nan, math.inf, [1])] == [None] * 6
