"""Facts of items, and what histories share with targets."""

from hypothesis import given
from hypothesis import strategies as st
from reasoning_catalogues import FILM_BOOK, SHOP_BOOK, item

from whyrec.catalog.dataset import Item
from whyrec.reasoning.facts import Fact, FactBook, leading_facts, shared_facts, turn


def names(facts: object) -> list[str]:
    return [fact.name for fact in facts]  # type: ignore[attr-defined]


def test_facts_of_a_shop() -> None:
    assert SHOP_BOOK.is_path
    assert names(SHOP_BOOK.of(0)) == [
        "Beauty",
        "Makeup",
        "Nails",
        "Nail Polish",
        "OPI Nail Lacquer",
        "OPI",
    ]
    assert SHOP_BOOK.of(9) == SHOP_BOOK.of(11) == ()
    # Spellings that differ in letter case alone are one fact; separators never stand in a name.
    assert names(SHOP_BOOK.of(10)) == ["Beauty", "Skin Care", "Creams, Oils>All", "OPI"]
    assert SHOP_BOOK.named("l'oreal") == ()
    assert SHOP_BOOK.named("NAIL polish") == (Fact("category", "Nail Polish"),)
    assert SHOP_BOOK.bearers(SHOP_BOOK.named("OPI")) == [0, 1, 10]


def test_facts_of_films() -> None:
    assert not FILM_BOOK.is_path
    assert names(FILM_BOOK.of(3)) == ["Action", "Drama", "Sci-Fi", "1980s"]  # common genres first
    assert Fact("series", "Star Trek") in FILM_BOOK.of(4) and Fact(
        "series", "Star Trek"
    ) in FILM_BOOK.of(5)
    assert FILM_BOOK.of(9) == (Fact("category", "Comedy"),)


def test_where_most_items_are_of_one_decade_the_year_speaks() -> None:
    book = FactBook(
        [item(f"Film {'abcdefgh'[n]} ({1991 + n})") for n in range(8)] + [item("Old (1942)")]
    )
    assert names(book.of(0)) == ["1991"] and names(book.of(8)) == ["1940s"]


def test_what_everything_bears_counts_for_nothing() -> None:
    beauty = Fact("category", "Beauty")
    assert not SHOP_BOOK.says_something(beauty)
    assert beauty not in [
        found.fact for found in shared_facts(SHOP_BOOK, [5, 6, 7], SHOP_BOOK.of(0))
    ]
    assert shared_facts(SHOP_BOOK, [5, 6, 7], SHOP_BOOK.of(0)) == []
    assert SHOP_BOOK.idf(beauty) < 0.3 < SHOP_BOOK.idf(Fact("brand", "Essie"))


def test_shared_facts_are_narrow_and_counted() -> None:
    found = {
        shared.fact.name: shared.count
        for shared in shared_facts(SHOP_BOOK, [0, 2, 5], SHOP_BOOK.of(1))
    }
    # Nails and Makeup say no more than Nail Polish does.
    assert found == {"OPI Nail Lacquer": 1, "OPI": 1, "Nail Polish": 2}


def test_a_rare_narrow_category_does_not_hide_a_frequent_broad_one() -> None:
    items = [item(str(n), "Makeup", "Face") for n in range(3)]
    items += [item("x", "Makeup", "Nails", "Files"), item("y", "Makeup", "Nails", "Files")]
    items += [item(f"z{n}", "Hair") for n in range(6)]
    book = FactBook(items)
    found = [shared.fact.name for shared in shared_facts(book, [0, 1, 2, 3], book.of(4))]
    assert found == ["Makeup", "Files"]


def test_a_title_tells_the_brand_that_the_catalogue_does_not() -> None:
    books = [
        item("St. Ives Apricot Scrub", brand="St. Ives"),
        item("ST IVES Body Lotion", brand="St. Ives"),
        item("St. Ives Body Wash, 24 oz"),
        item("Body Wash by St. Ives"),  # it does not begin with it
        item("Body Butter", brand="Body"),
        item("Body Scrub", brand="Body"),
        item("Body Milk", brand="Nivea"),
        item("Body Oil"),  # a third of what begins so is of others
        item("Dove Soap", brand="Dove"),
        item("Dove Cream"),  # one title is chance
        item("St. Ives Wipes", brand="Kirkland"),
    ]
    told = [
        [fact.name for fact in FactBook(books[:count]).of(n) if fact.kind == "brand"]
        for count, n in [(10, 2), (10, 3), (10, 7), (10, 9), (11, 10), (11, 2)]
    ]
    assert told == [["St. Ives"], [], [], [], ["Kirkland"], []]


def test_leading_facts_know_no_target() -> None:
    assert leading_facts(SHOP_BOOK, [5, 6])[0].fact == Fact("brand", "WEN by Chaz Dean")


def test_turn() -> None:
    turned = turn(SHOP_BOOK, [0, 1, 2, 5, 3, 4])
    assert turned is not None and turned.fact == Fact("category", "Nail Art") and turned.count == 2
    assert turn(SHOP_BOOK, [0, 1, 2, 0, 1, 2]) is None  # nothing has changed
    assert turn(SHOP_BOOK, [3, 4, 3]) is None and turn(SHOP_BOOK, []) is None  # too short to turn
    assert turn(SHOP_BOOK, [8, 9, 11, 8, 9, 11]) is None  # nothing to say


texts = st.text(alphabet="ab ;>/|.,:é2(19)0", max_size=12)
catalogues = st.lists(
    st.builds(Item, st.just("x"), texts, texts, st.lists(texts, max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


@given(catalogues, st.data())
def test_no_catalogue_breaks_it(items: list[Item], data: st.DataObject) -> None:
    book = FactBook(items)
    places = st.integers(0, len(items) - 1)
    history, target = data.draw(st.lists(places, max_size=8)), data.draw(places)
    for shared in shared_facts(book, history, book.of(target)):
        assert shared.count == sum(shared.fact in book.of(place) for place in history) > 0
        assert shared.fact in book.of(target)
    for place in range(len(items)):
        for fact in book.of(place):
            assert place in book.bearers([fact]) and fact in book.named(fact.name, fact.kind)
            assert not any(mark in fact.name for mark in ("; ", " > ", " / "))
    turned = turn(book, history)
    assert turned is None or any(turned.fact in book.of(place) for place in history[-3:])
