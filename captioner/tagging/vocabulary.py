"""The vocabulary of a tag head: files, classes of labels and frequent nouns of captions, joined."""

from collections.abc import Iterable, Sequence

from captioner.errors import SettingError
from captioner.tagging.words import frequent_nouns
from captioner.tags import TagVocabulary

WORDS = "words:"
"""Start of a source that stands for the frequent nouns of the captions; their number follows."""


def make_vocabulary(sources: Sequence[str], captions: Iterable[str], classes: Sequence[str] = ()) -> TagVocabulary:
    """Join the sources of a vocabulary.

    Args:
        sources: files that `TagVocabulary.read` reads, and `words:N` for the N most frequent nouns of the captions.
            Before these stand the classes that no file names.
        captions: the captions.
        classes: classes of the labels.

    Raises:
        SettingError: there is no source, or `words:` has no number or no captions.
        ValueError: a file cannot be read, or two tags have one name.
    """
    files = [TagVocabulary.read(source) for source in sources if not source.startswith(WORDS)]
    counts = [count_words(source) for source in sources if source.startswith(WORDS)]
    if not sources:
        raise SettingError("no vocabulary: name a file, or words:300 for the 300 most frequent nouns of the captions")
    if counts:
        named = {name.casefold() for part in files for name in part.names}
        if further := [name for name in classes if name.casefold() not in named]:
            files.append(TagVocabulary.of_names(further))
        known = {phrase for part in files for phrases in part.words for phrase in phrases}
        known |= {name for part in files for name in part.names}
        if nouns := frequent_nouns(captions, sum(counts), known):
            files.append(TagVocabulary(tuple(nouns), tuple(map(tuple, nouns.values()))))
        elif sum(counts):
            raise SettingError("the captions have no nouns for the vocabulary", "captions")
    return TagVocabulary(
        names=tuple(name for part in files for name in part.names),
        words=tuple(phrases for part in files for phrases in part.words),
        none=tuple(phrase for part in files for phrase in part.none),
    )


def count_words(source: str) -> int:
    """Return the number in `words:300`.

    Raises:
        SettingError: there is none.
    """
    number = source.removeprefix(WORDS)
    if not number.isdecimal() or not number.isascii():
        raise SettingError(f"'{source}' is not of the form words:NUMBER, such as words:300", "vocabulary")
    return int(number)
