"""Vocabularies of object tags: reading them, and finding tags in sentences."""

import json

import pytest

from captioner.tags import TagVocabulary, plural

WORDS = {"bear": ["bear", "bears"], "teddy bear": ["teddy bear", "Teddy-Bears", "teddy"], "dog": ["dog", "puppy"]}
VOCABULARY = TagVocabulary(tuple(WORDS), tuple(map(tuple, WORDS.values())))


@pytest.mark.parametrize(
    ("sentence", "tags"),
    [
        ("a dog beside a teddy bear", [2, 1]),
        ("A Puppy, a BEAR; and a dog.", [2, 0]),
        ("teddy-bears", [1]),
        ("a teddy and bears", [1, 0]),
        ("a teddy bear bear", [1, 0]),
        ("hotdogs and dogmas", []),
        ("the dog's_bear", [2, 0]),
        ("", []),
    ],
)
def test_tags_of_a_sentence(sentence, tags):
    assert VOCABULARY.find(sentence) == tags


def test_tags_may_share_a_phrase():
    shared = TagVocabulary(("handbag", "backpack"), (("handbag", "bag"), ("bag", "backpack")))
    assert shared.find("a backpack and a bag") == [1, 0]
    assert shared.find("a bag") == [0, 1]


def test_phrases_of_no_tag_hide_shorter_phrases(write):
    content = {"words": {"dog": ["dog"], "car": ["car"]}, "none": ["toy car", "Dog-House"]}
    vocabulary = TagVocabulary.read(write("words.json", content))
    assert vocabulary.find("a toy car and a dog house") == []
    assert vocabulary.find("a toy dog in a car") == [0, 1]
    assert TagVocabulary.from_dict(vocabulary.to_dict()) == vocabulary


def test_accents_in_either_form_are_letters():
    assert TagVocabulary.of_names(["café"]).find("im Cafe\u0301 sitzen") == [0]


def test_every_form_of_a_file_is_read(tmp_path, write):
    mapped = TagVocabulary.read(write("words.json", {"what": "tags", "words": WORDS}))
    assert mapped == VOCABULARY
    assert TagVocabulary.read(write("tags.json", VOCABULARY.to_dict() | {"threshold": 0.3})) == VOCABULARY
    listed = TagVocabulary.read(write("list.json", ["dog", "teddy bear"]))
    (tmp_path / "plain.txt").write_bytes("dog\r\n\r\n  teddy  bear \r\n".encode("utf-16"))
    assert TagVocabulary.read(tmp_path / "plain.txt") == listed
    assert listed.find("two teddy bears and dogs") == [1, 0]


def test_a_vocabulary_survives_json_with_sorted_keys():
    content = json.loads(json.dumps(VOCABULARY.to_dict(), sort_keys=True))
    assert TagVocabulary.from_dict(content) == VOCABULARY


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], "has no tag"),
        ({"words": {}}, "has no tag"),
        (["dog", "cat", "dog "], "the tag 'dog' twice"),
        (["dog", "Dog"], "the tag 'dog' and 'Dog' twice"),
        ({"words": {"dog": ["dog"]}, "none": ["Dog"]}, "the phrase 'dog' of the tag 'dog' is among those of no tag"),
        ({"words": {"dog": ["dog"]}, "none": "cat"}, "'none' of a vocabulary is not a list of phrases"),
        (["dog", " "], "a tag of the vocabulary has no name"),
        ({"words": {"dog": []}}, "the tag 'dog' has no phrase"),
        ({"words": {"dog": ["dog", "?!"]}}, "the phrase '\\?!' of the tag 'dog' contains no letter"),
        ({"names": ["dog"], "words": [["dog"], ["cat"]]}, "1 names and the phrases of 2"),
        ({"words": {"dog": "dog"}}, "a vocabulary is a list of names"),
        ({"dog": ["dog"]}, "a vocabulary is a list of names"),
        ([1, 2], "a vocabulary is a list of names"),
        (7, "a vocabulary is a list of names"),
    ],
)
def test_wrong_vocabularies_are_refused_with_their_file(write, content, fault):
    with pytest.raises(ValueError, match=f"words.json': .*{fault}"):
        TagVocabulary.read(write("words.json", content))


def test_json_that_is_cut_off_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text('{"words": {"dog": ["dog"]')
    with pytest.raises(ValueError, match="words.txt' is not JSON"):
        TagVocabulary.read(tmp_path / "words.txt")


@pytest.mark.parametrize(
    ("name", "many"),
    [("dog", "dogs"), ("bus", "buses"), ("puppy", "puppies"), ("toy", "toys"), ("wine glass", "wine glasses")],
)
def test_plurals(name, many):
    assert plural(name) == many


def test_words_of_the_coco_classes(shared):
    coco = TagVocabulary.read(shared / "coco" / "annotations" / "tag_words.json")
    assert len(coco) == 80
    assert [coco.names[n] for n in coco.find("A man rides a bike past a stop sign.")] == [
        "person",
        "bicycle",
        "stop sign",
    ]
