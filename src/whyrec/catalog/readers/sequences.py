"""Sequence files as P5 and S3-Rec use them: one line a user, `user item item …`, oldest first.

Item texts come from a JSON-lines file with item_id, title, brand, categories and description.
There is no time, so only the leave-one-out split makes sense.

    whyrec prepare FOLDER --run runs/NAME --format sequences
"""

import re
from pathlib import Path

from whyrec.catalog.raw import Catalogue, Log, RawData
from whyrec.catalog.readers.tables import Columns, read_item_table
from whyrec.catalog.source import Files, bare_name, head, head_object, pick, read_lines


def find(files: list[Path], columns: Columns) -> Files | None:
    log = pick(
        [path for path in files if _looks_right(path)],
        named=columns.interactions_file,
        among=files,
        key="interactions_file",
        prefer=lambda path: bare_name(path).startswith("sequential_data"),
    )
    if log is None:
        return None
    items = [path for path in files if columns.item_column in (head_object(path) or {})]
    return Files(log, pick(items, named=columns.items_file, among=files, key="items_file"))


def read(files: Files, columns: Columns) -> RawData:
    log = Log(clock="position")
    for line, row in enumerate(read_lines(files.log), 1):
        user, *items = row.split() or [""]
        if user and not items:
            log.bad.add(files.log, line, "a user without items", row)
        for position, item in enumerate(items):
            log.add(user, item, position)
    wanted = frozenset(log.item_ids)
    if files.items is None:
        return RawData(log, Catalogue(wanted))
    return RawData(log, read_item_table(files.items, columns, wanted=wanted))


def _looks_right(path: Path) -> bool:
    """Words with digits in them, between single spaces: prose and tables are something else."""
    lines = head(path)
    return bool(lines) and all(
        re.fullmatch(r"[\w.:-]*\d[\w.:-]*(?: [\w.:-]*\d[\w.:-]*)+ ?", line) for line in lines
    )
