"""`Recommender`: exclusions, lengths, scores and errors, as a caller of the API sees them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import NUM_ITEMS
from whyrec import Recommender
from whyrec.sid.vocabulary import sid_text

MAX_HISTORY = 8  # of the saved model


@pytest.fixture(scope="module")
def recommender(saved_model) -> Recommender:
    return Recommender.from_pretrained(str(saved_model))


@pytest.fixture(scope="module")
def ids(recommender) -> list[str]:
    return [item.item_id for item in recommender.items]


def found_ids(found) -> list[str]:
    return [entry.item_id for entry in found]


def test_recommendations_tell_what_they_are(recommender, extended) -> None:
    found = recommender.recommend(["item003", "item001"], k=5)
    by_id = {item.item_id: n for n, item in enumerate(extended.dataset.items)}
    for entry in found:
        index = by_id[entry.item_id]
        assert entry.title == extended.dataset.items[index].title
        assert entry.sid == sid_text(extended.codes_NL[index].tolist())
        assert math.isfinite(entry.score) and entry.score < 0
        assert list(entry.as_dict()) == ["item_id", "title", "score", "sid"]
        json.dumps(entry.as_dict())


def test_none_excludes_the_history_and_an_empty_list_nothing(recommender, ids) -> None:
    history = ids[4:9]
    assert sorted(found_ids(recommender.recommend(history, k=NUM_ITEMS, width=NUM_ITEMS))) == [
        i for i in ids if i not in history
    ]
    everything = recommender.recommend(history, k=NUM_ITEMS, exclude=[])
    assert sorted(found_ids(everything)) == ids
    assert sum(math.exp(entry.score) for entry in everything) == pytest.approx(1, abs=1e-4)


def test_a_list_excludes_just_its_items(recommender, ids) -> None:
    history, barred = ids[4:9], ids[10:15]
    found = found_ids(recommender.recommend(history, k=NUM_ITEMS, exclude=barred))
    assert sorted(found) == [i for i in ids if i not in barred]
    kept = {e.item_id: e.score for e in recommender.recommend(history, k=NUM_ITEMS, exclude=[])}
    for entry in recommender.recommend(history, k=NUM_ITEMS, exclude=barred):
        assert entry.score == pytest.approx(kept[entry.item_id], abs=1e-5)


def test_all_but_one_and_all_excluded(recommender, ids) -> None:
    for survivor in ids[::7]:
        rest = [i for i in ids if i != survivor]
        assert found_ids(recommender.recommend([ids[0]], k=10, exclude=rest)) == [survivor]
    assert recommender.recommend([ids[0]], k=10, exclude=ids) == []
    assert recommender.recommend(ids, k=10) == []


@settings(max_examples=15, deadline=None)
@given(
    history=st.lists(st.integers(0, NUM_ITEMS - 1), max_size=12),
    k=st.integers(1, NUM_ITEMS + 5),
    data=st.data(),
)
def test_scores_fall_and_items_are_distinct(recommender, ids, history, k, data) -> None:
    barred = data.draw(st.none() | st.lists(st.sampled_from(ids), max_size=NUM_ITEMS))
    asked = [ids[n] for n in history]
    found = recommender.recommend(asked, k=k, exclude=barred)
    gone = set(asked if barred is None else barred)
    assert len(found) == min(k, NUM_ITEMS - len(gone))
    assert len(set(found_ids(found))) == len(found) and not gone & set(found_ids(found))
    scores = [entry.score for entry in found]
    assert scores == sorted(scores, reverse=True)


def test_the_first_k_do_not_depend_on_k(recommender, ids) -> None:
    many = recommender.recommend(ids[:3], k=10, width=NUM_ITEMS)
    few = recommender.recommend(ids[:3], k=3, width=NUM_ITEMS)
    assert found_ids(few) == found_ids(many)[:3]


def test_a_width_below_k_is_raised_to_it(recommender, ids) -> None:
    assert len(recommender.recommend(ids[:2], k=6, width=1)) == 6


def test_an_empty_history(recommender, ids) -> None:
    found = recommender.recommend([], k=NUM_ITEMS)
    assert sorted(found_ids(found)) == ids


def test_a_longer_history_is_cut_to_its_newest_but_excluded_whole(recommender, ids) -> None:
    history = ids[: MAX_HISTORY + 4]
    newest = history[-MAX_HISTORY:]
    long = recommender.recommend(history, k=NUM_ITEMS, exclude=[])
    short = recommender.recommend(newest, k=NUM_ITEMS, exclude=[])
    assert found_ids(long) == found_ids(short)
    assert [e.score for e in long] == pytest.approx([e.score for e in short], abs=1e-5)
    assert not set(found_ids(recommender.recommend(history, k=NUM_ITEMS))) & set(history)
    other = recommender.recommend([*ids[20:22], *newest[2:]], k=NUM_ITEMS, exclude=[])
    assert [e.score for e in other] != pytest.approx([e.score for e in short], abs=1e-5)


def test_an_item_may_come_twice_in_a_history(recommender, ids) -> None:
    found = found_ids(recommender.recommend([ids[1], ids[2], ids[1]], k=NUM_ITEMS))
    assert sorted(found) == [i for i in ids if i not in (ids[1], ids[2])]


@pytest.mark.parametrize("where", ["history", "exclude"])
def test_an_unknown_item_names_the_nearest(recommender, where) -> None:
    asked = {"history": ["item001"], "exclude": []} | {where: ["item1"]}
    with pytest.raises(ValueError, match=r"unknown item 'item1'.*\bitem0?1"):
        recommender.recommend(asked["history"], exclude=asked["exclude"])


def test_an_unknown_item_that_is_like_nothing(recommender) -> None:
    with pytest.raises(ValueError, match="unknown item '§§§'; known ids are like item000, item001"):
        recommender.recommend(["§§§"])
    with pytest.raises(ValueError, match="unknown item 4; "):
        recommender.recommend([4])  # type: ignore[list-item]


@pytest.mark.parametrize("k", [0, -3])
def test_k_must_be_positive(recommender, k) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        recommender.recommend([], k=k)


def test_one_id_instead_of_a_list_is_told(recommender) -> None:
    with pytest.raises(ValueError, match="list"):
        recommender.recommend("item001")


@pytest.mark.parametrize("width", [5, NUM_ITEMS, NUM_ITEMS + 10])
def test_a_batch_ranks_as_each_history_alone(recommender, extended, ids, width) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, NUM_ITEMS, n) for n in (1, 3, 12, 0, 8)]
    excluded, kept = recommender.rank(histories, width=width, exclude_history=[True, False])
    for e, history in enumerate(histories):
        asked = [ids[n] for n in history]
        for ranking, exclude in ((excluded, None), (kept, [])):
            alone = recommender.recommend(asked, k=width, width=width, exclude=exclude)
            items = [ids[n] for n in ranking.items_EW[e] if n >= 0]
            assert ranking.items_EW.shape == (len(histories), width)
            assert items == found_ids(alone)
            assert ranking.scores_EW[e, : len(items)] == pytest.approx(
                [entry.score for entry in alone], abs=1e-4
            )
            assert np.all(ranking.scores_EW[e, len(items) :] == -np.inf)


def test_many_batches_rank_as_one(recommender, monkeypatch) -> None:
    from whyrec.decode import ranking

    rng = np.random.default_rng(1)
    histories = [rng.integers(0, NUM_ITEMS, n % 9) for n in range(20)]
    (one,) = recommender.rank(histories, width=10)
    monkeypatch.setattr(ranking, "_BATCH_TOKENS", {"cpu": 100})
    (many,) = recommender.rank(histories, width=10)
    assert np.array_equal(one.items_EW, many.items_EW)
    np.testing.assert_allclose(one.scores_EW, many.scores_EW, atol=1e-4)


def test_no_histories(recommender) -> None:
    (nothing,) = recommender.rank([], width=10)
    assert nothing.items_EW.shape == (0, 10)
