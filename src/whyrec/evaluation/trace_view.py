"""One trace, fact by fact: what it says, whether that is so, and which history items bear it out.

reader = TraceReader(dataset.items, template_folder=model / "prompts")
view = reader.read("The history shares Comedy. Next: Comedy.", history, recommended)
for claim in view.claims:
    claim.name, claim.true, claim.places
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from whyrec.catalog.dataset import Item
from whyrec.prompting.templates import load_templates
from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.mentions import MentionFinder
from whyrec.reasoning.trace import check_trace, read_free_text, read_trace
from whyrec.reasoning.wording import Wording


@dataclass(frozen=True)
class ClaimView:
    """A fact that a trace names.

    Attributes:
        clause: where it names it: evidence, jump or turn speak of the history, next of what comes.
        name: as it stands in the text.
        start, end: where, in characters.
        true: borne by the history (by its newest items, for a turn), or, announced, by some item
            of the catalogue.
        places: of the history items that bear it, oldest first, from 0.
        recommended: ranks of the recommended items that bear it, from 1.
    """

    clause: str
    name: str
    start: int
    end: int
    true: bool
    places: tuple[int, ...]
    recommended: tuple[int, ...]


@dataclass(frozen=True)
class TitleView:
    """A title that a trace names: where in the text, and at which places of the history."""

    start: int
    end: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Token:
    """A token of a trace, and its probability over the whole vocabulary at temperature 1."""

    text: str
    probability: float


@dataclass(frozen=True)
class TraceView:
    """A trace and what became of its claims.

    Attributes:
        text: the trace.
        claims: in the order of the text.
        titles: items that it names.
        well_formed: whole clauses of the grounded writer, and nothing else.
        possible: some one item bears all that is announced.
        tokens: with their probabilities, where a model was asked; the last one ends the thought.
    """

    text: str
    claims: tuple[ClaimView, ...]
    titles: tuple[TitleView, ...]
    well_formed: bool
    possible: bool
    tokens: tuple[Token, ...] = ()

    @property
    def untrue(self) -> tuple[ClaimView, ...]:
        return tuple(claim for claim in self.claims if not claim.true)

    def with_tokens(self, tokens: Sequence[Token]) -> "TraceView":
        return replace(self, tokens=tuple(tokens))


class TraceReader:
    """Reads traces of one catalogue.

    Args:
        items: the catalogue.
        template_folder: a model folder's own words; the packaged ones where it has none.
    """

    def __init__(self, items: Sequence[Item], *, template_folder: Path | None = None) -> None:
        own = template_folder is not None and (template_folder / "rationale.yaml").exists()
        self.wording = Wording(load_templates("rationale", template_folder if own else None))
        self.book = FactBook(items)
        self._finder = MentionFinder(self.book, titles=[item.title for item in items])

    def read(self, text: str, history: Sequence[int], recommended: Sequence[int] = ()) -> TraceView:
        """Read a trace in the grounded writer's words, or any text for the names in it.

        Args:
            text: the trace.
            history: item indices as the prompt showed them, oldest first.
            recommended: item indices that came after the trace, best first.
        """
        book = self.book
        trace = read_trace(text, book, wording=self.wording)
        if not trace.claims:
            trace = read_free_text(text, self._finder)
        check = check_trace(trace, history, book)
        claims = []
        for claim in sorted(trace.claims, key=lambda claim: claim.start):
            bearers = set(book.bearers(claim.facts))
            claims.append(
                ClaimView(
                    claim.clause,
                    claim.name,
                    claim.start,
                    claim.end,
                    claim not in check.false,
                    tuple(place for place, item in enumerate(history) if item in bearers),
                    tuple(rank for rank, item in enumerate(recommended, 1) if item in bearers),
                )
            )
        titles = [
            TitleView(
                found.start,
                found.end,
                tuple(place for place, item in enumerate(history) if item in found.items),
            )
            for found in self._finder.find(text)
            if found.items and not any(c.start < found.end and found.start < c.end for c in claims)
        ]
        return TraceView(text, tuple(claims), tuple(titles), trace.well_formed, check.possible)
