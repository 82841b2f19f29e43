"""Read sentences without images: JSON Lines with a caption in each line, a table, or plain text; gzip, too.

In plain text, each line is a sentence. A file is JSON Lines or a table by the ending of its name, before `.gz`, or JSON
Lines if its first line is a JSON object.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from captioner.data.caption_table import one_line
from captioner.data.captions import read_captions_of
from captioner.data.columns import CAPTION_NAMES, find_caption_column
from captioner.data.records import OnBad
from captioner.data.row_files import LINE_ENDINGS, Rows, first_line, is_object, parse_lines, parse_table
from captioner.errors import SettingError
from captioner.text_files import read_text

logger = logging.getLogger(__name__)

LONGEST = 1000
"""Characters in a sentence above which it is left out: a longer line is a page, or a file without line ends."""


def read_sentences(paths: Sequence[str | Path], column: str = CAPTION_NAMES[0], on_bad: OnBad = "skip") -> list[str]:
    """Read the sentences of files, in order.

    Lines without a sentence and lines of more than `LONGEST` characters are left out, with one warning for each file.

    Args:
        paths: the files.
        column: name of the column of sentences in JSON Lines and tables.
        on_bad: `skip`, or `refuse` to raise an error where a line would be left out.

    Raises:
        ValueError: a file has another form, or contains no sentence.
        SettingError: it has no column of sentences; or a line cannot be used, and `on_bad` is `refuse`.
        OSError: a file cannot be read.
    """
    sentences: list[str] = []
    for path in map(Path, paths):
        texts, empty, unreadable = lines_of(path, column)
        usable = [one_line(text) for text in texts if len(text) <= LONGEST]
        kinds = {
            "empty lines": empty,
            "unreadable lines": unreadable,
            f"lines of more than {LONGEST} characters": len(texts) - len(usable),
        }
        if left_out := ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count):
            fact = f"'{path}': {len(usable)} sentences; left out: {left_out}"
            if on_bad == "refuse":
                raise SettingError(fact, "on_bad")
            logger.warning(fact)
        if not usable:
            raise ValueError(f"'{path}' contains no sentence")
        sentences += usable
    return sentences


def lines_of(path: Path, column: str) -> tuple[list[str], int, int]:
    """Return the texts of a file, and the numbers of its lines that are empty and that are not text.

    Raises:
        ValueError: the file is JSON, but not JSON Lines, or a line is malformed.
        SettingError: there is no column of sentences.
    """
    text = read_text(path)
    ending = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    lines = is_object(first_line(text)) and (ending != ".json" or "\n" in text.strip())
    if ending in LINE_ENDINGS or lines:
        rows = parse_lines(text, path)
    elif ending in (".csv", ".tsv"):
        rows = parse_table(text, path)
    elif ending == ".json" or text.lstrip()[:1] == "{":
        raise ValueError(f"'{path}' is JSON, and neither JSON Lines, with an object in each line, nor plain text")
    else:
        every = text.splitlines()
        full = [line for line in every if line.strip()]
        return full, len(every) - len(full), 0
    return column_of(rows, column, path)


def column_of(rows: Rows, column: str, path: Path) -> tuple[list[str], int, int]:
    """Return the texts in the column of sentences, and the numbers of rows without text and with something else.

    Raises:
        SettingError: there is no such column, or several fit.
    """
    names = rows.names()
    try:
        found = find_caption_column(names, column)
    except ValueError as error:
        raise SettingError(f"'{path}': {error}", "caption_column") from None
    if found is None and rows.rows:
        fact = f"'{path}' has no column '{column}', only {', '.join(map(str, names))[:200]}"
        raise SettingError(fact, "caption_column")
    captions = [read_captions_of(row.get(str(found))) for row in rows.rows]
    texts = [text for part in captions for text in part.texts]
    return texts, sum(part.empty for part in captions), sum(part.unreadable for part in captions)
