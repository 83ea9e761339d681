"""Ranking metrics against loops written out, scikit-learn and scipy; intervals against theory."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import ndcg_score

from whyrec.evaluation import metrics

NUM_ITEMS = 12


@st.composite
def ranked_lists(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Any ids in any place: gaps, repeats and ids outside of the catalogue included."""
    examples, length = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    ids = st.integers(-1, NUM_ITEMS + 1)
    row = st.lists(ids, min_size=length, max_size=length)
    ranked = draw(st.lists(row, min_size=examples, max_size=examples))
    one_target = st.integers(0, NUM_ITEMS - 1)
    targets = draw(st.lists(one_target, min_size=examples, max_size=examples))
    return np.array(ranked), np.array(targets)


def permutations(examples: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(NUM_ITEMS) for _ in range(examples)])


@given(ranked_lists(), st.integers(1, 9))
def test_metrics_equal_a_loop_over_every_place(
    lists: tuple[np.ndarray, np.ndarray], k: int
) -> None:
    ranked_EK, targets_E = lists
    k = min(k, ranked_EK.shape[1])
    found = metrics.ranking_metrics(ranked_EK, targets_E, cutoffs=(k,))
    for row, target, *values in zip(
        ranked_EK, targets_E, *(found[f"{name}@{k}"] for name in ("R", "N", "MRR")), strict=True
    ):
        expected = (0.0, 0.0, 0.0)
        for place in range(k):
            if row[place] == target:
                expected = (1.0, 1 / math.log2(place + 2), 1 / (place + 1))
                break
        assert values == pytest.approx(expected)


def test_ndcg_agrees_with_scikit_learn() -> None:
    ranked_EK = permutations(50)
    targets_E = np.random.default_rng(1).integers(0, NUM_ITEMS, 50)
    found = metrics.ranking_metrics(ranked_EK, targets_E, cutoffs=(5, 10))
    relevance_EN = np.eye(NUM_ITEMS)[targets_E]
    scores_EN = np.empty((50, NUM_ITEMS))
    np.put_along_axis(scores_EN, ranked_EK, -np.arange(NUM_ITEMS, dtype=float)[None], axis=1)
    for k in (5, 10):
        assert found[f"N@{k}"].mean() == pytest.approx(ndcg_score(relevance_EN, scores_EN, k=k))


def test_an_empty_place_never_hits() -> None:
    found = metrics.ranking_metrics(np.array([[-1, -1, 3]]), np.array([3]), cutoffs=(2, 3))
    assert (found["R@2"][0], found["R@3"][0], found["MRR"][0]) == (0, 1, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("ranked", "targets", "cutoffs", "message"),
    [
        (np.zeros((0, 5), int), np.zeros(0, int), (5,), "no example"),
        (np.zeros((2, 5), int), np.zeros(3, int), (5,), "one ranked list per target"),
        (np.zeros((2, 5), int), np.zeros(2, int), (10,), "rank more items"),
    ],
)
def test_lists_that_cannot_be_scored_are_refused(
    ranked: np.ndarray, targets: np.ndarray, cutoffs: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.ranking_metrics(ranked, targets, cutoffs=cutoffs)


def test_interval_agrees_with_scipy_and_with_the_normal_approximation() -> None:
    values_E = np.random.default_rng(0).random(400)
    low, high = metrics.bootstrap_interval(values_E)
    reference = stats.bootstrap(
        (values_E,), np.mean, n_resamples=5000, method="percentile", rng=1
    ).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=2e-3)

    hits_E = (np.arange(2000) < 100).astype(float)
    low, high = metrics.bootstrap_interval(hits_E, samples=20_000)
    half = 1.96 * math.sqrt(0.05 * 0.95 / 2000)
    assert (low, high) == pytest.approx((0.05 - half, 0.05 + half), abs=6e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_interval_is_seeded_ordered_and_inside_the_values(values: list[float], seed: int) -> None:
    values_E = np.array(values)
    low, high = metrics.bootstrap_interval(values_E, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == metrics.bootstrap_interval(values_E[::-1], seed=seed)


def test_paired_interval_is_narrower_than_two_single_ones() -> None:
    rng = np.random.default_rng(0)
    b_E = rng.random(500)
    a_E = b_E + 0.05 + 0.01 * rng.standard_normal(500)
    gain = metrics.paired_gain_interval(a_E, b_E)
    assert gain.difference == pytest.approx(a_E.mean() - b_E.mean())
    assert gain.relative == pytest.approx(a_E.mean() / b_E.mean() - 1)
    assert gain.difference_low < gain.difference < gain.difference_high
    assert gain.relative_low < gain.relative < gain.relative_high
    assert gain.difference_high - gain.difference_low < 0.004
    low, high = metrics.bootstrap_interval(a_E)
    assert high - low > 0.03
    assert metrics.paired_gain_interval(b_E, b_E).relative_high == 0


def test_paired_interval_covers_the_true_difference_about_95_times_in_100() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        b_E = (rng.random(300) < 0.3).astype(float)
        a_E = np.where(rng.random(300) < 0.2, rng.random(300) < 0.5, b_E)
        truth = 0.8 * 0.3 + 0.2 * 0.5 - 0.3
        gain = metrics.paired_gain_interval(a_E, b_E, seed=trial)
        covered += gain.difference_low <= truth <= gain.difference_high
    assert 180 <= covered <= 199


def test_paired_interval_refuses_unpaired_and_hitless_models() -> None:
    with pytest.raises(ValueError, match="same examples"):
        metrics.paired_gain_interval(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="never hits"):
        metrics.paired_gain_interval(np.ones(3), np.zeros(3))


@given(ranked_lists(), st.integers(1, 9))
def test_coverage_gini_and_legality_equal_brute_force(
    lists: tuple[np.ndarray, np.ndarray], cutoff: int
) -> None:
    ranked_EK, _ = lists
    exposure = [int((ranked_EK[:, :cutoff] == item).sum()) for item in range(NUM_ITEMS)]
    assert metrics.coverage(ranked_EK, NUM_ITEMS, cutoff) == pytest.approx(
        sum(count > 0 for count in exposure) / NUM_ITEMS
    )
    total = sum(exposure)
    differences = sum(abs(a - b) for a in exposure for b in exposure)
    expected = differences / (2 * NUM_ITEMS * total) if total else 0.0
    assert metrics.gini(ranked_EK, NUM_ITEMS, cutoff) == pytest.approx(expected)

    for row, share in zip(ranked_EK, metrics.legal_share(ranked_EK, NUM_ITEMS), strict=True):
        assert share == pytest.approx(len({i for i in row if 0 <= i < NUM_ITEMS}) / len(row))


@given(ranked_lists(), st.data())
def test_only_places_that_could_be_filled_are_owed(
    lists: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    ranked_EK, _ = lists
    available = data.draw(st.lists(st.integers(0, NUM_ITEMS), min_size=len(ranked_EK)))
    available_E = np.array(available[: len(ranked_EK)])
    shares = metrics.legal_share(ranked_EK, NUM_ITEMS, available_E=available_E)
    for row, could, share in zip(ranked_EK.tolist(), available_E.tolist(), shares, strict=True):
        legal = len({item for item in row if 0 <= item < NUM_ITEMS})
        # an empty place is owed only while there is an item left for it
        filled = sum(item != -1 for item in row)
        owed = filled + min(len(row) - filled, max(could - filled, 0))
        assert share == pytest.approx(legal / owed if owed else 1.0)


def test_a_short_list_is_legal_where_the_catalogue_has_no_more() -> None:
    ranked_EK = np.array([[4, 2, -1, -1], [4, -1, -1, -1], [-1, -1, -1, -1]])
    shares = metrics.legal_share(ranked_EK, 5, available_E=np.array([2, 2, 0]))
    assert shares.tolist() == [1.0, 0.5, 1.0]
    # A catalogue of three items could fill three places; item 4 is none of them.
    assert metrics.legal_share(ranked_EK, 3).tolist() == [1 / 3, 0.0, 0.0]
    figures = metrics.ranking_figures(
        np.array([[1, 0, -1, -1, -1]]),
        np.array([0]),
        num_items=4,
        prefix="m/test/excluded",
        available_E=np.array([2]),
        cutoffs=(5,),
    )
    assert figures["m/test/excluded/legal"] == 1.0


def test_gini_of_equal_and_of_concentrated_exposure() -> None:
    assert metrics.gini(permutations(7), NUM_ITEMS, NUM_ITEMS) == pytest.approx(0)
    assert metrics.gini(np.zeros((9, 1), int), 1000, 1) == pytest.approx(0.999)


def test_figures_have_flat_keys_and_ends_around_every_value() -> None:
    ranked_EK = permutations(60)[:, :10]
    targets_E = np.random.default_rng(1).integers(0, NUM_ITEMS, 60)
    figures = metrics.ranking_figures(
        ranked_EK, targets_E, num_items=50, prefix="tiger/test/kept", samples=200
    )
    names = {f"{m}@{k}" for m in ("R", "N", "MRR") for k in (5, 10)}
    names |= {"MRR", "coverage", "gini", "legal"}
    ends = ("", "/low", "/high")
    assert set(figures) == {f"tiger/test/kept/{name}{end}" for name in names for end in ends}
    for name in names:
        key = f"tiger/test/kept/{name}"
        assert figures[f"{key}/low"] <= figures[key] + 1e-12
        assert figures[key] <= figures[f"{key}/high"] + 1e-12
    assert figures["tiger/test/kept/legal"] == 1
    assert figures["tiger/test/kept/coverage"] == NUM_ITEMS / 50
    assert figures["tiger/test/kept/gini"] == pytest.approx(metrics.gini(ranked_EK, 50), rel=1e-12)


def test_figures_refuse_lists_too_short_for_any_cutoff() -> None:
    with pytest.raises(ValueError, match="too short"):
        metrics.ranking_figures(np.zeros((2, 3), int), np.zeros(2, int), num_items=5, prefix="x")
