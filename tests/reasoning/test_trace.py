"""Traces read back: good ones, garbled ones, lies."""

import pytest
from reasoning_catalogues import SHOP, SHOP_BOOK

from whyrec.reasoning.facts import Fact
from whyrec.reasoning.mentions import MentionFinder
from whyrec.reasoning.trace import agreement, check_trace, read_free_text, read_trace

GOOD = "They keep to Nail Polish; OPI. Lately Nail Art. Next: Makeup > Nails > Nail Polish by OPI."


def test_claims_have_places_and_facts() -> None:
    trace = read_trace(GOOD, SHOP_BOOK)
    assert trace.well_formed
    assert [(c.clause, c.name) for c in trace.claims] == [
        ("evidence", "Nail Polish"),
        ("evidence", "OPI"),
        ("turn", "Nail Art"),
        ("next", "Makeup"),
        ("next", "Nails"),
        ("next", "Nail Polish"),
        ("next", "OPI"),
    ]
    assert [GOOD[c.start : c.end] for c in trace.claims] == [c.name for c in trace.claims]
    assert trace.announced[-1].facts == (Fact("brand", "OPI"),)


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("", 0),
        ("You like nice things.", 0),
        (GOOD[:30], 2),
        (GOOD[:-1], 7),
        (f"Well. {GOOD}", 7),
        (f"{GOOD} {GOOD}", 14),
        ("Next: Makeup. They keep to OPI.", 2),
        ("They keep to ; ; . Next: .", 0),
        ("Next: something.", 0),
        ("They keep to OPI.  Next: Makeup.", 2),
    ],
)
def test_what_is_no_whole_trace_is_read_as_far_as_it_goes(text: str, claims: int) -> None:
    trace = read_trace(text, SHOP_BOOK)
    assert len(trace.claims) == claims
    assert trace.well_formed == (text == "Next: something.")


@pytest.mark.parametrize(
    ("text", "history", "false"),
    [
        (GOOD, [0, 1, 2, 3, 4], []),
        (GOOD, [2, 3, 4], ["OPI"]),  # not of this history
        (GOOD, [3, 4, 0, 1, 2], ["Nail Art"]),  # no longer what is new
        ("They keep to Nail Polsh. Next: Makeup by Nobody.", [0], ["Nail Polsh", "Nobody"]),
        ("Something new after Shampoos. Next: Hats.", [5], ["Hats"]),
        ("You like nice things.", [0], []),
    ],
)
def test_planted_lies_are_found(text: str, history: list[int], false: list[str]) -> None:
    check = check_trace(read_trace(text, SHOP_BOOK), history, SHOP_BOOK)
    assert [claim.name for claim in check.false] == false
    assert check.true == check.named - len(false)


def test_what_no_item_is_is_not_possible() -> None:
    for text, possible in [
        ("Next: Makeup > Nails by Essie.", True),
        ("Next: Hair Care > Shampoos by Essie.", False),
        ("Next: Hats.", True),  # false, but there is nothing to put together
    ]:
        assert check_trace(read_trace(text, SHOP_BOOK), [0], SHOP_BOOK).possible == possible


def test_agreement_with_items() -> None:
    announced = read_trace(GOOD, SHOP_BOOK).announced
    assert agreement(announced, SHOP_BOOK, [0, 1, 2, 10]) == {
        "category": 0.75,  # the narrowest
        "brand": 0.75,
        "all": 0.5,
    }
    assert agreement(announced, SHOP_BOOK, []) == agreement((), SHOP_BOOK, [0]) == {}


def test_free_text() -> None:
    finder = MentionFinder(SHOP_BOOK, titles=[one.title for one in SHOP])
    text = "Having bought OPI and Essie, nail polish again or Shampoos."
    trace = read_free_text(text, finder)
    assert [claim.name for claim in trace.claims] == ["OPI", "Essie", "nail polish", "Shampoos"]
    check = check_trace(trace, [0, 2], SHOP_BOOK)
    assert [claim.name for claim in check.false] == ["Shampoos"]
