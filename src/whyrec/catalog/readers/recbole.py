"""RecBole atomic files (https://recbole.io/docs/user_guide/data/atomic_files.html).

Tab-separated, with a header of `name:type`: `X.inter` (user_id, item_id, rating, timestamp) and
`X.item` (item_id and texts under names that differ between data sets). A `release_year` joins the
title, "Toy Story (1995)", as MovieLens itself writes it.

    whyrec prepare FOLDER --run runs/NAME --format recbole
"""

import re
from collections.abc import Iterator
from pathlib import Path

from whyrec.catalog.dataset import Item
from whyrec.catalog.raw import Catalogue, Log, RawData, clean_id, distinct, plain_text
from whyrec.catalog.readers.tables import Columns
from whyrec.catalog.source import BadRows, Files, bare_name, check_readable, head, pick, read_lines

_TITLES = ("title", "movie_title", "item_name", "name", "app_name", "track_name")
_CATEGORIES = ("categories", "category", "class", "genre", "genres", "tags")
_YEAR = "release_year"


def find(files: list[Path], columns: Columns) -> Files | None:
    log = pick(
        [path for path in files if bare_name(path).endswith(".inter")],
        named=columns.interactions_file,
        among=files,
        key="interactions_file",
    )
    if log is None:
        return None
    names = _header(log)
    for name in ("user_id", "item_id"):
        if name not in names:
            raise ValueError(
                f"{log} has no column {name!r}; its columns are {', '.join(names) or '(none)'}: "
                "a RecBole file starts with a line such as user_id:token<TAB>item_id:token"
            )
    items = [path for path in files if bare_name(path) == bare_name(log)[: -len("inter")] + "item"]
    return Files(log, pick(items, named=columns.items_file, among=files, key="items_file"))


def read(files: Files, columns: Columns) -> RawData:
    del columns
    log = Log(clock="time" if "timestamp" in _header(files.log) else "order")
    for line, cells in _rows(files.log, log.bad):
        time, rating = cells.get("timestamp"), cells.get("rating")
        if fault := log.add(cells["user_id"], cells["item_id"], time, rating):
            log.bad.add(files.log, line, fault, cells)
    catalogue = Catalogue(frozenset(log.item_ids))
    if files.items is not None:
        if "item_id" not in (names := _header(files.items)):
            raise ValueError(
                f"{files.items} has no column 'item_id'; its columns are {', '.join(names)}"
            )
        for line, cells in _rows(files.items, catalogue.bad):
            if not (item_id := clean_id(cells["item_id"])):
                catalogue.bad.add(files.items, line, "no item id", cells)
                continue
            title, year = _first(cells, _TITLES), cells.get(_YEAR, "").strip()
            catalogue.add(
                Item(
                    item_id,
                    f"{title} ({year})" if title and re.fullmatch(r"\d{4}", year) else title,
                    plain_text(cells.get("brand")),
                    distinct(_sequence(_first(cells, _CATEGORIES))),
                    plain_text(cells.get("description")),
                )
            )
    return RawData(log, catalogue)


def _header(path: Path) -> list[str]:
    first = head(path, 1)
    if not first:
        check_readable(path)
    return [name.split(":")[0].strip() for name in "".join(first).split("\t") if name.strip()]


def _rows(path: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, str]]]:
    names = _header(path)
    for line, row in enumerate(read_lines(path), 1):
        cells = row.rstrip("\r\n").split("\t")
        if line == 1 or not any(cells):
            continue
        if len(cells) == len(names):
            yield line, dict(zip(names, cells, strict=True))
        else:
            bad.add(path, line, f"not {len(names)} fields", row)


def _first(cells: dict[str, str], names: tuple[str, ...]) -> str:
    return next((text for name in names if (text := plain_text(cells.get(name)))), "")


def _sequence(text: str) -> list[str]:
    """A token sequence: names in quotes and commas where they hold spaces, else words."""
    if text.startswith(("'", '"', "[")):
        return [name for _, name in re.findall(r"""(["'])(.+?)\1(?=\s*(?:,|\]|$))""", text)]
    return [name.strip() for name in (text.split(",") if ", " in text else text.split(" "))]
