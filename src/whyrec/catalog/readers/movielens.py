"""MovieLens as GroupLens publishes it (https://grouplens.org/datasets/movielens/).

* 100K: `u.data` (tabs) and `u.item` (`|`, one flag a genre)
* 1M, 10M: `ratings.dat` and `movies.dat` (`::`)
* 20M, 25M, 32M, latest: `ratings.csv` and `movies.csv`

Texts are UTF-8 in some releases and Latin-1 in others.

    whyrec prepare ml-1m --run runs/ml-1m --format movielens
"""

from collections.abc import Iterator
from pathlib import Path

from whyrec.catalog.dataset import Item
from whyrec.catalog.raw import Catalogue, Log, RawData, clean_id, distinct, plain_text
from whyrec.catalog.readers.tables import Columns, csv_rows
from whyrec.catalog.source import BadRows, Files, bare_name, head, pick, read_lines, utf8_or_latin1

_ITEM_FILES = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}
_GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_NO_GENRES = "(no genres listed)"


def find(files: list[Path], columns: Columns) -> Files | None:
    logs = [path for path in files if bare_name(path) in _ITEM_FILES and _looks_right(path)]
    log = pick(logs, named=columns.interactions_file, among=files, key="interactions_file")
    if log is None:
        return None
    items = [path for path in files if bare_name(path) == _ITEM_FILES[bare_name(log)]]
    return Files(log, pick(items, named=columns.items_file, among=files, key="items_file"))


def read(files: Files, columns: Columns) -> RawData:
    del columns
    log = Log()
    for line, cells in _cells(files.log, 4, log.bad):
        if fault := log.add(cells[0], cells[1], cells[3], cells[2]):
            log.bad.add(files.log, line, fault, cells)
    catalogue = Catalogue(frozenset(log.item_ids))
    if files.items is not None:
        release_100k = bare_name(files.items) == "u.item"
        width = 5 + len(_GENRES_100K) if release_100k else 3
        for line, cells in _cells(files.items, width, catalogue.bad):
            item_id = clean_id(cells[0])
            if not item_id:
                catalogue.bad.add(files.items, line, "no item id", cells)
                continue
            if release_100k:
                flags = zip(_GENRES_100K, cells[5:], strict=True)
                genres = [genre for genre, flag in flags if flag.strip() == "1"]
            else:
                genres = plain_text(cells[2]).split("|")
            genres = [genre for genre in genres if genre not in (_NO_GENRES, "unknown")]
            catalogue.add(Item(item_id, plain_text(cells[1]), "", distinct(genres)))
    return RawData(log, catalogue)


def _looks_right(path: Path) -> bool:
    first = "".join(head(path, 1))
    if bare_name(path) == "ratings.csv":
        return first.startswith("userId,movieId,rating,timestamp")
    return len(first.split("\t" if bare_name(path) == "u.data" else "::")) == 4


def _cells(path: Path, width: int, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """Rows of `width` cells; the separator follows from the file's name."""
    name = bare_name(path)
    if name.endswith(".csv"):
        for line, _, row in csv_rows(path, bad):
            yield line, list(row.values())
        return
    separator = {"u.data": "\t", "u.item": "|"}.get(name, "::")
    for line, text in enumerate(read_lines(path, utf8_or_latin1), 1):
        cells = text.rstrip("\r\n").split(separator)
        if len(cells) == width:
            yield line, cells
        elif any(cells):
            bad.add(path, line, f"not {width} fields", text)
