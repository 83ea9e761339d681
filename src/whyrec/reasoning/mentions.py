"""Which facts and titles of a catalogue a free text names, and where, by exact phrases.

A language model writes as it likes; what it names is found by looking every phrase of its text up
in one table of all names, the longest first. Letter case and punctuation do not matter ("loreal
paris" is not "L'Oréal Paris", but "L'OREAL, Paris" is L'Oreal Paris), with one exception: a name of
a single word must begin as the catalogue writes it, so that "heat protection" does not name the
film "Heat".

    finder = MentionFinder(book, titles=[item.title for item in items])
    for mention in finder.find("You like OPI, so Nail Polish is next."):
        mention.start, mention.end, mention.facts, mention.items

A text costs a few dictionary look-ups a word, whatever the size of the catalogue.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from whyrec.reasoning.facts import Fact, FactBook
from whyrec.reasoning.titles import bare_title, words_of

_WORD = re.compile(r"\w+(?:['’]\w+)?")
_SHORTEST_WORD = 3  # letters of a one-word name; "M" and "IT" stand everywhere


@dataclass(frozen=True)
class Mention:
    """A name in a text.

    Attributes:
        start, end: where it stands, in characters.
        facts: the facts of that name.
        items: the items whose title it is, with or without its year.
    """

    start: int
    end: int
    facts: tuple[Fact, ...]
    items: tuple[int, ...]


@dataclass
class _Entry:
    facts: list[Fact] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    capital: bool = True  # every spelling of it begins with a capital or a digit


class MentionFinder:
    """Finds the names of one catalogue.

    Args:
        book: facts of the catalogue.
        titles: of its items, by item index; none to find facts only.
    """

    def __init__(self, book: FactBook, *, titles: Sequence[str] = ()) -> None:
        self._entries: defaultdict[tuple[str, ...], _Entry] = defaultdict(_Entry)
        for fact in book.all_facts():
            self._note(fact.name).facts.append(fact)
        for item, title in enumerate(titles):
            for form in {
                words_of(title): title,
                words_of(bare_title(title)): bare_title(title),
            }.values():
                if words_of(form):
                    self._note(form).items.append(item)
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        for words in self._entries:
            lengths[words[0]].add(len(words))
        self._lengths = {word: sorted(found, reverse=True) for word, found in lengths.items()}

    def find(self, text: str) -> list[Mention]:
        """All names in a text, from left to right, none inside another."""
        found = list(_WORD.finditer(text))
        words = tuple(match.group().casefold().replace("’", "'") for match in found)
        mentions: list[Mention] = []
        place = 0
        while place < len(words):
            length = self._longest(words, place, text[found[place].start()])
            if not length:
                place += 1
                continue
            entry = self._entries[words[place : place + length]]
            start, end = found[place].start(), found[place + length - 1].end()
            mentions.append(Mention(start, end, tuple(entry.facts), tuple(entry.items)))
            place += length
        return mentions

    def _longest(self, words: tuple[str, ...], place: int, first_letter: str) -> int:
        for length in self._lengths.get(words[place], ()):
            entry = self._entries.get(words[place : place + length])
            if entry is None or place + length > len(words):
                continue
            plain = length > 1 or not entry.capital or not first_letter.islower()
            if plain and (length > 1 or len(words[place]) >= _SHORTEST_WORD):
                return length
        return 0

    def _note(self, name: str) -> _Entry:
        entry = self._entries[words_of(name)]
        first = _WORD.search(name)
        assert first is not None
        entry.capital = entry.capital and not first.group()[0].islower()
        return entry
