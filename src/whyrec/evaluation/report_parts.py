"""What a run's report is made of: sections, tables and plots, and numbers as they stand in them.

A section has a few sentences, notes on what is missing, tables, and plots that stand beside the
tables of what they show. One template makes HTML of them, another Markdown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from whyrec.evaluation.curves import Row
from whyrec.evaluation.figures import Figure, svg
from whyrec.evaluation.tables import collect, short


class Table(NamedTuple):
    """A table; the first cell of each row names the row."""

    caption: str
    header: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Plot:
    """An SVG with what it shows, in a sentence."""

    svg: Markup
    caption: str


@dataclass
class Section:
    """One part of the report.

    Attributes:
        id, title: of its heading.
        text: paragraphs.
        missing: what is not there and how to make it, in sentences.
        plots: only in HTML; the tables say the same.
        tables: of figures.
        traces: of the gallery.
    """

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)


def plot(figure: Figure, caption: str) -> Plot:
    return Plot(Markup(svg(figure, label=caption)), caption)


def interval(row: Row | None) -> str | None:
    """`.1115 [.0990, .1240]`, without the interval where none was recorded."""
    if row is None:
        return None
    text = f"{row.value:.4f}"
    if row.low is not None and row.high is not None:
        text += f" [{row.low:.4f}, {row.high:.4f}]"
    return short(text)


def signed(records: Sequence[Mapping], key: str) -> str | None:
    values = means(records, key)
    if key not in values:
        return None
    text = f"{values[key]:+.4f}"
    if f"{key}/low" in values:
        text += f" [{values[f'{key}/low']:+.4f}, {values[f'{key}/high']:+.4f}]"
    return short(text)


def means(records: Sequence[Mapping], prefix: str) -> dict[str, float]:
    """Figures whose key begins so, each the mean over the records that have it."""
    found = collect(records).items()
    return {key: sum(values) / len(values) for key, values in found if key.startswith(prefix)}


def read_json(path: Path) -> Any | None:
    """A JSON file; None where it is missing.

    Raises:
        ValueError: when it is damaged.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; run the stage that wrote it again") from None
