"""Which items are alike: against brute force, and through files whose catalogue changes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from whyrec.catalog.alike import Alike, word_weights
from whyrec.catalog.dataset import Item

WORDS = ["red", "blue", "shoe", "hat", "Oz", "12", "ÄRMEL"]
titles = st.lists(st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join), max_size=9)


@settings(max_examples=60, deadline=None)
@given(titles=titles, kept=st.integers(0, 4))
def test_the_nearest_are_those_of_all_pairs(titles: list[str], kept: int) -> None:
    items = [Item(str(n), title) for n, title in enumerate(titles)]
    alike = Alike.measure(items, kept=kept)
    kept = min(kept, max(len(items) - 1, 0))
    assert alike.near_NK.shape == alike.cosines_NK.shape == (len(items), kept)
    if not any(titles):
        assert (alike.near_NK == -1).all()
        return
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    weights_NV = vectorizer.fit_transform(titles).toarray()
    cosines_NN = weights_NV @ weights_NV.T
    np.fill_diagonal(cosines_NN, 0)
    for item, near_K in enumerate(alike.near_NK):
        known = near_K[near_K >= 0]
        assert item not in known and len(set(known)) == len(known)
        expected = np.sort(cosines_NN[item])[::-1][:kept]
        assert alike.cosines_NK[item] == pytest.approx(expected, abs=1e-6)
        assert cosines_NN[item, known] == pytest.approx(expected[: len(known)], abs=1e-6)
        assert (expected[len(known) :] == 0).all()


def test_brands_count_and_each_sign_of_scripts_without_spaces_is_a_word() -> None:
    items = [
        Item("a", "唇膏 红", "Acme"),
        Item("b", "口红"),
        Item("c", "tin"),
        Item("d", "", "ACME"),
    ]
    near = Alike.measure(items).near_NK
    assert set(near[0, :2].tolist()) == {1, 3} and (near[2] == -1).all() and near[3, 0] == 0


def test_liked_items_come_first_but_not_for_ones_own_events() -> None:
    items = [Item(str(n), title) for n, title in enumerate(["red", "red hat", "red bag", "tin"])]
    alike = Alike.measure(items)
    how = {"k": 9, "events_N": np.array([0.0, 1.0, 9.0, 50.0])}
    assert told(alike.beside([0], **how)) == [[2, 1]]
    assert told(alike.beside([0], own=[2] * 9, **how)) == [[1, 2]]
    assert told(alike.beside([0], popularity=0, **how)) == [[1, 2]]
    assert told(alike.beside([0], **how | {"k": 1})) == [[2]]
    # No event is told of itself or of those before it, and what is like none is like none.
    assert told(alike.beside([1, 3, 2, 0], **how)) == [[0, 2], [], [0], []]
    assert told(alike.beside([1, 3, 2, 0], last=2, **how)) == [[0], []]
    assert told(alike.beside([7, 0], **how)) == [[], [2, 1]]  # 7 came after the measurement
    assert alike.beside([], **how) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data(), titles=titles.filter(len), k=st.integers(1, 4))
def test_beside_is_what_sorting_every_event_by_itself_finds(data, titles, k: int) -> None:
    items = [Item(str(n), title) for n, title in enumerate(titles)]
    alike = Alike.measure(items, kept=5)
    some = st.lists(st.integers(0, len(items) - 1), max_size=6)
    history, own, counted = data.draw(some), data.draw(st.none() | some), data.draw(some)
    events_N = np.bincount(counted, minlength=len(items)).astype(float)
    found = told(alike.beside(history, k=k, events_N=events_N, own=own))
    mine = history if own is None else own
    for place, event in enumerate(history):
        scores = {}
        for other, cosine in zip(alike.near_NK[event], alike.cosines_NK[event], strict=True):
            if other >= 0 and other not in history[: place + 1]:
                liked = max(events_N[other] - mine.count(other), 0) + 1
                scores[int(other)] = float(cosine) ** 2 * liked**0.25
        assert len(found[place]) == min(k, len(scores))
        expected = sorted(scores.values(), reverse=True)[:k]
        assert [scores[other] for other in found[place]] == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), titles=titles.filter(lambda titles: len(titles) > 1))
def test_new_items_join_where_they_belong(data, titles) -> None:
    items = [Item(str(n), title) for n, title in enumerate(titles)]
    many = data.draw(st.integers(1, len(items)))
    ids = [item.item_id for item in items]
    before = Alike.measure(items[:many], kept=3)
    pad = ((0, len(items) - many), (0, 0))
    start = Alike(np.pad(before.near_NK, pad, constant_values=-1), np.pad(before.cosines_NK, pad))
    changed = data.draw(st.sets(st.integers(0, many - 1), max_size=2))
    items = [
        Item(i, "red hat") if n in changed else item
        for n, (i, item) in enumerate(zip(ids, items, strict=True))
    ]
    new = sorted(changed | set(range(many, len(items))))
    ours = start.joined(items, new=new)
    kept = start.near_NK.shape[1]
    weights_NV = word_weights(items).toarray()
    cosines_NN = weights_NV @ weights_NV.T
    np.fill_diagonal(cosines_NN, 0)
    for item in range(len(items)):
        if item in new:
            possible = cosines_NN[item]
        else:
            possible = np.zeros(len(items))
            possible[new] = cosines_NN[item, new]
            for other, cosine in zip(start.near_NK[item], start.cosines_NK[item], strict=True):
                if other >= 0 and other not in new:
                    possible[other] = cosine
        expected = np.sort(possible)[::-1][:kept]
        assert ours.cosines_NK[item] == pytest.approx(expected, abs=1e-6)
        known = ours.near_NK[item] >= 0
        assert possible[ours.near_NK[item][known]] == pytest.approx(
            expected[: known.sum()], abs=1e-6
        )
        assert (expected[known.sum() :] == 0).all()


def told(found: list[np.ndarray]) -> list[list[int]]:
    return [items.tolist() for items in found]


def test_a_file_outlives_changes_of_the_catalogue(tmp_path: Path) -> None:
    items = [Item(n, title) for n, title in zip("abcd", ["red", "red hat", "hat", ""], strict=True)]
    alike = Alike.measure(items)
    alike.save(tmp_path / "alike.parquet", item_ids=list("abcd"))
    same = Alike.load(tmp_path / "alike.parquet", item_ids=list("abcd"))
    assert np.array_equal(same.near_NK, alike.near_NK)
    assert np.array_equal(same.cosines_NK, alike.cosines_NK)
    # "a" is gone, "new" has come, and the order is another
    other = Alike.load(tmp_path / "alike.parquet", item_ids=["new", "c", "d", "b"])
    best = [told(other.beside([item], k=3, events_N=np.zeros(4))) for item in range(4)]
    assert best == [[[]], [[3]], [[]], [[1]]]


def test_a_damaged_file_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "alike.parquet"
    with pytest.raises(ValueError, match="cannot read which items are alike"):
        Alike.load(path, item_ids=["a"])
    pq.write_table(pa.table({"item_id": ["a"]}), path)
    with pytest.raises(ValueError, match="copy the model folder again"):
        Alike.load(path, item_ids=["a"])
