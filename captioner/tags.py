"""Object tags: the classes that a captioner names in an image, and the words by which people name them.

Tags come from an image, where a head on the encoder's tokens predicts them, or from a sentence, which mentions them.

Letters: K tags.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from captioner.text_files import parse_json_text, read_text


@dataclass(frozen=True)
class TagVocabulary:
    """The tags of a captioner.

    Attributes:
        names: name of each of the K tags. The decoder reads this name.
        words: for each tag, the phrases that mention it in a sentence, in lower case, without punctuation. Several tags
            may share a phrase.
        none: phrases that mention no tag, although a shorter phrase in them does, such as `toy car`.

    Raises:
        ValueError: there is no tag, two tags have one name, a tag has no phrase, or a phrase of `none` is one of a tag.
    """

    names: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    none: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = tuple(" ".join(name.split()) for name in self.names)
        if not names:
            raise ValueError("the vocabulary has no tag")
        if len(names) != len(self.words):
            raise ValueError(f"the vocabulary has {len(names)} names and the phrases of {len(self.words)} tags")
        seen: dict[str, str] = {}
        for name in names:
            if not name:
                raise ValueError("a tag of the vocabulary has no name")
            if (earlier := seen.setdefault(name.casefold(), name)) is not name:
                both = f"'{name}'" if earlier == name else f"'{earlier}' and '{name}'"
                raise ValueError(f"the vocabulary has the tag {both} twice")
        words = []
        for name, phrases in zip(names, self.words, strict=True):
            plain = [" ".join(split_words(phrase)) for phrase in phrases]
            if not all(plain):
                wrong = phrases[plain.index("")]
                raise ValueError(f"the phrase '{wrong}' of the tag '{name}' contains no letter and no digit")
            if not plain:
                raise ValueError(f"the tag '{name}' has no phrase")
            words.append(tuple(dict.fromkeys(plain)))
        none = tuple(" ".join(split_words(phrase)) for phrase in self.none)
        known = {phrase: name for name, phrases in zip(names, words, strict=True) for phrase in phrases}
        for phrase in none:
            if phrase in known:
                raise ValueError(f"the phrase '{phrase}' of the tag '{known[phrase]}' is among those of no tag")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "words", tuple(words))
        object.__setattr__(self, "none", tuple(dict.fromkeys(filter(None, none))))

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> "TagVocabulary":
        """Make a vocabulary of names alone: a sentence mentions a tag by its name or its regular English plural."""
        return cls(tuple(names), tuple((name, plural(name)) for name in names))

    @classmethod
    def read(cls, path: str | Path) -> "TagVocabulary":
        """Read a vocabulary from a file.

        The file is JSON with `words`, which maps each name to its phrases, and perhaps `none`, a list of phrases that
        mention no tag; or a JSON list of names; or plain text with one name in each line. The file `tags.json` of a
        trained head can be read, too.

        Raises:
            ValueError: the file has another form, or `TagVocabulary` refuses its content.
            OSError: the file cannot be read.
        """
        path = Path(path)
        text = read_text(path)
        is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "[")
        content: Any = parse_json_text(text, path) if is_json else [line for line in text.splitlines() if line.strip()]
        try:
            if isinstance(content, list) and all(isinstance(name, str) for name in content):
                return cls.of_names(content)
            if isinstance(content, dict) and isinstance(content.get("words"), dict):
                content = content | {"names": list(content["words"]), "words": list(content["words"].values())}
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TagVocabulary":
        """Make a vocabulary of what `to_dict` returned; other entries are ignored.

        Raises:
            ValueError: the content has another form, or `TagVocabulary` refuses it.
        """
        names: Any
        words: Any
        names, words = (content.get(key) if isinstance(content, Mapping) else None for key in ("names", "words"))
        if not is_texts(names) or not isinstance(words, list | tuple) or not all(is_texts(w) for w in words):
            raise ValueError("a vocabulary is a list of names, or 'words', which maps each name to a list of phrases")
        if not is_texts(none := content.get("none", [])):
            raise ValueError("'none' of a vocabulary is not a list of phrases")
        return cls(tuple(names), tuple(tuple(phrases) for phrases in words), tuple(none))

    def to_dict(self) -> dict[str, list]:
        """Return the vocabulary as lists, for JSON: `names`, `words` in the same order, and `none` if there are any."""
        lists: dict[str, list] = {"names": list(self.names), "words": [list(phrases) for phrases in self.words]}
        return lists | ({"none": list(self.none)} if self.none else {})

    def find(self, sentence: str) -> list[int]:
        """Find the tags that a sentence mentions.

        Of the phrases that start at a word, the longest counts: `a teddy bear` mentions no bear. Case and punctuation
        do not matter.

        Returns:
            Numbers of the tags in order of their first mention, each once.
        """
        words, found, place = split_words(sentence), [], 0
        while place < len(words):
            for phrase, tags in self._phrases.get(words[place], ()):
                if words[place : place + len(phrase)] == phrase:
                    found += tags
                    place += len(phrase)
                    break
            else:
                place += 1
        return list(dict.fromkeys(found))

    @cached_property
    def _phrases(self) -> dict[str, list[tuple[list[str], list[int]]]]:
        """For each first word, the phrases that start with it, the longest first, and the tags of each phrase."""
        tags: dict[str, list[int]] = {phrase: [] for phrase in self.none}
        for number, phrases in enumerate(self.words):
            for phrase in phrases:
                tags.setdefault(phrase, []).append(number)
        index: dict[str, list[tuple[list[str], list[int]]]] = {}
        for phrase, numbers in tags.items():
            words = phrase.split()
            index.setdefault(words[0], []).append((words, numbers))
        for entries in index.values():
            entries.sort(key=lambda entry: -len(entry[0]))
        return index


def split_words(text: str) -> list[str]:
    """Split a text into its words in lower case: its runs of letters and digits."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)  # an accent of its own would split its word
    return re.findall(r"[^\W_]+", text.lower())


def plural(name: str) -> str:
    """Return the regular English plural of a name: `bus` gives `buses`, `puppy` gives `puppies`."""
    name = name.rstrip()
    if re.search(r"(s|x|z|ch|sh)$", name, re.IGNORECASE):
        return f"{name}es"
    if re.search(r"[^aeiou\W]y$", name, re.IGNORECASE):
        return f"{name[:-1]}ies"
    return f"{name}s"


def is_texts(value: Any) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
