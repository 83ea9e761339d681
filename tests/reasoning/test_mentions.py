"""Names found in free text, against brute force."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from reasoning_catalogues import FILM_BOOK, FILMS, SHOP, SHOP_BOOK, item

from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.mentions import MentionFinder
from whyrec.reasoning.titles import words_of


def found(text: str, finder: MentionFinder) -> list[str]:
    return [text[mention.start : mention.end] for mention in finder.find(text)]


def test_the_longest_name_wins() -> None:
    finder = MentionFinder(SHOP_BOOK, titles=[one.title for one in SHOP])
    text = (
        "OPI Nail Lacquer, Big Apple Red; then nail art by e.l.f. cosmetics, or WEN by Chaz Dean!"
    )
    assert found(text, finder) == [
        "OPI Nail Lacquer, Big Apple Red",
        "nail art",
        "e.l.f. cosmetics",
        "WEN by Chaz Dean",
    ]
    title, _, brand, _ = finder.find(text)
    assert title.items == (0,) and not title.facts
    assert brand.facts[0].kind == "brand"


def test_titles_with_and_without_their_year() -> None:
    finder = MentionFinder(FILM_BOOK, titles=[one.title for one in FILMS])
    text = "After The Empire Strikes Back and Heat (1995), Toy Story 2."
    mentions = finder.find(text)
    assert [mention.items for mention in mentions] == [(3,), (6,), (1,)]
    # A title that is a series, too, is both.
    (both,) = finder.find("Toy Story")
    assert both.items == (0,) and both.facts[0].kind == "series"


def test_one_word_names_need_their_capital() -> None:
    finder = MentionFinder(FILM_BOOK, titles=[one.title for one in FILMS])
    assert found("the heat of action", finder) == []
    assert found("Heat is Action", finder) == ["Heat", "Action"]


def test_equal_titles_are_both_found() -> None:
    items = [item("Twins"), item("Twins"), item("")]
    finder = MentionFinder(FactBook(items), titles=[one.title for one in items])
    assert finder.find("Twins")[0].items == (0, 1)


@given(
    st.lists(st.lists(st.sampled_from(["Aa", "Bb", "Cc"]), min_size=2, max_size=4), max_size=6),
    st.lists(st.sampled_from(["Aa", "Bb", "Cc"]), max_size=12),
)
def test_brute_force(titles: list[list[str]], words: list[str]) -> None:
    names = {words_of(" ".join(title)) for title in titles}
    finder = MentionFinder(FactBook([]), titles=[" ".join(title) for title in titles])
    text, expected, place = " ".join(words), [], 0
    while place < len(words):
        ends = [end for end in range(len(words), place, -1)]
        end = next((e for e in ends if words_of(" ".join(words[place:e])) in names), None)
        if end is not None:
            expected.append(" ".join(words[place:end]))
        place = end or place + 1
    assert found(text, finder) == expected
    spans = [(mention.start, mention.end) for mention in finder.find(text)]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
