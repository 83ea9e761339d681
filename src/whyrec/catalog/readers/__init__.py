"""The formats of raw data: which files each one reads, and how to tell them apart.

To add a format, write a module with `find` (the files, or None when they are of another format)
and `read`, and add its line to `FORMATS`; detection tries them in this order.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from whyrec.catalog.raw import RawData
from whyrec.catalog.readers import amazon, movielens, recbole, sequences, tables
from whyrec.catalog.readers.tables import Columns
from whyrec.catalog.source import Files, check_readable, head, list_files


class Format(NamedTuple):
    find: Callable[[list[Path], Columns], Files | None]
    read: Callable[[Files, Columns], RawData]
    expects: str


FORMATS: dict[str, Format] = {
    "recbole": Format(recbole.find, recbole.read, "NAME.inter and NAME.item"),
    "movielens": Format(
        movielens.find, movielens.read, "u.data, ratings.dat or ratings.csv of a MovieLens release"
    ),
    "amazon2023": Format(
        amazon.find_2023, amazon.read_2023, "reviews and metadata as JSON lines with parent_asin"
    ),
    "amazon2018": Format(
        amazon.find_2018, amazon.read_2014_2018, "reviews and metadata as JSON lines with asin"
    ),
    "amazon2014": Format(
        amazon.find_2014,
        amazon.read_2014_2018,
        "reviews as JSON lines with reviewerID and asin, metadata as Python literals",
    ),
    "sequences": Format(
        sequences.find, sequences.read, "lines of `user item item …` between single spaces"
    ),
    "csv": Format(
        partial(tables.find, kind="csv"), tables.read, "a CSV or TSV file with a header line"
    ),
    "parquet": Format(partial(tables.find, kind="parquet"), tables.read, "a Parquet file"),
    "jsonl": Format(partial(tables.find, kind="jsonl"), tables.read, "a file of JSON lines"),
}


def locate(source: Path, columns: Columns, *, format_name: str = "") -> tuple[str, Files]:
    """The format of a folder or log file and the files to read.

    Raises:
        ValueError: when there is nothing to read, the format cannot be told, or the files are not
            of the format that was named.
    """
    if format_name and format_name not in FORMATS:
        raise ValueError(f"there is no format {format_name!r}; use one of {', '.join(FORMATS)}")
    files = list_files(source)
    if format_name:
        found = FORMATS[format_name].find(files, columns)
        if found is None:
            raise ValueError(
                f"{source} does not look like {format_name} ({FORMATS[format_name].expects}); "
                f"{_looks(source, files, columns)}"
            )
    else:
        format_name, found = _detect(files, columns)
    if found is None:
        for path in files:
            if not head(path):
                check_readable(path)
        names = ", ".join(path.name for path in files[:6])
        raise ValueError(
            f"could not tell the format of {source} (files: {names}); "
            f"name it with --format, one of {', '.join(FORMATS)}"
        )
    if columns.items_file and found.items is None:
        raise ValueError(f"items_file={columns.items_file} is not an item file of {format_name}")
    return format_name, found


def _detect(files: list[Path], columns: Columns) -> tuple[str, Files | None]:
    for name, candidate in FORMATS.items():
        if name not in tables.KINDS:
            found = candidate.find(files, columns)
            if found is not None:
                return name, found
    found = tables.find(files, columns)  # of any kind: the log decides
    if found is None:
        return "", None
    kind = tables.table_kind(found.log)
    assert kind is not None
    return kind, found


def _looks(source: Path, files: list[Path], columns: Columns) -> str:
    """What the files look like instead, for a message."""
    try:
        detected, _ = _detect(files, columns)
    except ValueError:
        detected = ""
    if detected:
        return f"it looks like {detected}: leave out --format, or name that one"
    if source.is_file():
        files = [source]
    first = next((line for path in files for line in head(path, 1)), "")
    return f"{files[0].name} starts with {first[:80]!r}"
