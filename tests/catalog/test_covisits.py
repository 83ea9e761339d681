"""Co-visits against brute force: who is near whom, and never what only the user did."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrec.catalog.covisits import BACKWARD, WINDOW, CoVisits

NUM_ITEMS = 9
sequences_of_users = st.lists(
    st.lists(st.integers(0, NUM_ITEMS - 1), max_size=12), min_size=1, max_size=8
)


def counted(sequences: list[list[int]], **settings: int) -> CoVisits:
    arrays = [np.array(sequence, np.int32) for sequence in sequences]
    return CoVisits.count(arrays, num_items=NUM_ITEMS, **settings)


def near_items(visits: CoVisits, history: list[int], **how: Any) -> list[list[int]]:
    """The neighbours without their scores."""
    return [items.tolist() for items, _ in visits.neighbours(history, **how)]


def brute_force(
    sequences: list[list[int]], history: list[int], *, without: int, damping: float
) -> list[dict[int, float]]:
    """For each event the scores of its neighbours, as if one user had never been counted."""
    counts: dict[tuple[int, int], float] = defaultdict(float)
    events: dict[int, int] = defaultdict(int)
    for sequence in (sequence for user, sequence in enumerate(sequences) if user != without):
        for place, item in enumerate(sequence):
            events[item] += 1
            for other in range(len(sequence)):
                distance = other - place
                if 0 < abs(distance) <= WINDOW:
                    weight = (1 if distance > 0 else BACKWARD) / abs(distance)
                    counts[item, sequence[other]] += weight
    scores = []
    for place, item in enumerate(history):
        near = {j: counts[item, j] / (events[j] + 1) ** damping for j in range(NUM_ITEMS)}
        seen = history[: place + 1]
        scores.append({j: s for j, s in near.items() if s > 0 and j not in seen})
    return scores


@settings(max_examples=150, deadline=None)
@given(sequences=sequences_of_users, data=st.data())
def test_a_users_own_pairs_are_taken_out(sequences: list[list[int]], data: st.DataObject) -> None:
    user = data.draw(st.integers(0, len(sequences) - 1))
    own = sequences[user]
    history = [item for item in own if data.draw(st.booleans())]  # some events left out
    visits = counted(sequences, kept=None)
    how = {"damping": data.draw(st.sampled_from([0.0, 0.5]))}
    found = near_items(visits, history, k=NUM_ITEMS, own=own, **how)
    expected = brute_force(sequences, history, without=user, **how)
    for near, scores in zip(found, expected, strict=True):
        assert set(near) == set(scores)
        assert all(scores[a] > scores[b] - 1e-4 for a, b in pairwise(near))
    for k in (1, 2):
        assert near_items(visits, history, k=k, own=own, **how) == [near[:k] for near in found]


def test_what_only_this_user_did_is_no_news() -> None:
    visits = counted([[0, 1, 2], [0, 3]])
    assert near_items(visits, [0], k=3, own=[0, 1, 2]) == [[3]]
    assert near_items(visits, [0], k=3) == [[1, 3, 2]]  # somebody who was never counted


def test_items_seen_so_far_are_no_neighbours_and_later_ones_are() -> None:
    visits = counted([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
    assert near_items(visits, [0, 1, 2], k=3, own=[0, 1, 2]) == [[1, 2], [2], []]
    assert near_items(visits, [0, 1, 2], k=3, own=[0, 1, 2], last=2) == [[2], []]


def test_the_best_are_kept() -> None:
    rng = np.random.default_rng(0)
    sequences = rng.integers(0, NUM_ITEMS, (40, 8)).tolist()
    whole, cut = counted(sequences, kept=None), counted(sequences, kept=3)
    for item in range(NUM_ITEMS):
        near = near_items(whole, [item], k=9, damping=0.0)
        assert near_items(cut, [item], k=9, damping=0.0) == [near[0][:3]]


def test_saved_and_loaded_for_a_catalogue_that_has_changed(tmp_path: Path) -> None:
    visits = counted([[0, 1, 2], [0, 2, 4], [4, 0]])
    names = [f"i{n}" for n in range(NUM_ITEMS)]
    visits.save(tmp_path / "covisits.parquet", item_ids=names)
    again = CoVisits.load(tmp_path / "covisits.parquet", item_ids=names)
    assert near_items(again, [0, 4], k=9) == near_items(visits, [0, 4], k=9)
    # Item 2 has gone, a new one has come first and another last.
    changed = ["new", *[name for name in names if name != "i2"], "newer"]
    moved = CoVisits.load(tmp_path / "covisits.parquet", item_ids=changed)
    expected = [changed.index(names[j]) for j in near_items(visits, [0], k=9)[0] if j != 2]
    assert near_items(moved, [changed.index("i0")], k=9) == [expected]
    assert near_items(moved, [0, len(changed) - 1], k=9) == [[], []]


def test_a_missing_or_damaged_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whyrec index --force"):
        CoVisits.load(tmp_path / "covisits.parquet", item_ids=[])
    (tmp_path / "covisits.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="whyrec index --force"):
        CoVisits.load(tmp_path / "covisits.parquet", item_ids=[])
