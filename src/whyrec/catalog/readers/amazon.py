"""Amazon reviews of 2014, 2018 and 2023: a review file and a metadata file of one category.

* 2014 (https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html): `reviews_X.json.gz` or
  `reviews_X_5.json.gz` or `ratings_X.csv`, and `meta_X.json.gz`, whose lines are Python literals.
* 2018 (https://nijianmo.github.io/amazon/): `X.json.gz` or `X_5.json.gz`, and `meta_X.json.gz`;
  JSON lines with repeated asins and with HTML in their texts.
* 2023 (https://amazon-reviews-2023.github.io/): `X.jsonl.gz` and `meta_X.jsonl.gz`; reviews and
  items meet in `parent_asin`, the brand is `store`, times are in milliseconds.

    whyrec prepare FOLDER --run runs/NAME --format amazon2014
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whyrec.catalog.dataset import Item
from whyrec.catalog.raw import (
    Catalogue,
    Log,
    RawData,
    clean_html,
    clean_id,
    distinct,
    flatten,
)
from whyrec.catalog.readers.tables import Columns
from whyrec.catalog.source import (
    BadRows,
    Files,
    bare_name,
    head,
    head_object,
    pick,
    read_lines,
    read_objects,
)

_RATINGS = re.compile(r"ratings_.*\.csv")  # user,item,rating,time without a header
_BYLINE = re.compile(r"^\s*by\s*\n")  # some brands of 2018 are "by\n    \n    Acme"
_PAGE_SCRIPT = "getTime()"  # some titles of 2018 are the page's JavaScript


def find_2014(files: list[Path], columns: Columns) -> Files | None:
    reviews, metadata = _kinds(files)
    ratings = [path for path in files if _RATINGS.fullmatch(bare_name(path)) and head(path)]
    logs = [path for path, keys in reviews.items() if "verified" not in keys] + ratings
    if any(kind == "json" for kind in metadata.values()):
        return None
    return _choose(logs, [p for p, kind in metadata.items() if kind == "literal"], files, columns)


def find_2018(files: list[Path], columns: Columns) -> Files | None:
    reviews, metadata = _kinds(files)
    items = [path for path, kind in metadata.items() if kind == "json"]
    logs = [path for path, keys in reviews.items() if items or "verified" in keys]
    return _choose(logs, items, files, columns)


def find_2023(files: list[Path], columns: Columns) -> Files | None:
    reviews: list[Path] = []
    items: list[Path] = []
    for path in files:
        keys = head_object(path) or {}
        if "parent_asin" in keys:
            (reviews if "user_id" in keys else items).append(path)
    return _choose(reviews, items, files, columns)


def read_2014_2018(files: Files, columns: Columns) -> RawData:
    """Both years name their fields alike; the metadata's syntax differs and is told by its look."""
    del columns  # the fields are fixed
    log = Log()
    if _RATINGS.fullmatch(bare_name(files.log)):
        _read_ratings(files.log, log)
    else:
        _read_reviews(files.log, log, "reviewerID", "asin", "unixReviewTime", "overall")
    catalogue = Catalogue(frozenset(log.item_ids))
    if files.items is not None:
        rows = (
            _literals(files.items, catalogue.bad)
            if _is_literal(files.items)
            else read_objects(files.items, catalogue.bad)
        )
        for line, row, record in rows:
            item_id = clean_id(record.get("asin"))
            if not item_id:
                catalogue.bad.add(files.items, line, "no asin", row)
                continue
            title = str(record.get("title") or "")
            brand = _BYLINE.sub("", str(record.get("brand") or ""))
            categories = record.get("categories") or record.get("category")
            catalogue.add(
                Item(
                    item_id,
                    "" if _PAGE_SCRIPT in title else clean_html(title),
                    clean_html(brand),
                    distinct(map(clean_html, flatten(categories))),
                    clean_html(record.get("description")),
                )
            )
    return RawData(log, catalogue)


def read_2023(files: Files, columns: Columns) -> RawData:
    del columns
    log = Log(ticks_per_second=1000)
    _read_reviews(files.log, log, "user_id", "parent_asin", "timestamp", "rating")
    catalogue = Catalogue(frozenset(log.item_ids))
    if files.items is not None:
        for line, row, record in read_objects(files.items, catalogue.bad):
            item_id = clean_id(record.get("parent_asin"))
            if not item_id:
                catalogue.bad.add(files.items, line, "no parent_asin", row)
                continue
            catalogue.add(
                Item(
                    item_id,
                    clean_html(record.get("title")),
                    clean_html(record.get("store")),
                    distinct(map(clean_html, flatten(record.get("categories")))),
                    clean_html(record.get("description")) or clean_html(record.get("features")),
                )
            )
    return RawData(log, catalogue)


def _kinds(files: list[Path]) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """Review files with the fields of their first review, metadata files with their syntax."""
    reviews, metadata = {}, {}
    for path in files:
        keys = head_object(path)
        if keys is not None and "asin" in keys and "parent_asin" not in keys:
            if "reviewerID" in keys:
                reviews[path] = keys
            else:
                metadata[path] = "json"
        elif keys is None and _is_literal(path):
            metadata[path] = "literal"
    return reviews, metadata


def _is_literal(path: Path) -> bool:
    first = head(path, 1)
    return bool(first) and first[0].startswith("{'") and "'asin'" in first[0]


def _choose(
    logs: list[Path], items: list[Path], files: list[Path], columns: Columns
) -> Files | None:
    log = pick(logs, named=columns.interactions_file, among=files, key="interactions_file")
    if log is None:
        return None
    return Files(log, pick(items, named=columns.items_file, among=files, key="items_file"))


def _read_reviews(path: Path, log: Log, user: str, item: str, time: str, rating: str) -> None:
    for line, row, record in read_objects(path, log.bad):
        fault = log.add(record.get(user), record.get(item), record.get(time), record.get(rating))
        if fault:
            log.bad.add(path, line, fault, row)


def _read_ratings(path: Path, log: Log) -> None:
    for line, row in enumerate(read_lines(path), 1):
        cells = row.rstrip("\r\n").split(",")
        if len(cells) != 4:
            log.bad.add(path, line, "not 4 fields", row)
        elif fault := log.add(cells[0], cells[1], cells[3], cells[2]):
            log.bad.add(path, line, fault, row)


def _literals(path: Path, bad: BadRows) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Lines that are Python dictionaries; `literal_eval` builds values and runs no code."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = ast.literal_eval(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield number, line, record
        else:
            bad.add(path, number, "not a Python literal", line)
