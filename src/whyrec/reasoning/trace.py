"""Read a trace back, and check it against the history, the catalogue and the recommended items.

Three questions are asked of a trace: is what it says of the history true; is what it announces
something that the catalogue has; and do the items that follow bear what it announced. A trace in
the grounded writer's words is read clause by clause (`wording.py`); any other text is searched for
names (`mentions.py`), all of which then count as said of the history.

    trace = read_trace(text, book)
    check = check_trace(trace, history, book)
    check.true / check.named
    agreement(trace.announced, book, items)["category"]
"""

from collections.abc import Sequence
from dataclasses import dataclass

from whyrec.reasoning.facts import Fact, FactBook
from whyrec.reasoning.mentions import MentionFinder
from whyrec.reasoning.wording import Claim, Wording, packaged_wording

_NEWEST = 3  # items that a turn may be about (`facts.turn`)


@dataclass(frozen=True)
class Trace:
    """What a trace claims.

    Attributes:
        text: the trace.
        claims: every fact that it names, or means to name, with its place.
        well_formed: the clauses are whole, each at most once, in their order, and nothing else.
    """

    text: str
    claims: tuple[Claim, ...]
    well_formed: bool

    @property
    def evidence(self) -> tuple[Claim, ...]:
        """What is said of the history."""
        return tuple(claim for claim in self.claims if claim.clause != "next")

    @property
    def announced(self) -> tuple[Claim, ...]:
        """What is said of the next item."""
        return tuple(claim for claim in self.claims if claim.clause == "next")


@dataclass(frozen=True)
class Check:
    """How true a trace is.

    Attributes:
        named: claims in all.
        true: claims that hold: of the history those that some item of it bears (of the newest
            items, for a turn), of the next item those that some item of the catalogue bears.
        false: the others.
        possible: some one item bears all that is announced.
    """

    named: int
    true: int
    false: tuple[Claim, ...]
    possible: bool


def read_trace(text: str, book: FactBook, *, wording: Wording | None = None) -> Trace:
    """Read a trace in the grounded writer's words, as far as it goes."""
    wording = wording or packaged_wording()
    return Trace(text, tuple(wording.read(text, book)), wording.is_whole(text))


def read_free_text(text: str, finder: MentionFinder) -> Trace:
    """Read any text: every fact of the catalogue that it names counts as said of the history.

    Titles are not claims; `MentionFinder.find` gives them too.
    """
    claims = [
        Claim("evidence", text[found.start : found.end], found.facts, found.start, found.end)
        for found in finder.find(text)
        if found.facts
    ]
    return Trace(text, tuple(claims), well_formed=False)


def check_trace(trace: Trace, history: Sequence[int], book: FactBook) -> Check:
    """Check a trace against the history that it was written for.

    Args:
        trace: the trace.
        history: item indices as the prompt showed them, oldest first.
        book: the catalogue.
    """
    held = {fact for item in history for fact in book.of(item)}
    newest = {fact for item in history[-_NEWEST:] for fact in book.of(item)}
    false = []
    for claim in trace.claims:
        if claim.clause == "next":
            holds = bool(claim.facts)
        else:
            holds = not (newest if claim.clause == "turn" else held).isdisjoint(claim.facts)
        if not holds:
            false.append(claim)
    wanted = [claim.facts for claim in trace.announced if claim.facts]
    possible = not wanted or any(_bears(book.of(item), wanted) for item in book.bearers(wanted[0]))
    return Check(len(trace.claims), len(trace.claims) - len(false), tuple(false), possible)


def agreement(announced: Sequence[Claim], book: FactBook, items: Sequence[int]) -> dict[str, float]:
    """The share of items that bear what was announced; only for what was announced.

    Keys are `category` (the narrowest one), `series`, `brand`, `era` and `all`.

    Args:
        announced: of a trace.
        book: the catalogue.
        items: the items recommended after the trace.
    """
    wanted: dict[str, tuple[Fact, ...]] = {}
    for claim in announced:
        for fact in claim.facts[:1]:
            wanted[fact.kind] = claim.facts  # categories come from broad to narrow: the last stays
    if not wanted or not items:
        return {}
    rows = [book.of(item) for item in items]
    shares = {
        kind: sum(_bears(row, [facts]) for row in rows) / len(rows)
        for kind, facts in wanted.items()
    }
    everything = [claim.facts for claim in announced if claim.facts]
    return shares | {"all": sum(_bears(row, everything) for row in rows) / len(rows)}


def _bears(borne: Sequence[Fact], wanted: Sequence[tuple[Fact, ...]]) -> bool:
    return all(not set(borne).isdisjoint(facts) for facts in wanted)
