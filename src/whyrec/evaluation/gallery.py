"""Good and bad traces of a run, out of the table that `whyrec evaluate --traces` wrote.

Good: every fact is true and the item that came is in the list, the higher the better. Bad: most
facts untrue first; then those that are no whole trace; then those whose list does not hold what
came. Which ones are shown depends on the table alone.

    chosen, missing = gallery(run / "eval" / "traces.parquet", reader, dataset)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from whyrec.catalog.dataset import Dataset
from whyrec.evaluation.codes import name_of
from whyrec.evaluation.pages import trace_piece
from whyrec.evaluation.trace_view import TraceReader

_NEWEST, _LISTED = 6, 5
_COLUMNS = ("user", "history", "target", "trace", "well_formed", "named", "true", "false", "items")


@dataclass(frozen=True)
class Shown:
    """One trace of the gallery.

    Attributes:
        kind: good or bad.
        user: whose it is.
        verdict: what is good or bad about it, in a sentence.
        newest: names of the newest history items, oldest first, and how many older ones there are.
        text: the trace.
        html: the trace with its facts marked.
        untrue: its untrue facts.
        items: names of the first recommended items.
        target: name of the item that came.
    """

    kind: str
    user: str
    verdict: str
    newest: list[str]
    older: int
    text: str
    html: Markup
    untrue: list[str]
    items: list[str]
    target: str


def gallery(
    path: Path, reader: TraceReader, dataset: Dataset, *, each: int = 3
) -> tuple[list[Shown], list[str]]:
    """The best and the worst traces of a table, and what is missing, in sentences.

    Args:
        path: `run/eval/traces.parquet`.
        reader: of the model's words.
        dataset: the run's.
        each: how many of each kind.
    """
    if not path.exists():
        return [], [
            f"no traces at {path}; `whyrec evaluate MODEL --think both --traces` keeps them"
        ]
    try:
        rows = pq.read_table(path, columns=list(_COLUMNS)).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        return [], [f"{path} cannot be read ({error}); evaluate with --traces again"]
    known = [row for row in rows if _is_known(row, dataset)]
    missing = []
    if len(known) < len(rows):
        missing.append(f"{len(rows) - len(known)} traces are of items that this run lacks")
    good = [row for row in known if row["named"] and not row["false"] and _rank(row)]
    good.sort(key=lambda row: (_rank(row), -row["named"], row["user"]))
    worse = [row for row in known if row["false"] or not row["well_formed"] or not _rank(row)]
    worse.sort(key=lambda r: (-_untrue(r), r["well_formed"], _rank(r) or 99, r["user"]))
    if not good:
        missing.append("no trace is true in all it says and has what came in its list")
    chosen = [("good", row) for row in good[:each]] + [("bad", row) for row in worse[:each]]
    return [_shown(kind, row, reader, dataset) for kind, row in chosen], missing


def _shown(kind: str, row: Mapping[str, Any], reader: TraceReader, dataset: Dataset) -> Shown:
    history = [dataset.item(item) for item in row["history"]]
    items = [dataset.item(item) for item in row["items"]]
    names = [name_of(dataset.items[item]) for item in history]
    view = reader.read(row["trace"], history, items)
    rank = _rank(row)
    parts = [f"{row['true']} of {row['named']} facts true" if row["named"] else "no fact named"]
    if not row["well_formed"]:
        parts.append("not a whole trace")
    parts.append(f"what came is at rank {rank}" if rank else "what came is not in the list")
    return Shown(
        kind,
        row["user"],
        "; ".join(parts),
        names[-_NEWEST:],
        max(len(names) - _NEWEST, 0),
        row["trace"],
        trace_piece(view, names, prefix=""),
        list(row["false"]),
        [name_of(dataset.items[item]) for item in items[:_LISTED]],
        name_of(dataset.items[dataset.item(row["target"])]),
    )


def _rank(row: Mapping[str, Any]) -> int:
    """Rank of what came, from 1; 0 where the list lacks it."""
    return row["items"].index(row["target"]) + 1 if row["target"] in row["items"] else 0


def _untrue(row: Mapping[str, Any]) -> float:
    return len(row["false"]) / max(row["named"], 1)


def _is_known(row: Mapping[str, Any], dataset: Dataset) -> bool:
    return all(i in dataset.item_index for i in [*row["history"], *row["items"], row["target"]])
