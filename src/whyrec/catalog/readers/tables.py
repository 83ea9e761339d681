"""Your own data: CSV/TSV, Parquet or JSON lines with named columns.

The log needs a user and an item column. Time comes from the timestamp column (numbers, or Parquet
timestamps), else from a `position` column that numbers each user's events, else from the order of
the rows. The item file needs only the item column; it may be of another kind than the log.

    whyrec prepare FOLDER --run runs/NAME                 # interactions.csv and items.csv
    whyrec prepare FOLDER --run runs/NAME --set user_column=customer --set item_column=sku
"""

import ast
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from whyrec.catalog.dataset import Item
from whyrec.catalog.raw import (
    Catalogue,
    Log,
    RawData,
    clean_id,
    distinct,
    flatten,
    plain_text,
)
from whyrec.catalog.source import (
    BadRows,
    Files,
    bare_name,
    check_readable,
    head,
    head_object,
    pick,
    read_lines,
    read_objects,
)

KINDS = ("csv", "parquet", "jsonl")
_DEFAULT_TIMESTAMP = "timestamp"
_POSITION = "position"


@dataclass
class Columns:
    """Which files to read and what their columns are called; other formats use only the files."""

    interactions_file: str = ""  # needed when several files of the source could be the log
    items_file: str = ""
    user_column: str = "user_id"
    item_column: str = "item_id"
    timestamp_column: str = _DEFAULT_TIMESTAMP
    rating_column: str = "rating"
    title_column: str = "title"
    brand_column: str = "brand"
    categories_column: str = "categories"
    description_column: str = "description"
    category_separator: str = "|"  # inside a text column; lists are taken as they are

    @property
    def texts(self) -> tuple[str, str, str, str]:
        return (
            self.title_column,
            self.brand_column,
            self.categories_column,
            self.description_column,
        )


def find(files: list[Path], columns: Columns, *, kind: str = "") -> Files | None:
    """The log (of one kind, if given) and the item file; None when there is no such table.

    Raises:
        ValueError: when there are tables but none has the user and item columns.
    """
    kinds = {path: found for path in files if (found := table_kind(path, named=kind))}
    names = {path: column_names(path, kinds[path]) for path in kinds}
    tables = [path for path in kinds if not kind or kinds[path] == kind]
    if not tables:
        return None
    needed = [columns.user_column, columns.item_column]
    logs = [path for path in tables if set(needed) <= set(names[path])]
    if columns.interactions_file:
        logs = tables
    elif not logs:  # the most likely one, to say which column it lacks
        logs = [path for path in tables if _stem(path) == "interactions"] or tables[:1]
    log = pick(
        logs,
        named=columns.interactions_file,
        among=files,
        key="interactions_file",
        prefer=lambda path: _stem(path) == "interactions",
    )
    if log is None:
        return None
    for key, name in zip(("user_column", "item_column"), needed, strict=True):
        _require(log, names[log], name, key)
    items = pick(
        [
            path
            for path in kinds
            if path != log
            and (
                columns.items_file
                or _stem(path) == "items"
                or (
                    columns.item_column in names[path]
                    and columns.user_column not in names[path]
                    and set(columns.texts) & set(names[path])
                )
            )
        ],
        named=columns.items_file,
        among=files,
        key="items_file",
        prefer=lambda path: _stem(path) == "items",
    )
    if items is not None:
        _require(items, names[items], columns.item_column, "item_column")
    return Files(log, items)


def read(files: Files, columns: Columns) -> RawData:
    """Read a log and an item file with named columns."""
    log = _read_log(files.log, columns)
    wanted = frozenset(log.item_ids)
    if files.items is None:
        return RawData(log, Catalogue(wanted))
    return RawData(log, read_item_table(files.items, columns, wanted=wanted))


def read_item_table(
    path: Path, columns: Columns, *, wanted: frozenset[str] | None = None
) -> Catalogue:
    """Read an item file, of all items or of the wanted ids; absent texts are empty.

    Raises:
        ValueError: when the file is no table or has no item column.
    """
    kind = table_kind(path, named="csv")
    if kind is None:
        raise ValueError(f"{path} is not a CSV, Parquet or JSON-lines file of items")
    _require(path, column_names(path, kind), columns.item_column, "item_column")
    catalogue = Catalogue(wanted)
    for line, row, cells in _rows(path, kind, catalogue.bad):
        item_id = clean_id(cells.get(columns.item_column))
        if not item_id:
            catalogue.bad.add(path, line, "no item id", row)
            continue
        catalogue.add(
            Item(
                item_id,
                plain_text(cells.get(columns.title_column)),
                plain_text(cells.get(columns.brand_column)),
                _categories(cells.get(columns.categories_column), columns.category_separator),
                plain_text(cells.get(columns.description_column)),
            )
        )
    return catalogue


def table_kind(path: Path, *, named: str = "") -> Literal["csv", "parquet", "jsonl"] | None:
    """Guess the kind of table from name and content; `named` lets any text with a header be CSV."""
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    if head_object(path) is not None:
        return "jsonl"
    name = bare_name(path)
    if name.endswith((".csv", ".tsv")):
        return "csv"
    if name.endswith((".jsonl", ".parquet")):
        return "jsonl" if name.endswith(".jsonl") else "parquet"
    lines = head(path, 1)
    if named == "csv" and lines and _delimiter(path, lines[0]) in lines[0]:
        return "csv"
    return None


def column_names(path: Path, kind: str) -> list[str]:
    """The columns of a table: the header, or the keys of the first object."""
    if kind == "parquet":
        return _parquet(path).schema_arrow.names
    lines = head(path, 1)
    if not lines:
        check_readable(path)
        return []
    if kind == "jsonl":
        return list(head_object(path) or {})
    return [name.strip() for name in next(csv.reader(lines, delimiter=_delimiter(path, lines[0])))]


def _read_log(path: Path, columns: Columns) -> Log:
    kind = table_kind(path, named="csv")
    assert kind is not None
    names = column_names(path, kind)
    time: str | None = columns.timestamp_column
    log = Log(ticks_per_second=_ticks_per_second(path, kind, columns.timestamp_column))
    if time not in names:
        if time != _DEFAULT_TIMESTAMP:
            _require(path, names, columns.timestamp_column, "timestamp_column")
        time = _POSITION if _POSITION in names else None
        log = Log(clock="position" if time else "order")
    user, item, rating = columns.user_column, columns.item_column, columns.rating_column
    for line, row, cells in _rows(path, kind, log.bad):
        timestamp = cells.get(time) if time else None
        if fault := log.add(cells.get(user), cells.get(item), timestamp, cells.get(rating)):
            log.bad.add(path, line, fault, row)
    return log


def _rows(path: Path, kind: str, bad: BadRows) -> Iterator[tuple[int, object, dict[str, Any]]]:
    """Rows as (line or row number, what to quote, cells by column)."""
    if kind == "jsonl":
        yield from read_objects(path, bad)
    elif kind == "parquet":
        number = 0
        for batch in _parquet(path).iter_batches():
            for cells in batch.to_pylist():
                number += 1
                yield number, cells, cells
    else:
        yield from csv_rows(path, bad)


def csv_rows(path: Path, bad: BadRows) -> Iterator[tuple[int, object, dict[str, str]]]:
    """Rows of a CSV file with a header as (line, what to quote, cells by column)."""
    first = head(path, 1)
    lines = csv.reader(read_lines(path), delimiter=_delimiter(path, "".join(first)), strict=True)
    names: list[str] | None = None
    while True:
        start = lines.line_num + 1
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(error):
                raise ValueError(
                    f'{path} line {start} opens a quote (") that is never closed; '
                    "close it, or double the quotes that are part of a text"
                ) from None
            bad.add(path, start, "misplaced quote", "")
            continue
        if not any(cells):
            continue
        if names is None:
            names = [name.strip() for name in cells]
        elif len(cells) != len(names):
            bad.add(path, start, f"not {len(names)} fields", cells)
        else:
            yield start, cells, dict(zip(names, cells, strict=True))


def _delimiter(path: Path, header: str) -> str:
    if bare_name(path).endswith(".tsv"):
        return "\t"
    return max(",\t;|", key=header.count)


def _categories(value: Any, separator: str) -> tuple[str, ...]:
    if isinstance(value, str):
        if value.startswith("["):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = _json_or_text(value)
        else:
            value = value.split(separator) if separator else [value]
    return distinct(plain_text(name) for name in flatten(value))


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from None


def _ticks_per_second(path: Path, kind: str, timestamp_column: str) -> int:
    """Parquet timestamps are sorted to the microsecond; numbers are seconds as they stand."""
    if kind != "parquet":
        return 1
    schema = _parquet(path).schema_arrow
    index = schema.get_field_index(timestamp_column)
    return 1_000_000 if index >= 0 and pa.types.is_temporal(schema.types[index]) else 1


def _require(path: Path, names: list[str], name: str, key: str) -> None:
    if not names:
        raise ValueError(f"{path} is empty; it needs at least a column {name!r}")
    if name not in names:
        raise ValueError(
            f"{path} has no column {name!r}; its columns are {', '.join(names)}: "
            f"say which one it is with --set {key}=NAME"
        )


def _stem(path: Path) -> str:
    return bare_name(path).split(".")[0]
