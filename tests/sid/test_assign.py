"""Every item one SID and every SID one item, whatever the vectors are."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from whyrec.sid import assign
from whyrec.sid.assign import assign_new, assign_unique
from whyrec.sid.capacity import place, rank_in_cell
from whyrec.sid.kmeans import BalancedKMeans, ResidualKMeans


def quantizer_of(sizes, *, dim=3, seed=0, cls=ResidualKMeans):
    """A quantiser whose codebooks are noise, smaller from level to level."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = cls(level_sizes=sizes)
    quantizer.codebooks = [
        torch.randn(size, dim, generator=generator) / (1 + level) ** 2
        for level, size in enumerate(sizes)
    ]
    return quantizer


def is_unique(codes_NL):
    return len(torch.unique(codes_NL, dim=0)) == len(codes_NL)


def in_range(codes_NL, sizes):
    return bool(((codes_NL >= 0) & (codes_NL < torch.tensor(sizes))).all())


@st.composite
def catalogues(draw):
    """Level sizes, and vectors for at most as many items as there are SIDs, many of them equal."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    room = math.prod(sizes)
    count = draw(st.one_of(st.just(min(room, 200)), st.integers(1, min(room, 200))))
    distinct = draw(st.integers(1, count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    points = torch.randn(distinct, 3, generator=generator)
    return sizes, points[torch.randint(distinct, (count,), generator=generator)]


@settings(deadline=None, max_examples=150)
@given(catalogues(), st.sampled_from([ResidualKMeans, BalancedKMeans]), st.booleans())
def test_sids_are_unique_and_in_range(catalogue, cls, indexed):
    sizes, vectors_ND = catalogue
    quantizer = quantizer_of(sizes, cls=cls)
    last_level = "index" if indexed else "nearest"
    codes_NL = assign_unique(vectors_ND, quantizer, last_level=last_level)
    assert codes_NL.dtype == torch.int64
    assert is_unique(codes_NL) and in_range(codes_NL, sizes)
    if indexed:  # numbered 0, 1, 2, … within each prefix, in item order
        numbers = {}
        for row in codes_NL.tolist():
            numbers.setdefault(tuple(row[:-1]), []).append(row[-1])
        assert all(given == list(range(len(given))) for given in numbers.values())


@settings(deadline=None, max_examples=150)
@given(catalogues(), st.integers(0, 200), st.booleans())
def test_new_items_leave_old_sids_alone(catalogue, cut, indexed):
    sizes, vectors_ND = catalogue
    quantizer = quantizer_of(sizes)
    last_level = "index" if indexed else "nearest"
    old, new = vectors_ND[:cut], vectors_ND[cut:]
    old_codes = assign_unique(old, quantizer, last_level=last_level)
    before = old_codes.clone()
    new_codes = assign_new(new, old_codes, quantizer, last_level=last_level)
    assert torch.equal(old_codes, before) and len(new_codes) == len(new)
    codes_NL = torch.cat([old_codes, new_codes])
    assert is_unique(codes_NL) and in_range(codes_NL, sizes)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_without_collisions_sids_are_the_nearest_codes(seed, count):
    vectors_ND = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    quantizer = quantizer_of((8, 8, 8), seed=seed)
    nearest = quantizer.encode(vectors_ND)
    assigned = assign_unique(vectors_ND, quantizer)
    groups = {}
    for row, codes in enumerate(nearest.tolist()):
        groups.setdefault(tuple(codes[:-1]), []).append(row)
    for rows in groups.values():  # another group's collision does not matter
        if is_unique(nearest[rows]):
            assert torch.equal(assigned[rows], nearest[rows])
    taken_one = assign_new(vectors_ND[:1], torch.zeros(0, 3, dtype=torch.int64), quantizer)
    assert torch.equal(taken_one, nearest[:1])


def test_the_last_level_is_the_assignment_of_least_distance():
    vectors_ND = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    quantizer = quantizer_of((1, 8))
    codes_NL = assign_unique(vectors_ND, quantizer)
    distance = torch.cdist(vectors_ND - quantizer.codebooks[0], quantizer.codebooks[1]).square()
    rows, columns = linear_sum_assignment(distance.numpy())
    best = distance[rows, columns].sum()
    assert distance[torch.arange(6), codes_NL[:, 1]].sum() == pytest.approx(best.item(), rel=1e-5)


def test_a_full_prefix_keeps_its_nearest_items_and_spills_the_farthest():
    quantizer = ResidualKMeans(level_sizes=(3, 2))
    quantizer.codebooks = [
        torch.tensor([[0.0, 0.0], [10.0, 0.0], [30.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [0.0, 1.0]]),
    ]
    vectors_ND = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.5, 0.0], [4.0, 0.0]])
    codes_NL = assign_unique(vectors_ND, quantizer)
    assert codes_NL[:, 0].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(("cls", "count"), [(ResidualKMeans, 5000), (BalancedKMeans, 1000)])
def test_thousands_of_items_with_one_vector(cls, count):
    vectors_ND = torch.ones(count, 8)
    quantizer = cls(level_sizes=(256, 256, 256), iterations=3).fit(vectors_ND, seed=0)
    codes_NL = assign_unique(vectors_ND, quantizer)
    assert is_unique(codes_NL) and in_range(codes_NL, (256, 256, 256))


@pytest.mark.parametrize("cls", [ResidualKMeans, BalancedKMeans])
@pytest.mark.parametrize("same", [True, False])
def test_a_catalogue_exactly_as_large_as_the_sid_space(cls, same):
    vectors_ND = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    if same:
        vectors_ND = vectors_ND[:1].repeat(64, 1)
    quantizer = cls(level_sizes=(4, 4, 4)).fit(vectors_ND, seed=0)
    codes_NL = assign_unique(vectors_ND, quantizer)
    assert is_unique(codes_NL) and in_range(codes_NL, (4, 4, 4))


def test_too_many_items_are_refused_with_both_numbers():
    quantizer = quantizer_of((4, 4, 4))
    with pytest.raises(ValueError, match=r"65 items do not fit into the 64 SIDs.*add a level"):
        assign_unique(torch.randn(65, 3), quantizer)
    codes_NL = assign_unique(torch.randn(60, 3), quantizer)
    with pytest.raises(ValueError, match="65 items do not fit"):
        assign_new(torch.randn(5, 3), codes_NL, quantizer)
    assert is_unique(torch.cat([codes_NL, assign_new(torch.randn(4, 3), codes_NL, quantizer)]))


def test_groups_too_large_for_the_exact_assignment(monkeypatch):
    monkeypatch.setattr(assign, "EXACT_GROUP", 10)
    vectors_ND = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    codes_NL = assign_unique(vectors_ND, quantizer_of((2, 60)))
    assert is_unique(codes_NL) and in_range(codes_NL, (2, 60))


def test_place_fills_cells_with_the_nearest_first():
    distance = np.array([[1.0, 9.0], [2.0, 5.0], [3.0, 4.0]])
    assert place(distance, np.array([1, 2])).tolist() == [0, 1, 1]
    assert place(distance, np.array([0, 3])).tolist() == [1, 1, 1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20))
def test_rank_in_cell_equals_sorting(rows):
    cells = np.array([cell for cell, _ in rows], dtype=np.int64)
    distances = np.array([float(distance) for _, distance in rows])
    ranks = rank_in_cell(cells, distances)
    for cell in set(cells.tolist()):
        inside = [n for n in range(len(rows)) if cells[n] == cell]
        by_distance = sorted(inside, key=lambda n: (distances[n], n))
        assert [ranks[n] for n in by_distance] == list(range(len(inside)))
