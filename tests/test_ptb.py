import gzip
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest

from captioner.metrics.ptb import rules as ptb_rules
from captioner.metrics.ptb import tokenizer as ptb
from captioner.metrics.ptb.chars import CLASSES
from captioner.metrics.ptb.tokenizer import tokenize, tokenize_caption

DATA = Path(__file__).parents[1].parent / "shared/data"
FIXTURE = Path(__file__).parent / "fixtures/ptb.json.gz"

# SHA-256 of what the Java tokenizer makes of each corpus, one caption a line (`fixtures/make_ptb.py` prints them).
COCO = (25014, "9da43c339600f891a139ae36b35d1b37fe172eee418e9cc868d3e7169a641a3c")
FLICKR8K = (40455, "040c964935b9501fcf3322c186336ba57b8a465f387952dc68969c2deb652a17")


def coco_captions():
    path = DATA / "coco/captions_val2017.json"
    if not path.is_file():
        pytest.skip(f"the COCO captions are not here ({path})")
    return [row["caption"] for row in json.loads(path.read_text())["annotations"]]


def flickr8k_captions():
    path = DATA / "flickr8k/dataset_flickr8k.json"
    if not path.is_file():
        pytest.skip(f"the Flickr8k captions are not here ({path})")
    return [sentence["raw"] for image in json.loads(path.read_text())["images"] for sentence in image["sentences"]]


def digest(lines):
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()


def java(captions):
    pytest.importorskip("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("java is not on the PATH")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given = {number: [{"caption": caption}] for number, caption in enumerate(captions)}
    return [kept[0] for kept in PTBTokenizer().tokenize(given).values()]


@pytest.fixture(scope="module")
def difficult():
    return json.loads(gzip.decompress(FIXTURE.read_bytes()))


def test_difficult_strings_give_java_tokens(difficult):
    assert len(difficult["captions"]) >= 6000
    wrong = [
        (caption, expected, found)
        for caption, expected, found in zip(
            difficult["captions"], difficult["tokens"], tokenize(difficult["captions"]), strict=True
        )
        if expected != found
    ]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[0]}"


class NoMemory(dict):
    def __missing__(self, word):
        return None


def test_the_word_memory_changes_nothing(difficult, monkeypatch):
    captions = difficult["captions"][::3]
    remembered = tokenize(captions)
    monkeypatch.setattr(ptb, "_WORDS", NoMemory())
    assert tokenize(captions) == remembered


@pytest.mark.slow
def test_the_word_memory_changes_no_coco_caption(monkeypatch):
    captions = coco_captions()[:5000]
    remembered = tokenize(captions)
    monkeypatch.setattr(ptb, "_WORDS", NoMemory())
    assert tokenize(captions) == remembered


def test_every_coco_caption_gives_java_tokens():
    assert digest(tokenize(coco_captions())) == COCO


def test_every_flickr8k_caption_gives_java_tokens():
    assert digest(tokenize(flickr8k_captions())) == FLICKR8K


@pytest.mark.java
@pytest.mark.slow
def test_live_java_agrees(difficult):
    captions = difficult["captions"][:1500] + flickr8k_captions()[:2000]
    assert tokenize(captions) == java(captions)


@pytest.mark.java
def test_fixture_is_what_java_says_today(difficult):
    assert java(difficult["captions"]) == difficult["tokens"]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog doesn't bark.", "a man 's dog does n't bark"),
        ("I cannot; I'm gonna!", "i can not i 'm gon na"),
        ("23 3/4 St", "23\u00a03/4 st"),
        ("(left) of the T.V.", "-lrb- left -rrb- of the t.v."),
        ("A black-and-white \u201cphoto\u201d \u2014 50% \u20ac5", "a black-and-white photo 50 % $ 5"),
        ("", ""),
        (" ... ", ""),
        ("\U0001f600", ""),
    ],
)
def test_one_caption(caption, tokens):
    assert tokenize_caption(caption) == tokens
    assert tokenize([caption]) == [tokens]


@pytest.mark.parametrize("mark", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\u2028", "\u2029"])
def test_line_separators_never_split_a_caption(mark):
    assert tokenize([f"a dog{mark}runs fast", "a cat"]) == ["a dog runs fast", "a cat"]
    assert tokenize_caption(f"a dog{mark}runs") == "a dog runs"


def test_a_final_letter_depends_on_the_next_caption_as_in_java():
    assert tokenize(["reads K.", "A street"]) == ["reads k", "a street"]
    assert tokenize(["reads K.", "street"]) == ["reads k.", "street"]
    assert tokenize(["reads K.", "", "A street"]) == ["reads k", "", "a street"]
    assert tokenize(["reads K."]) == [tokenize_caption("reads K.")] == ["reads k."]


def test_dispatch_keeps_no_rule_from_a_character_it_can_start_with(difficult):
    missed = set()
    for caption in difficult["captions"][:1500]:
        shape = caption.translate(CLASSES)[:200] + "\n"
        for place, character in enumerate(shape[:-1]):
            tried = ptb_rules.RULES[ptb_rules.kind_of(character)]
            for _, rule in ptb_rules.ALL_RULES:
                if rule not in tried and rule.pattern.match(shape, place):
                    missed.add((rule.pattern.pattern[:60], character))
    assert not missed


def test_long_strings_end_in_time():
    for text in (
        "a" * 100_000,
        "a." * 20_000,
        "%" * 100_000,
        "a%" * 50_000,
        "'" * 20_000,
        "1" * 100_000,
        "a-" * 20_000,
        "a'" * 20_000,
        "\u00e9" * 100_000,
        "\u4e2d" * 100_000,
    ):
        start = time.process_time()
        tokenize_caption(text)
        assert time.process_time() - start < 5, text[:4]
