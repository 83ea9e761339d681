"""The grounded writer's language: facts → sentences, and back again, exactly.

A trace is a few clauses, each a fixed beginning and a list of facts:

    The history shares Nail Polish; OPI. Lately Nail Art. Next: Makeup > Nails > Nail Polish by OPI.

Reading looks for the beginnings, wherever they stand, so that a trace that a model cut short,
repeated or garbled is read as far as it goes. All words are in `prompts/rationale.yaml`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from whyrec.prompting.templates import load_templates
from whyrec.reasoning.facts import Fact, FactBook, Kind

Clause = Literal["evidence", "jump", "turn", "next"]
TAILS: tuple[Kind, ...] = ("series", "brand", "era")


@dataclass(frozen=True)
class Claim:
    """Something that a trace names as a fact.

    Attributes:
        clause: where it is named.
        name: as it stands in the text.
        facts: what the catalogue knows by that name; empty for an invention.
        start, end: where it stands, in characters.
    """

    clause: Clause
    name: str
    facts: tuple[Fact, ...]
    start: int
    end: int


class Wording:
    """Says and reads clauses in the words of a template file.

    Args:
        templates: the file's content; the packaged `rationale.yaml` when None.
    """

    def __init__(self, templates: dict[str, Any] | None = None) -> None:
        templates = templates or load_templates("rationale")
        self._clauses: dict[Clause, list[tuple[str, str]]] = {}
        for clause in get_args(Clause):
            parts = [template.split("{facts}") for template in templates["grounded"][clause]]
            self._clauses[clause] = [(cue, end) for cue, end in parts]
        self._list, self._nothing = templates["list"], templates["nothing"]
        self._separators = {True: templates["path"], False: templates["equals"]}
        self._tails = {kind: templates["tails"][kind].split("{name}") for kind in TAILS}
        cues = [cue for parts in self._clauses.values() for cue, _ in parts]
        assert not any(a in b for a in cues for b in cues if a is not b), cues
        self._cue_clause = {
            cue: (clause, end) for clause, parts in self._clauses.items() for cue, end in parts
        }
        self._any_cue = re.compile("|".join(re.escape(cue) for cue in cues))

    def paraphrases(self, clause: Clause) -> int:
        """How many ways there are to say a clause."""
        return len(self._clauses[clause])

    def say(self, clause: Clause, facts: Sequence[Fact], book: FactBook, *, way: int = 0) -> str:
        """One clause.

        Args:
            clause: which one; `next` puts its facts together as one description.
            facts: categories from broad to narrow, then series, brand, era in the last clause.
            book: the catalogue.
            way: which paraphrase.
        """
        cue, end = self._clauses[clause][way]
        if clause != "next":
            return cue + self._list.join(fact.name for fact in facts) + end
        categories = [fact.name for fact in facts if fact.kind == "category"]
        said = self._separators[book.is_path].join(categories) or self._nothing
        by_kind = {fact.kind: fact.name for fact in facts}
        for kind in TAILS:
            if kind in by_kind:
                said += by_kind[kind].join(self._tails[kind])
        return cue + said + end

    def read(self, text: str, book: FactBook) -> list[Claim]:
        """All that a trace claims, in its order; empty for a text that has no clause at all."""
        claims: list[Claim] = []
        cues = list(self._any_cue.finditer(text))
        for place, cue in enumerate(cues):
            clause, end = self._cue_clause[cue.group()]
            stop = cues[place + 1].start() if place + 1 < len(cues) else len(text)
            start, stop = _strip(text, cue.end(), stop)
            if end and text[start:stop].endswith(end):
                stop -= len(end)
            read = self._read_next if clause == "next" else self._read_list
            claims += read(text, start, stop, clause, book)
        return claims

    def announce_instead(self, text: str, facts: Sequence[Fact], book: FactBook) -> str | None:
        """The text, announcing other facts in the same words; None where it announces nothing.

        Args:
            text: a trace.
            facts: as for the last clause of `say`.
            book: the catalogue.
        """
        cues = list(self._any_cue.finditer(text))
        for place, cue in reversed(list(enumerate(cues))):
            if self._cue_clause[cue.group()][0] != "next":
                continue
            way = [start for start, _ in self._clauses["next"]].index(cue.group())
            rest = text[cues[place + 1].start() :] if place + 1 < len(cues) else ""
            said = self.say("next", facts, book, way=way)
            return " ".join(part for part in (text[: cue.start()].rstrip(), said, rest) if part)
        return None

    def is_whole(self, text: str) -> bool:
        """Whether a text is whole clauses, each at most once, in their order, and nothing else."""
        cues = list(self._any_cue.finditer(text))
        if not cues or cues[0].start() != 0:
            return False
        said = [self._cue_clause[cue.group()] for cue in cues]
        stops = [*(cue.start() - 1 for cue in cues[1:]), len(text)]
        ended = all(
            text[cue.end() : stop].endswith(end) and stop - cue.end() > len(end)
            for cue, stop, (_, end) in zip(cues, stops, said, strict=True)
        )
        clauses = [clause for clause, _ in said]
        if clauses[0] in ("evidence", "jump"):
            clauses = clauses[1:]
        return ended and clauses in (["turn", "next"], ["next"])

    def _read_list(
        self, text: str, start: int, stop: int, clause: Clause, book: FactBook
    ) -> list[Claim]:
        return [
            Claim(clause, text[a:b], book.named(text[a:b]), a, b)
            for a, b in _split(text, start, stop, self._list)
        ]

    def _read_next(
        self, text: str, start: int, stop: int, clause: Clause, book: FactBook
    ) -> list[Claim]:
        claims: list[Claim] = []
        for kind in reversed(TAILS):
            found = self._find_tail(text, start, stop, kind, book)
            if found is not None:
                a, b, stop = found
                claims.insert(0, Claim(clause, text[a:b], book.named(text[a:b], kind), a, b))
        categories = [
            Claim(clause, text[a:b], book.named(text[a:b], "category"), a, b)
            for a, b in _split(text, start, stop, self._separators[book.is_path])
            if text[a:b] != self._nothing
        ]
        return categories + claims

    def _find_tail(
        self, text: str, start: int, stop: int, kind: Kind, book: FactBook
    ) -> tuple[int, int, int] | None:
        """Where the name of a tail begins and ends, and where the tail begins.

        A name may hold the very words that a tail begins with ("WEN by Chaz Dean"), so that the
        place is taken that makes the name a known one; the last place where none does.
        """
        head = text[start:stop]
        parts = [head[a:b] for a, b in _split(head, 0, len(head), self._separators[book.is_path])]
        before, after = self._tails[kind]
        if all(book.named(part, "category") for part in parts) or not head.endswith(after):
            return None
        name_stop = stop - len(after)
        places = [start + found.start() for found in re.finditer(re.escape(before), head)]
        for place in places:
            if book.named(text[place + len(before) : name_stop], kind):
                return place + len(before), name_stop, place
        return (places[-1] + len(before), name_stop, places[-1]) if places else None


@cache
def packaged_wording() -> Wording:
    """The wording of the packaged `prompts/rationale.yaml`."""
    return Wording()


def _split(text: str, start: int, stop: int, separator: str) -> list[tuple[int, int]]:
    """Spans of the parts of text[start:stop], stripped, without empty ones."""
    spans = []
    for part in text[start:stop].split(separator):
        begin, end = _strip(text, start, start + len(part))
        if begin < end:
            spans.append((begin, end))
        start += len(part) + len(separator)
    return spans


def _strip(text: str, start: int, stop: int) -> tuple[int, int]:
    while start < stop and text[start].isspace():
        start += 1
    while start < stop and text[stop - 1].isspace():
        stop -= 1
    return start, stop
