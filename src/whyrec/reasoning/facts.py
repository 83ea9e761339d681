"""What can be said of items in words, and what a history has in common with another item.

A *fact* is a category, a brand, a series of titles or an era, as the catalogue gives it. (The era
is the decade of the year that a title ends in, or the year itself where most of the catalogue is of
that decade.) Where the catalogue names no brand, a title that begins with one tells it, as in "St.
Ives Body Wash", if nearly all titles that begin so are of that brand. A fact says the more, the
fewer items bear it: its weight is idf = log(N / items that bear it), so that the root category,
which nearly everything bears, counts for nearly nothing.

    book = FactBook(dataset.items)
    book.of(17)                                    # facts of an item, broad categories first
    shared_facts(book, pruned, book.of(target))    # what speaks for the target
    turn(book, history)                            # what the newest items have that older ones lack
"""

import copy
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from whyrec.catalog.dataset import Item
from whyrec.reasoning.titles import beginning, series_of, words_of, year_of

Kind = Literal["category", "series", "brand", "era"]
# A fact that more than this share of the catalogue bears says nothing about an item.
_COMMON = 0.6
# Share of neighbouring categories that go from common to rare where categories are a path: 0.97 in
# Amazon's, 0.59 among the genres of films.
_PATH = 0.8
_LONGEST_NAME = 48  # letters
_TOLD = 0.9  # of the titles that begin with a brand's name and whose brand is known
_MOST_NEWEST = 3
_SEPARATORS = re.compile(r"\s*([;>|/])\s*")


@dataclass(frozen=True, slots=True, order=True)
class Fact:
    """Something that is true of items: its kind, and its name as the catalogue spells it."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class Shared:
    """A fact and how many of a history's items bear it."""

    fact: Fact
    count: int


class FactBook:
    """The facts of every item of a catalogue.

    Attributes:
        num_items: N, items of the catalogue.
        is_path: whether an item's categories are a path from broad to narrow (a shop's tree) and
            not a set of equals (genres). Read off the catalogue.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        spelling = _Spelling()
        rows: list[list[tuple[Kind, str]]] = []
        for item, brand in zip(items, _brands(items), strict=True):
            rows.append([("category", name) for name in item.categories])
            rows[-1].append(("brand", brand))
        for row in rows:
            for kind, name in row:
                spelling.note(kind, name)
        brands = {words for kind, words in spelling.known() if kind != "series"}
        titles = [item.title for item in items]
        for row, series, era in zip(rows, series_of(titles), _eras(titles), strict=True):
            if words_of(series) not in brands:
                row.append(("series", series))
            row.append(("era", era))
            for kind, name in row[-2:]:
                if kind in ("series", "era"):
                    spelling.note(kind, name)
        found = [[spelling.fact(kind, name) for kind, name in row] for row in rows]
        borne = [list(dict.fromkeys(fact for fact in row if fact)) for row in found]
        self._count = Counter(fact for facts in borne for fact in facts)
        # Where items have gone to a longer stem, a series may be left with one, and says nothing.
        borne = [[f for f in facts if f.kind != "series" or self._count[f] > 1] for facts in borne]
        self._count = Counter(fact for facts in borne for fact in facts)
        self.num_items = len(items)
        self.is_path = self._categories_are_paths(borne)
        self._of = [self._ordered(facts) for facts in borne]
        self._depth = {fact: n for facts in self._of for n, fact in enumerate(facts)}
        self._bearers = _bearers(self._of)
        self._named: defaultdict[tuple[str, ...], list[Fact]] = defaultdict(list)
        for fact in sorted(self._count):
            self._named[words_of(fact.name)].append(fact)

    def only(self, kept: Callable[[int, Fact], bool]) -> "FactBook":
        """The same book where items bear some of their facts only; what a fact says stays.

        Args:
            kept: whether an item is to bear a fact that it bears here.
        """
        other = copy.copy(self)
        other._of = [
            tuple(fact for fact in facts if kept(item, fact)) for item, facts in enumerate(self._of)
        ]
        other._bearers = _bearers(other._of)
        return other

    def of(self, item: int) -> tuple[Fact, ...]:
        """Facts of an item: categories from broad to narrow, then series, brand, era."""
        return self._of[item]

    def categories(self, item: int) -> tuple[Fact, ...]:
        """Categories of an item, from broad to narrow."""
        return tuple(fact for fact in self._of[item] if fact.kind == "category")

    def bearers(self, facts: Iterable[Fact]) -> list[int]:
        """The items that bear one of some facts, sorted."""
        return sorted({item for fact in facts for item in self._bearers.get(fact, ())})

    def count(self, fact: Fact) -> int:
        """How many items of the catalogue bear a fact."""
        return self._count[fact]

    def idf(self, fact: Fact) -> float:
        """log(N / items that bear it): what a fact says, in nats."""
        return math.log(self.num_items / self._count[fact])

    def narrowness(self, fact: Fact) -> tuple[float, int]:
        """What facts are ordered by from broad to narrow: idf, then depth in a path."""
        return self.idf(fact), self._depth[fact]

    def says_something(self, fact: Fact) -> bool:
        """False for a fact that most of the catalogue bears."""
        return self._count[fact] <= _COMMON * self.num_items

    def all_facts(self) -> list[Fact]:
        """Every fact of the catalogue, sorted."""
        return sorted(self._count)

    def named(self, name: str, kind: Kind | None = None) -> tuple[Fact, ...]:
        """The facts of a name (of one kind, if given), letter case and punctuation apart."""
        facts = self._named.get(words_of(name), ())
        return tuple(fact for fact in facts if kind is None or fact.kind == kind)

    def _categories_are_paths(self, borne: Iterable[Sequence[Fact]]) -> bool:
        pairs = falling = 0
        for facts in borne:
            counts = [self._count[fact] for fact in facts if fact.kind == "category"]
            pairs += max(len(counts) - 1, 0)
            falling += sum(a >= b for a, b in itertools.pairwise(counts))
        return pairs > 0 and falling >= _PATH * pairs

    def _ordered(self, facts: Sequence[Fact]) -> tuple[Fact, ...]:
        categories = [fact for fact in facts if fact.kind == "category"]
        if not self.is_path:
            categories.sort(key=lambda fact: (-self._count[fact], fact.name))
        rest = {fact.kind: fact for fact in facts if fact.kind != "category"}
        others = [rest[kind] for kind in ("series", "brand", "era") if kind in rest]
        return (*categories, *others)


def shared_facts(book: FactBook, history: Sequence[int], facts: Sequence[Fact]) -> list[Shared]:
    """Which of some facts, another item's, a history's items bear, the most telling first.

    A fact's weight is its idf times the number of the history's items that bear it. A broad
    category is left out where one below it has at least half of its bearers: it adds nothing.
    """
    bearers: defaultdict[Fact, set[int]] = defaultdict(set)
    for place, item in enumerate(history):
        for fact in book.of(item):
            bearers[fact].add(place)
    held = [fact for fact in facts if bearers[fact] and book.says_something(fact)]
    kept = [
        fact for fact in held if not any(_says_more(book, other, fact, bearers) for other in held)
    ]
    kept.sort(
        key=lambda fact: -book.idf(fact) * len(bearers[fact])
    )  # stable: ties keep their order
    return [Shared(fact, len(bearers[fact])) for fact in kept]


def leading_facts(book: FactBook, history: Sequence[int]) -> list[Shared]:
    """What a history is mostly about, the most telling first."""
    facts = dict.fromkeys(fact for item in history for fact in book.of(item))
    return shared_facts(book, history, tuple(facts))


def turn(book: FactBook, history: Sequence[int]) -> Shared | None:
    """What the newest items have in common that older ones do not; None where nothing has changed.

    The newest items are the last three, or half of a shorter history. Two thirds of them must bear
    the fact, and at most a third as large a share of the older ones.

    Args:
        book: the catalogue.
        history: item indices, oldest first.
    """
    num_newest = min(_MOST_NEWEST, len(history) // 2)
    if num_newest < 2:
        return None
    newest, older = history[-num_newest:], history[:-num_newest]
    counts = Counter(fact for item in newest for fact in book.of(item))
    before = Counter(fact for item in older for fact in book.of(item))
    best, best_score = None, (0.0, 0)
    for fact, count in counts.items():
        share, old_share = count / len(newest), before[fact] / len(older)
        score = book.idf(fact) * (share - old_share), book.narrowness(fact)[1]
        told = count >= 2 and share > 0.6 and old_share <= share / 3 and book.says_something(fact)
        if told and score > best_score:
            best, best_score = Shared(fact, count), score
    return best


def _bearers(facts_of: Sequence[Sequence[Fact]]) -> dict[Fact, list[int]]:
    bearers = defaultdict[Fact, list[int]](list)
    for item, facts in enumerate(facts_of):
        for fact in facts:
            bearers[fact].append(item)
    return bearers


def _brands(items: Sequence[Item]) -> list[str]:
    """The brand of each item; where it has none, the one that its title tells, or ""."""
    brands = [words_of(item.brand) for item in items]
    spelled = {words: item.brand for words, item in zip(brands, items, strict=True) if words}
    longest = max(map(len, spelled), default=0)
    names = [beginning(words_of(item.title)[:longest], spelled) for item in items]
    pairs = list(zip(brands, names, strict=True))
    begun = Counter(name for words, name in pairs if words and name)
    its_own = Counter(name for words, name in pairs if words == name)
    told = {name for name, count in begun.items() if count > 1 and its_own[name] >= _TOLD * count}
    return [
        item.brand if words else spelled[name] if name in told else ""
        for item, (words, name) in zip(items, pairs, strict=True)
    ]


def _eras(titles: Sequence[str]) -> list[str]:
    years = [year_of(title) for title in titles]
    decades = Counter(year // 10 for year in years if year)
    usual = {decade for decade, count in decades.items() if count > _COMMON * len(titles)}
    return [
        "" if not year else str(year) if year // 10 in usual else f"{year // 10 * 10}s"
        for year in years
    ]


def _says_more(book: FactBook, narrow: Fact, broad: Fact, bearers: Mapping[Fact, set[int]]) -> bool:
    """Whether a category below another one says nearly all that the other says of a history."""
    return (
        book.is_path
        and narrow.kind == broad.kind == "category"
        and book.narrowness(narrow) > book.narrowness(broad)
        and bearers[narrow] <= bearers[broad]
        and 2 * len(bearers[narrow]) >= len(bearers[broad])
    )


class _Spelling:
    """One spelling for names that differ in letter case or punctuation: the commonest."""

    def __init__(self) -> None:
        self._forms: defaultdict[tuple[str, tuple[str, ...]], Counter[str]] = defaultdict(Counter)

    def note(self, kind: str, name: str) -> None:
        if cleaned := _clean(name):
            self._forms[kind, words_of(cleaned)][cleaned] += 1

    def known(self) -> set[tuple[str, tuple[str, ...]]]:
        return set(self._forms)

    def fact(self, kind: Kind, name: str) -> Fact | None:
        if not (cleaned := _clean(name)):
            return None
        forms = self._forms[kind, words_of(cleaned)]
        return Fact(kind, min(forms, key=lambda form: (-forms[form], form)))


def _clean(name: str) -> str:
    """A name on one line that holds none of the separators that lists of facts are written with.

    Empty where nothing is left that could be spoken of.
    """
    name = _SEPARATORS.sub(
        lambda found: ", " if found[1] == ";" else found[1], " ".join(name.split())
    )
    name = name.strip(" ,.:")
    return name if words_of(name) and len(name) <= _LONGEST_NAME else ""
