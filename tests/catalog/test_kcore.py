import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrec.catalog.kcore import k_core

events = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40)


def brute_force(pairs: list[tuple[int, int]], k: int) -> list[bool]:
    """The definition: drop one user or item with too few events, look again."""
    keep = [True] * len(pairs)
    while True:
        for side in (0, 1):
            kept = [pair[side] for pair, stays in zip(pairs, keep, strict=True) if stays]
            if thin := [name for name in kept if kept.count(name) < k]:
                keep = [
                    stays and pair[side] != thin[0] for pair, stays in zip(pairs, keep, strict=True)
                ]
                break
        else:
            return keep


@settings(deadline=None)
@given(events, st.integers(0, 5))
def test_equals_the_definition(pairs: list[tuple[int, int]], k: int) -> None:
    users, items = (np.array([p[side] for p in pairs], np.int32) for side in (0, 1))
    assert k_core(users, items, k=k).tolist() == brute_force(pairs, k)


@settings(deadline=None)
@given(events, st.integers(0, 5))
def test_applying_it_twice_changes_nothing(pairs: list[tuple[int, int]], k: int) -> None:
    users, items = (np.array([p[side] for p in pairs], np.int32) for side in (0, 1))
    keep = k_core(users, items, k=k)
    assert k_core(users[keep], items[keep], k=k).all()


@pytest.mark.parametrize("k", [0, 1])
def test_zero_and_one_are_off(k: int) -> None:
    assert k_core(np.array([0, 1]), np.array([0, 1]), k=k).all()
