"""Parquet files of captions. Such a file cannot be appended to, so captions are first written as JSON Lines beside it.

The lines are an output of their own, which survives a kill. At the end, the Parquet file is written from them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captioner.data.caption_formats import name_ending
from captioner.errors import SettingError
from captioner.images.names import escape_name, unescape_name, write_json
from captioner.runs.files import open_whole

ENDING = ".parquet"

ROWS = 10_000
"""Rows in memory at the same time, and in a row group of the file."""

KEY = b"captioner"
"""Entry of the file's metadata that records what made it."""


def is_parquet(path: Path | None) -> bool:
    """Return whether an output is a Parquet file, by its ending."""
    return path is not None and name_ending(path) == ENDING


def lines_file(path: Path) -> Path:
    """Return the file that contains the captions until the Parquet file is written."""
    return path.with_name(f"{path.name}.part.jsonl")


def write_parquet(lines: Path, path: Path, made_by: Mapping[str, Any]) -> None:
    """Write a Parquet file, whole or not at all, from JSON Lines; errors of images that have a caption are left out.

    Args:
        lines: the JSON Lines.
        path: the Parquet file, which is replaced.
        made_by: the settings that made the captions, for the metadata.

    Raises:
        OSError: the file cannot be written.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    one = pa.struct({"caption": pa.string(), "logprob": pa.float64(), "confidence": pa.float64()})
    columns = {"path": pa.string(), "caption": pa.string(), "logprob": pa.float64(), "error": pa.string()}
    if made_by.get("captions", 1) > 1:
        columns["captions"] = pa.list_(one)
    if made_by.get("show_tags"):
        columns["tags"] = pa.list_(pa.struct({"tag": pa.string(), "probability": pa.float64()}))
    schema = pa.schema(list(columns.items()), metadata={KEY: json.dumps(made_by).encode()})
    captioned = {row["path"] for row in read_rows(lines) if row["error"] is None}
    with open_whole(path, "wb") as file, ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        for row in read_rows(lines):
            if row["error"] is not None and row["path"] in captioned:
                continue
            rows.append(row | {"path": escape_name(row["path"]), "error": row["error"] and escape_name(row["error"])})
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))


def read_rows(lines: Path) -> Iterator[dict[str, Any]]:
    """Read JSON Lines, one row at a time."""
    with lines.open(encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a Parquet file that `write_parquet` wrote, with the names of images as they are on disk.

    Raises:
        SettingError: another program wrote the file, or it cannot be read.
    """
    with open_parquet(path) as file:
        for batch in file.iter_batches(ROWS):
            for row in batch.to_pylist():
                yield row | {"path": unescape_name(row["path"])}


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the settings that made a Parquet file.

    Raises:
        SettingError: as `read_parquet`.
    """
    with open_parquet(path) as file:
        return json.loads(file.schema_arrow.metadata[KEY])


def open_parquet(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        SettingError: as `read_parquet`.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    name = f"'{escape_name(str(path))}'"
    try:
        file = ParquetFile(path)
    except pa.ArrowInvalid:
        raise SettingError(f"{name} is not what captioner caption writes", "output") from None
    except OSError as error:
        raise SettingError(f"cannot read {name}: {error.strerror or error}", "output") from None
    if KEY not in (file.schema_arrow.metadata or {}):
        file.close()
        raise SettingError(f"{name} is not what captioner caption writes", "output")
    return file


def unpack_parquet(path: Path, lines: Path) -> None:
    """Write the rows of a Parquet file as JSON Lines, whole or not at all, so that they can be continued.

    Raises:
        SettingError: as `read_parquet`.
        OSError: the lines cannot be written.
    """
    with open_whole(lines) as file:
        for row in read_parquet(path):
            file.write(write_json(row) + "\n")
