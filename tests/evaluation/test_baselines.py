"""Counting baselines against loops written out; the ranking loop against a full stable sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whyrec.catalog.dataset import Dataset, Examples, Item
from whyrec.evaluation import baselines
from whyrec.evaluation.metrics import ranking_metrics

NUM_ITEMS = 9


def small_dataset(seed: int = 0, users: int = 15) -> Dataset:
    """Leave-one-out over random sequences of 3 to 14 events."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 15, users)
    return Dataset(
        [Item(f"i{n}") for n in range(NUM_ITEMS)],
        [f"u{n}" for n in range(users)],
        [rng.integers(0, NUM_ITEMS, n).astype(np.int32) for n in lengths],
        [np.array([0] * (n - 2) + [1, 2], np.int8) for n in lengths],
    )


# few distinct values, so that ties are the rule
some_scores = st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1e-30, 0.5, 3.0])


@given(st.lists(st.lists(some_scores, min_size=7, max_size=7), min_size=1), st.integers(1, 10))
def test_top_items_equal_a_full_stable_sort(scores: list[list[float]], k: int) -> None:
    found_BK = baselines.top_items(np.array(scores, np.float32), k=k)
    for row, found in zip(scores, found_BK, strict=True):
        best = sorted(range(len(row)), key=lambda item: (-row[item], item))[:k]
        expected = [item if row[item] > -np.inf else -1 for item in best]
        assert found.tolist() == expected + [-1] * (k - len(expected))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("exclude_history", [False, True])
def test_rank_goes_in_batches_and_may_exclude_history(
    batch_size: int, exclude_history: bool
) -> None:
    examples = small_dataset().examples("test")
    sizes = []

    def score(histories: list[np.ndarray]) -> np.ndarray:
        sizes.append(len(histories))
        return np.stack([np.sin(history.sum() + np.arange(NUM_ITEMS)) for history in histories])

    ranked_EK = baselines.rank(
        score, examples, k=NUM_ITEMS, exclude_history=exclude_history, batch_size=batch_size
    )
    assert max(sizes) <= batch_size and sum(sizes) == len(examples)
    for row, history in zip(ranked_EK, examples.histories, strict=True):
        gone = set(history.tolist()) if exclude_history else set()
        order = np.argsort(-np.sin(history.sum() + np.arange(NUM_ITEMS)), kind="stable")
        expected = [item for item in order if item not in gone]
        assert row.tolist() == expected + [-1] * (NUM_ITEMS - len(expected))


def test_rank_of_no_examples_is_empty_and_scores_are_not_written_to() -> None:
    nobody = Examples(np.empty(0, np.int32), [], np.empty(0, np.int32))
    assert baselines.rank(lambda h: np.empty((0, 3)), nobody, exclude_history=True).shape == (0, 20)
    kept = np.ones((15, NUM_ITEMS), np.float32)
    baselines.rank(lambda h: kept, small_dataset().examples("test"), exclude_history=True)
    assert kept.min() == 1


def test_popularity_counts_training_events_only() -> None:
    dataset = small_dataset()
    training = np.concatenate([sequence[:-2] for sequence in dataset.sequences])
    scores_BN = baselines.popularity(dataset)([np.array([0]), np.array([1, 2])])
    for item in range(NUM_ITEMS):
        assert scores_BN[:, item].tolist() == [(training == item).sum()] * 2


@pytest.mark.parametrize("seed", range(5))
def test_co_visitation_equals_the_definition_written_out(seed: int) -> None:
    dataset = small_dataset(seed)
    near = np.zeros((NUM_ITEMS, NUM_ITEMS))
    popularity = np.zeros(NUM_ITEMS)
    for sequence in dataset.sequences:
        training = sequence[:-2]
        for place, item in enumerate(training):
            popularity[item] += 1
            for distance in range(1, 6):
                if place + distance < len(training):
                    after = training[place + distance]
                    near[item, after] += 1 / distance
                    near[after, item] += 0.5 / distance
    examples = dataset.examples("test")
    scores_BN = baselines.co_visitation(dataset)(examples.histories)
    for row, history in zip(scores_BN, examples.histories, strict=True):
        expected = np.zeros(NUM_ITEMS)
        for age, item in enumerate(reversed(history.tolist())):
            if age < 10:
                expected += 0.7**age * near[item]
        assert row == pytest.approx(expected / np.sqrt(popularity + 1))


def test_held_out_events_do_not_change_the_counts() -> None:
    dataset = small_dataset()
    before = baselines.co_visitation(dataset)([np.arange(4)])
    for sequence in dataset.sequences:
        sequence[-2:] = 0
    assert np.array_equal(baselines.co_visitation(dataset)([np.arange(4)]), before)


def test_tuned_co_visitation_is_no_worse_on_the_users_that_chose_it() -> None:
    dataset = small_dataset(seed=3, users=60)
    valid = dataset.examples("valid")

    def reached(score: baselines.ScoreFn) -> float:
        ranked_EK = baselines.rank(score, valid, k=10, exclude_history=True)
        return float(ranking_metrics(ranked_EK, valid.targets_E, cutoffs=(10,))["N@10"].mean())

    tuned = baselines.tuned_co_visitation(dataset, users=0)
    every = [
        baselines.co_visitation(dataset, decay=decay, damping=damping)
        for decay in (0.4, 0.6, 0.9)
        for damping in (0.0, 0.5)
    ]
    assert reached(tuned) >= max(map(reached, every))


def test_words_rank_what_shares_them_with_the_newest_events() -> None:
    titles = ["red shoe", "red hat", "blue shoe", "green scarf", ""]
    items = [Item(str(n), title) for n, title in enumerate(titles)]
    dataset = Dataset(items, ["u"], [np.arange(2)], [np.zeros(2, np.int8)])
    scores_BN = baselines.common_words(dataset)([np.array([0]), np.array([0, 3]), np.array([4])])
    assert scores_BN[0, 1] > scores_BN[0, 2] > scores_BN[0, 3] == 0  # the hat was chosen once
    assert scores_BN[1] == pytest.approx(0.7 * scores_BN[0]) and not scores_BN[2].any()


def test_counts_and_words_are_no_worse_than_counts() -> None:
    dataset = small_dataset(seed=3, users=60)
    valid = dataset.examples("valid")
    counts = baselines.tuned_co_visitation(dataset, users=0)
    both = baselines.tuned_counts_and_words(dataset, counts, users=0)
    assert baselines._reached(both, valid) >= baselines._reached(counts, valid)
    assert both([np.arange(2)]).shape == (1, len(dataset.items))
