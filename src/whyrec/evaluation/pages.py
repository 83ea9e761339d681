"""HTML of what is looked at: one style for the report and the notebooks, made of the same pieces.

Templates lie in `templates/`; all that comes from data is escaped by Jinja. Nothing asks for
anything outside of the page. Colours are variables with a light and a dark value; what they say is
said by a sign or a word too.

    Card(*view_pieces(inspector, inspector.look(history, think=True)))      # in a notebook
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from whyrec.evaluation.beam_tree import Branch
from whyrec.evaluation.inspection import Change, Inspector, View
from whyrec.evaluation.trace_view import ClaimView, TitleView, TraceView

TEMPLATES = Path(__file__).parent / "templates"
# Each pair of a text's colour and its ground has a contrast of 4.5 or more (WCAG 2.2, AA).
LIGHT = {
    "paper": "#ffffff",
    "panel": "#f3f5f8",
    "ink": "#1b2430",
    "soft": "#566271",
    "line": "#d5dbe3",
    "ours": "#0a5bb8",
    "other": "#a34a06",
    "third": "#1a7340",
    "true": "#14603a",
    "true-ground": "#dff3e7",
    "false": "#9b1420",
    "false-ground": "#fde4e4",
}
DARK = {
    "paper": "#11161d",
    "panel": "#1a212b",
    "ink": "#e7ecf2",
    "soft": "#a8b4c2",
    "line": "#384453",
    "ours": "#74b3ff",
    "other": "#f2a765",
    "third": "#66d193",
    "true": "#86e0aa",
    "true-ground": "#143423",
    "false": "#ffa3a3",
    "false-ground": "#461a1e",
}


class Card:
    """A piece of HTML that a notebook shows; always on white, since it cannot know its theme."""

    def __init__(self, *pieces: Markup | str) -> None:
        self.pieces = pieces

    def _repr_html_(self) -> str:
        return page("card.html.j2", pieces=[Markup(piece) for piece in self.pieces], colours=LIGHT)

    def __repr__(self) -> str:
        return f"<{len(self.pieces)} pieces of HTML, for a notebook>"


def page(template: str, **values: Any) -> str:
    """A template filled in."""
    return _environment().get_template(template).render(**values)


def piece(name: str, *arguments: Any) -> Markup:
    """A macro of `pieces.html.j2`."""
    return Markup(getattr(_environment().get_template("pieces.html.j2").module, name)(*arguments))


def notes(missing: Sequence[str]) -> Markup:
    """What is missing, as a list; nothing where nothing is."""
    return piece("notes", missing)


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """A table; the first cell of a row names the row."""
    return piece("table", caption, header, rows)


def section_piece(section: Any) -> Markup:
    """A section of the report, without its heading and its gallery."""
    return piece("body", section)


def view_pieces(inspector: Inspector, view: View, *, prefix: str = "h") -> list[Markup]:
    """A recommendation as a whole: notes, history, trace, tokens, items.

    Args:
        inspector: knows the items' names.
        view: what it looked at.
        prefix: of the history's places; another one for each view of a page.
    """
    pieces = [notes(view.missing), history_piece(inspector, view, prefix=prefix)]
    if view.trace is not None:
        names = [inspector.name(item) for item in view.history]
        pieces += [trace_piece(view.trace, names, prefix=prefix), tokens_piece(view.trace)]
    return [*pieces, items_piece(inspector, view)]


def history_piece(inspector: Inspector, view: View, *, prefix: str = "h") -> Markup:
    """The history as it was shown, newest last, with places that a trace's facts refer to."""
    return piece("history", [inspector.name(i) for i in view.history], view.hidden, prefix)


def trace_piece(trace: TraceView, history: Sequence[str], *, prefix: str = "h") -> Markup:
    """A trace with its facts marked, and for each the history items that bear it.

    Args:
        trace: what was read.
        history: names of the items shown.
        prefix: of the places in `history_piece` that facts link to; "" for no links.
    """
    return piece("trace", trace, segments(trace), history, prefix)


def tokens_piece(trace: TraceView) -> Markup:
    """Every token of a trace with its probability over it."""
    return piece("tokens", trace.tokens)


def items_piece(inspector: Inspector, view: View) -> Markup:
    """Recommended items with probabilities."""
    rows = [(inspector.name(item), score) for item, score in view.found]
    return piece("items", rows)


def tree_piece(
    inspector: Inspector, branches: Sequence[Branch], *, words: Mapping[str, str] | None = None
) -> Markup:
    """The beam as a tree.

    Args:
        inspector: knows the items' names.
        branches: of a view.
        words: by code token, what the code means.
    """
    return piece("tree", branches, inspector.name, words or {})


def changes_piece(inspector: Inspector, caption: str, changes: Sequence[Change]) -> Markup:
    """What came, went and moved between two lists."""
    return piece("changes", caption, [(inspector.name(c.item), c.before, c.after) for c in changes])


def segments(trace: TraceView) -> list[tuple[str, ClaimView | TitleView | None]]:
    """The text of a trace in pieces: those that are claims or titles, and what stands between."""
    marked: list[ClaimView | TitleView] = sorted(
        [*trace.claims, *trace.titles], key=lambda found: (found.start, found.end)
    )
    pieces: list[tuple[str, ClaimView | TitleView | None]] = []
    end = 0
    for found in marked:
        if found.start < end:
            continue  # inside another one
        pieces.append((trace.text[end : found.start], None))
        pieces.append((trace.text[found.start : found.end], found))
        end = found.end
    pieces.append((trace.text[end:], None))
    return [(text, found) for text, found in pieces if text]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure_text
    environment.filters["cell"] = markdown_cell
    environment.filters["prose"] = html_prose
    environment.filters["markdown"] = markdown_prose
    environment.tests["claim"] = lambda value: isinstance(value, ClaimView)
    return environment


def figure_text(value: object) -> str:
    """A number as people read it; anything else as it is.

    >>> figure_text(0.05), figure_text(12345), figure_text(2.5), figure_text("as it is")
    ('.0500', '12,345', '2.5', 'as it is')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if value.is_integer():
        return f"{value:,.0f}"
    if abs(value) < 1:
        return f"{value:.4f}".replace("0.", ".", 1)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def html_prose(text: str) -> Markup:
    """A sentence of ours, escaped, with what stands between backticks as code.

    >>> html_prose("run `whyrec index` for <x>")
    Markup('run <code>whyrec index</code> for &lt;x&gt;')
    """
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def markdown_prose(text: str) -> str:
    """A sentence of ours, in which backticks are code and nothing is HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


def markdown_cell(text: object) -> str:
    """Text that stays within a cell of a Markdown table, and is no markup there.

    >>> markdown_cell("a|b <i>")
    'a\\\\|b &lt;i>'
    """
    plain = " ".join(figure_text(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    for sign in "\\`*_[]|":
        plain = plain.replace(sign, f"\\{sign}")
    return plain
