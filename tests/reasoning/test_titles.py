"""Series, read off titles that set traps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whyrec.reasoning.titles import bare_title, series_of, words_of, year_of


@pytest.mark.parametrize(
    ("titles", "series"),
    [
        (["Toy Story (1995)", "Toy Story 2 (1999)"], "Toy Story"),
        (["Godfather, The (1972)", "Godfather: Part II, The (1974)"], "Godfather"),
        (["Under Siege (1992)", "Under Siege 2: Dark Territory (1995)"], "Under Siege"),
        (
            ["Father of the Bride (1950)", "Father of the Bride Part II (1995)"],
            "Father of the Bride",
        ),
        (["Batman", "Batman Returns", "Batman Forever"], "Batman"),
        (["OPI Nail Lacquer, Red", "OPI Nail Lacquer, Blue"], "OPI Nail Lacquer"),
        (["Star Trek: Generations", "Star Trek III: Spock", "Star Trek VI: Home"], "Star Trek"),
    ],
)
def test_series(titles: list[str], series: str) -> None:
    assert series_of(titles) == [series] * len(titles)


@pytest.mark.parametrize(
    "titles",
    [
        ["Heat (1995)", "Heat (1972)"],  # one title twice
        ["Michael (1996)", "Michael Collins (1996)"],  # chance
        ["In the Line of Fire", "In the Name of the Father"],
        ["Boys", "Boys on the Side", "Boys of St. Vincent, The"],
        ["", "", "(1990)", "2 (1990)", "3"],
        ["1984", "1984: a film"],  # no letters
        ["Henry V", "Jack"],
    ],
)
def test_no_series(titles: list[str]) -> None:
    assert series_of(titles) == [""] * len(titles)


def test_a_word_that_half_the_catalogue_begins_with_is_no_series() -> None:
    assert not any(series_of([f"Film {n}" for n in range(100)]))


@given(st.lists(st.text(max_size=30)))
def test_any_titles_give_a_piece_of_each(titles: list[str]) -> None:
    for title, series in zip(titles, series_of(titles), strict=True):
        assert series in bare_title(title)
        assert bool(series) == bool(words_of(series))


@pytest.mark.parametrize(
    ("title", "bare", "year"),
    [
        ("Empire Strikes Back, The (1980)", "The Empire Strikes Back", 1980),
        ("Postino, Il (1994)", "Il Postino", 1994),
        ("Die xue shuang xiong (Killer, The) (1989)", "Die xue shuang xiong", 1989),
        ("Serum (30 ml)", "Serum", None),
        ("(500)", "(500)", None),
        ("", "", None),
    ],
)
def test_bare_title_and_year(title: str, bare: str, year: int | None) -> None:
    assert bare_title(title) == bare
    assert year_of(title) == year
