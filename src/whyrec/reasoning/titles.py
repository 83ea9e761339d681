"""Series of items, read off their titles: "Toy Story" for "Toy Story 2 (1999)".

No catalogue says which items belong together, but titles do. A title may name its series before a
number, a Roman numeral or "Part" ("Die Hard 2"), before a colon or a dash ("Star Trek:
Generations", "Dove - Body Wash"), before a comma ("OPI Nail Lacquer, Big Apple Red"), or by
beginning with another item's whole title ("Batman Returns"). Such a stem is a series once two
different titles bear it (three where only a title's beginning speaks for it), and no more of them
than a series can have. Equal titles are one title; items without any have no series.

    >>> series_of(["Toy Story (1995)", "Toy Story 2 (1999)", "", "Heat (1995)"])
    ['Toy Story', 'Toy Story', '', '']
"""

import re
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence

_YEAR = re.compile(r"\((\d{4})\)\s*$")
_BRACKETS = re.compile(r"\s*\([^()]*\)\s*$")
_ARTICLE_LAST = re.compile(r"^(.*), (The|A|An|Les|La|Le|L'|Il|El|Der|Die|Das)$")
_ARTICLES = {"the", "a", "an"}
_SEPARATOR = re.compile(r":\s|\s-\s|\s–\s|\s~\s|,\s")
_SEQUEL = re.compile(
    r"^(?P<stem>.+?),? (?:(?:part|vol\.?|volume|chapter|episode|no\.?) )?"
    r"(?:\d{1,4}(?!\.\d)|[ivx]{2,5}|v|part\s\w+)\b(?:\s*[:,-].*)?$",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+(?:['’]\w+)?")
# A stem ends in a word that means something: "Crabtree and" names nothing.
_LOOSE_ENDS = _ARTICLES | {"and", "of", "in", "for", "to", "with", "by", "on", "at", "from", "&"}
_LONGEST_STEM = 5  # words; longer ones would spend a thought's whole budget on one name


def words_of(text: str) -> tuple[str, ...]:
    """Words in lower case, punctuation dropped: what two names are compared by.

    >>> words_of("L'Oreal, Paris!")
    ("l'oreal", 'paris')
    """
    return tuple(word.casefold().replace("’", "'") for word in _WORD.findall(text))


def beginning(words: tuple[str, ...], names: Container[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest of some names that words begin with; () where they begin with none.

    >>> beginning(("nail", "polish", "red"), {("nail",), ("nail", "polish"), ("red",)})
    ('nail', 'polish')
    """
    lengths = range(len(words), 0, -1)
    return next((words[:length] for length in lengths if words[:length] in names), ())


def year_of(title: str) -> int | None:
    """The year that a title ends in, as MovieLens writes it; None where there is none.

    >>> year_of("Toy Story (1995)")
    1995
    """
    found = _YEAR.search(title)
    return int(found[1]) if found and 1850 <= int(found[1]) <= 2100 else None


def bare_title(title: str) -> str:
    """A title without trailing brackets, its article in front.

    >>> bare_title("Empire Strikes Back, The (1980)")
    'The Empire Strikes Back'
    """
    title = " ".join(title.split())
    while _BRACKETS.search(title) and (shorter := _BRACKETS.sub("", title)):
        title = shorter
    article = _ARTICLE_LAST.match(title)
    return f"{article[2]} {article[1]}" if article else title


def title_words(title: str) -> tuple[str, ...]:
    """Words that tell a title from others: of the bare title, without its article.

    >>> title_words("Godfather, The (1972)")
    ('godfather',)
    """
    return _without_article(words_of(bare_title(title)))


def series_of(titles: Sequence[str]) -> list[str]:
    """The series of each title, "" where it has none.

    Args:
        titles: of a whole catalogue, in any order; may be empty or repeated.
    """
    bare = [bare_title(title) for title in titles]
    keys = [title_words(title) for title in titles]
    whole = {key for key in keys if key}
    members: defaultdict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    marked: set[tuple[str, ...]] = set()  # stems that a sequel's number or a colon cuts off
    for title, key in zip(bare, keys, strict=True):
        for stem in _marked_stems(title):
            members[stem].add(key)
            marked.add(stem)
        for length in range(1, min(len(key), _LONGEST_STEM + 1)):
            if key[:length] in whole and key[length] not in _LOOSE_ENDS:
                members[key[:length]].add(key)
        if key in whole:
            members[key].add(key)
    largest = max(20, len(titles) // 200)
    series = {
        stem
        for stem, titled in members.items()
        # What only begins two titles may be chance: "Dead Man", "Dead Man Walking".
        if (2 if stem in marked else 3) <= len(titled) <= largest and _is_name(stem)
    }
    return [_longest(title, key, series) for title, key in zip(bare, keys, strict=True)]


def _marked_stems(title: str) -> Iterator[tuple[str, ...]]:
    heads = [title[: found.start()] for found in _SEPARATOR.finditer(title)]
    for head in heads[:2]:
        yield _without_article(words_of(head))
    for text in (title, *heads[:1]):
        if sequel := _SEQUEL.match(text):
            yield _without_article(words_of(sequel["stem"]))


def _is_name(stem: tuple[str, ...]) -> bool:
    """Whether a stem can be spoken of: short, with letters, and not broken off."""
    letters = sum(c.isalpha() for word in stem for c in word)
    return 0 < len(stem) <= _LONGEST_STEM and letters > 1 and stem[-1] not in _LOOSE_ENDS


def _longest(title: str, key: tuple[str, ...], series: set[tuple[str, ...]]) -> str:
    """The longest series that a title begins with, in the title's own letters."""
    if not (stem := beginning(key[:_LONGEST_STEM], series)):
        return ""
    skipped = len(words_of(title)) - len(key)
    spans = [found.span() for found in _WORD.finditer(title)]
    return title[spans[skipped][0] : spans[skipped + len(stem) - 1][1]]


def _without_article(words: tuple[str, ...]) -> tuple[str, ...]:
    return words[1:] if len(words) > 1 and words[0] in _ARTICLES else words
