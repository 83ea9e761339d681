"""Rationales that must not be trained on, planted one by one."""

import pytest
from reasoning_catalogues import FILM_BOOK, FILMS, SHOP, SHOP_BOOK

from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.filters import RationaleFilter, Row, filter_rationales

RED = "OPI Nail Lacquer, Big Apple Red"


def checker(items: list, book: FactBook, **options: object) -> RationaleFilter:
    usual = {"count_tokens": lambda text: len(text.split()), "min_tokens": 2, "max_tokens": 20}
    return RationaleFilter(items, book=book, **(usual | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("They like Nail Polish by OPI, so more of it.", None),
        ("Having Essie Ballet Slippers, they want Nail Polish.", None),  # a title of the history
        (f"They will take {RED}.", "title"),
        ("They will take opi nail lacquer big apple red.", "title"),
        ("Surely nail lacquer, Big Apple shade.", "repeats"),
        ("Fond of the OPI Nail Lacquer line.", None),  # a series of the history
        ("They like Nail Polish, so <s_a_3> it is.", "SID"),
        ("They like Nail Polish <|sid_begin|> yes", "SID"),
        ("<think> They like Nail Polish", "SID"),
        ("They like Shampoos, so more of it.", "neither"),  # of neither history nor target
        ("After Argan Oil, more Nail Polish.", "neither"),  # a title that is not in the history
        ("OPI", "short"),
        ("So " * 30, "long"),
        ("  ", "nothing"),
        (None, "nothing"),
    ],
)
def test_free_text(text: str | None, reason: str | None) -> None:
    why = checker(SHOP, SHOP_BOOK, free_text=True).reason(text, history=[1, 2], target=0)
    assert (why is None) if reason is None else (why is not None and reason in why)


def test_a_series_is_a_leak_where_the_history_has_none_of_it() -> None:
    free = checker(FILMS, FILM_BOOK, free_text=True)
    text = "In the mood for Toy Story and Comedy."
    assert free.reason(text, history=[0], target=1) is None
    assert free.reason(text, history=[9], target=1) is not None
    assert "title" in str(free.reason(text, history=[1], target=0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("They keep to OPI. Next: Makeup > Nails > Nail Polish by OPI.", None),
        ("They keep to Shampoos. Next: Makeup > Nails.", "history"),
        ("They keep to OPI. Next: Hair Care.", "target"),
        ("They keep to OPI. Next: Makeup by Essie.", "target"),
        ("They keep to OPI and more.", "words"),
        ("They keep to OPI. So there. Next: Makeup.", "history"),
    ],
)
def test_the_grounded_writers_words(text: str, reason: str | None) -> None:
    why = checker(SHOP, SHOP_BOOK).reason(text, history=[1, 2], target=0)
    assert (why is None) if reason is None else (why is not None and reason in why)


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Tense, so Heat next.", True),
        ("They feel the heat.", False),
        ("They like Action and Drama.", False),
    ],
)
def test_titles_of_one_word(text: str, leaks: bool) -> None:
    why = checker(FILMS, FILM_BOOK, free_text=True).reason(text, history=[2, 7], target=6)
    assert (why is not None) == leaks


def test_a_title_that_is_a_category_may_be_said() -> None:
    items = [*SHOP[:2], SHOP[2].__class__("x", "Nail Polish", "", SHOP[0].categories)]
    book = FactBook(items)
    assert checker(items, book, free_text=True).reason("More Nail Polish, please.", [0], 2) is None


def test_untitled_targets_cannot_leak() -> None:
    assert (
        checker(SHOP, SHOP_BOOK, free_text=True).reason("They like OPI very much.", [0], 11) is None
    )


def test_report() -> None:
    good = "They keep to OPI. Next: Makeup."
    texts = [good, None, f"It is {RED}.", good, "x", None]
    rows = [Row(user, 2, [1, 2], 0, text) for user, text in enumerate(texts)]
    reasons, report = filter_rationales(rows, checker(SHOP, SHOP_BOOK))
    assert [user for user, why in enumerate(reasons) if why is None] == [0, 3]
    assert (report.written, report.kept, report.mean_tokens) == (6, 2, 6.0)
    assert report.share_kept == pytest.approx(1 / 3)
    assert report.dropped == {"nothing written": 2, "names the target's title": 1, "too short": 1}
    assert list(report.dropped) == ["nothing written", "names the target's title", "too short"]
