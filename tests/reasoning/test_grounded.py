"""The grounded writer: true, read back exactly, regular, and silent about the target."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_catalogues import FILMS, SHOP, item, vectors_of

from whyrec.catalog.dataset import Item
from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.filters import RationaleFilter
from whyrec.reasoning.grounded import SPECIFICITIES, GroundedSettings, GroundedWriter, Rationale
from whyrec.reasoning.titles import words_of
from whyrec.reasoning.trace import check_trace, read_trace
from whyrec.reasoning.wording import packaged_wording


def writer(items: list[Item], **options: Any) -> GroundedWriter:
    shown = options.pop("shown", ())
    settings = GroundedSettings(**({"paraphrases": 1} | options))  # type: ignore[arg-type]
    return GroundedWriter(
        items, vectors_ND=vectors_of(items), settings=settings, seed=0, shown=shown
    )


def write(one: GroundedWriter, history: list[int], target: int, user: int = 0) -> Rationale:
    rationale = one.write(history, target, user=user, position=len(history))
    assert rationale is not None
    return rationale


@pytest.mark.parametrize(
    ("announce", "expected"),
    [
        ("broad", "Makeup."),
        ("category", "Makeup > Nails > Nail Polish."),
        ("supported", "Makeup > Nails > Nail Polish in the OPI Nail Lacquer line by OPI."),
        ("full", "Makeup > Nails > Nail Polish in the OPI Nail Lacquer line by OPI."),
    ],
)
def test_how_much_is_announced(announce: str, expected: str) -> None:
    text = write(writer(SHOP, announce=(announce,)), [5, 0, 3], 1).text
    assert text == f"The history shares OPI Nail Lacquer; Nail Polish; OPI. Next: {expected}"


def test_brands_are_announced_where_one_may_expect_them() -> None:
    one = writer(SHOP)
    # Two of the three nail polishes are OPI's, one is Essie's: only the first is to be expected.
    assert "by OPI" in write(one, [3], 0).text and "line" not in write(one, [3], 0).text
    assert "Essie" not in write(one, [3], 2).text
    assert "by Essie" in write(one, [2], 2).text
    assert "by Essie" in write(writer(SHOP, announce=("full",)), [3], 2).text


def test_a_turn_is_told_once() -> None:
    assert "Lately Nail Art." in write(writer(SHOP), [0, 1, 2, 5, 3, 4], 6).text
    assert "Lately" not in write(writer(SHOP), [0, 1, 2, 5, 3, 4], 4).text  # it is evidence already


def test_nothing_shared_is_a_jump() -> None:
    rationale = write(writer(SHOP), [3, 4], 2)
    assert rationale.jump
    assert rationale.text == "Something new after Nail Art. Next: Makeup > Nails > Nail Polish."


def test_what_the_catalogue_knows_nothing_of_has_no_rationale() -> None:
    assert writer(SHOP).write([0, 1], 9, user=0, position=2) is None
    assert writer(SHOP).write([], 0, user=0, position=0) is not None


def test_a_series_that_is_the_title_is_not_told() -> None:
    one = writer(FILMS)
    assert "in the Toy Story line" in write(one, [0, 6], 1).text
    assert "Toy Story" not in write(one, [1, 6], 0).text
    sequel = ["Godfather, The (1972)", "Godfather: Part II, The (1974)"]
    one = writer([*(item(title, "Crime", "Drama") for title in sequel), *FILMS])
    assert "in the Godfather line" in write(one, [0], 1).text
    assert "Godfather" not in write(one, [1], 0).text


def test_drawn_from_seed_user_and_position_alone() -> None:
    options = {"announce": SPECIFICITIES, "paraphrases": 3}
    one, again = writer(SHOP, **options), writer(SHOP, **options)
    texts = [write(one, [5, 0, 3], 1, user).text for user in range(60)]
    assert texts == [write(again, [5, 0, 3], 1, user).text for user in reversed(range(60))][::-1]
    assert len(set(texts)) > 15


def test_what_is_expected_is_the_same_whatever_comes() -> None:
    one = writer(SHOP, announce=("expected",))
    texts = {write(one, [0, 1, 0], target).text for target in range(7)}
    assert texts == {
        "The history shares OPI Nail Lacquer; Nail Polish; OPI. "
        "Next: Makeup > Nails > Nail Polish in the OPI Nail Lacquer line by OPI."
    }


def test_the_notes_of_a_history_vote_on_what_is_expected() -> None:
    asked = []

    def near(history: Sequence[int], own: Sequence[int]) -> list[list[tuple[int, int]]]:
        asked.append((history, own))
        return [[(0, 9)], [(6, 3), (5, 0)]]

    one = GroundedWriter(
        SHOP,
        vectors_ND=vectors_of(SHOP),
        settings=GroundedSettings(("expected",)),
        seed=0,
        near=near,
    )
    rationale = one.write([3, 4], 2, user=0, position=2, own=[3, 4, 2])
    assert rationale is not None
    assert asked == [([3, 4], [3, 4, 2])]
    # Item 0 has 8 votes of the older event's note, items 6 and 5 have 4 and 1.
    told = [fact for fact in one.book.categories(0) if one.book.says_something(fact)]
    assert list(rationale.announced[: len(told)]) == told


def test_a_history_is_told_of_what_its_notes_spell_out() -> None:
    shown = [f"{one.title} {one.brand}"[:24] for one in SHOP]  # "WEN by Chaz" is cut off
    one = writer(SHOP, shown=shown, readable=True)
    rationale = write(one, [2, 0, 5], 1)
    # Nail Polish is shared as well, and stands in no title.
    assert rationale.text.startswith("The history shares OPI Nail Lacquer; OPI. Next: ")
    assert "Nail Polish" in rationale.text  # what is announced is not limited
    said = write(writer(SHOP, announce=("expected",), shown=shown, readable=True), [5, 6], 2).text
    assert said == "Next: Hair Care > Conditioners by WEN by Chaz Dean."
    assert "WEN by Chaz Dean" in write(writer(SHOP, announce=("expected",)), [5, 6], 2).text


@given(st.lists(st.integers(0, len(SHOP) - 1), min_size=1, max_size=8), st.data())
def test_what_is_told_of_a_history_can_be_read(history: list[int], data: st.DataObject) -> None:
    shown = [data.draw(st.sampled_from([one.title, one.brand, ""])) for one in SHOP]
    announce = data.draw(st.sampled_from(SPECIFICITIES))
    one = writer(SHOP, announce=(announce,), shown=shown, readable=True)
    rationale = one.write(history, data.draw(st.integers(0, len(SHOP) - 1)), user=0, position=1)
    if rationale is not None:
        for fact in (*rationale.evidence, *rationale.turn):
            bearers = [item for item in history if fact in one.book.of(item)]
            assert any(" ".join(words_of(fact.name)) in _plain(shown[item]) for item in bearers)


def _plain(text: str) -> str:
    return " ".join(words_of(text))


def test_what_the_rest_of_the_filter_refuses_is_refused_of_guesses() -> None:
    checker = RationaleFilter(SHOP, book=FactBook(SHOP), count_tokens=len, max_tokens=999)
    guessing = RationaleFilter(
        SHOP, book=FactBook(SHOP), count_tokens=len, max_tokens=999, guesses=True
    )
    wrong = "The history shares Nail Polish. Next: Hair Care."
    assert checker.reason(wrong, [0, 1], 2) == "says of the target what is not so"
    assert guessing.reason(wrong, [0, 1], 2) is None
    invented = "The history shares Nail Polish. Next: Boats."
    assert guessing.reason(invented, [0, 1], 2) == "says of the target what is not so"


@pytest.mark.parametrize(
    "options", [{"announce": ("brand",)}, {"announce": ()}, {"max_evidence": 0}, {"pruned": 0}]
)
def test_settings_that_cannot_be(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GroundedSettings(**options)


@pytest.mark.parametrize("items", [SHOP, FILMS])
@pytest.mark.parametrize("announce", SPECIFICITIES)
def test_every_rationale_is_true_and_read_back_exactly(items: list[Item], announce: str) -> None:
    one = writer(items, announce=(announce,), paraphrases=9)
    checker = RationaleFilter(
        items,
        book=one.book,
        count_tokens=len,
        max_tokens=999,
        guesses=announce == "expected",
    )
    places = range(len(items))
    histories = [list(pair) for pair in itertools.product(places, places)]
    for number, (history, target) in enumerate(itertools.product(histories, places)):
        history = [*history, *history[:1], (number * 7) % len(items)]
        rationale = one.write(history, target, user=number, position=4)
        if rationale is None:
            assert not one.book.of(target) or announce in ("broad", "expected")
            continue
        trace = read_trace(rationale.text, one.book)
        said = [claim.facts[0] for claim in trace.claims]
        assert trace.well_formed
        assert said == [*rationale.evidence, *rationale.turn, *rationale.announced]
        assert [claim.name for claim in trace.claims] == [
            rationale.text[claim.start : claim.end] for claim in trace.claims
        ]
        check = check_trace(trace, history, one.book)
        assert check.true == check.named and check.possible and not check.false
        if target not in history:  # a repeated item may be known by its series
            assert checker.reason(rationale.text, history, target) is None


names = st.text(alphabet="ab ;>/|.,:&'", min_size=1, max_size=8)
awkward = st.lists(
    st.builds(Item, names, names, names, st.lists(names, max_size=3).map(tuple)),
    min_size=2,
    max_size=7,
)


@settings(max_examples=150, deadline=None)
@given(awkward, st.data())
def test_awkward_names_are_read_back(items: list[Item], data: st.DataObject) -> None:
    one = writer(items, announce=SPECIFICITIES, paraphrases=9)
    places = st.integers(0, len(items) - 1)
    history, target = data.draw(st.lists(places, max_size=6)), data.draw(places)
    rationale = one.write(history, target, user=data.draw(st.integers(0, 99)), position=1)
    if rationale is None:
        return
    trace = read_trace(rationale.text, one.book)
    assert trace.well_formed
    told = [*rationale.evidence, *rationale.turn, *rationale.announced]
    assert len(trace.claims) == len(told)
    assert all(fact in claim.facts for fact, claim in zip(told, trace.claims, strict=True))


def test_brands_that_hold_the_words_of_a_tail() -> None:
    one = writer(SHOP)
    text = write(one, [6], 5).text
    assert text.endswith("Next: Hair Care > Shampoos by WEN by Chaz Dean.")
    brand = read_trace(text, one.book).announced[-1]
    assert (brand.name, brand.facts[0].kind) == ("WEN by Chaz Dean", "brand")


def test_the_clauses_of_the_template_file_can_be_told_apart() -> None:
    wording = packaged_wording()
    for clause in ("evidence", "jump", "turn", "next"):
        assert wording.paraphrases(clause) >= 2  # type: ignore[arg-type]
