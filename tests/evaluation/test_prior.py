"""The prior's mixture against a loop over dictionaries; its weight against trying them all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrec.catalog.dataset import Examples
from whyrec.decode.ranking import Ranking
from whyrec.evaluation import metrics, prior

NUM_ITEMS, WIDTH = 12, 4


def world(seed: int, users: int = 6) -> tuple[Ranking, np.ndarray, Examples]:
    """Beams with empty places, scores with zeros, histories; all by chance."""
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(NUM_ITEMS)[:WIDTH] for _ in range(users)])
    scores = -np.sort(rng.exponential(2, (users, WIDTH)), axis=1)
    empty = rng.random((users, WIDTH)).argsort(axis=1) < rng.integers(0, 2, (users, 1))
    items[empty], scores[empty] = -1, -np.inf
    counts = rng.random((users, NUM_ITEMS)) * (rng.random((users, NUM_ITEMS)) < 0.6)
    histories = [rng.permutation(NUM_ITEMS)[: rng.integers(1, 4)] for _ in range(users)]
    targets = rng.integers(0, NUM_ITEMS, users)
    return Ranking(items, scores), counts, Examples(np.arange(users), histories, targets)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]), st.booleans())
@settings(deadline=None)
def test_the_mixture_equals_a_loop(seed: int, weight: float, exclude: bool) -> None:
    ranking, counts, examples = world(seed)

    def score(histories: list[np.ndarray]) -> np.ndarray:
        rows = [next(i for i, e in enumerate(examples.histories) if e is h) for h in histories]
        return counts[rows]

    mixture = prior.mix(ranking, score, examples, exclude_history=exclude, batch_size=4)
    ranked = mixture.ranked(weight, k=10)
    for row, found in enumerate(ranked):
        barred = set(examples.histories[row].tolist()) if exclude else set()
        table = {n: counts[row, n] for n in range(NUM_ITEMS) if n not in barred}
        total = sum(table.values()) or 1.0
        best = sorted((n for n in table if table[n] > 0), key=lambda n: (-table[n], n))[:WIDTH]
        beam = dict(zip(ranking.items_EW[row].tolist(), ranking.scores_EW[row], strict=True))
        beam.pop(-1, None)
        mixed = {
            n: (1 - weight) * (np.exp(beam[n]) if n in beam else 0.0)
            + weight * table.get(n, 0.0) / total
            for n in {*beam, *best}
        }
        expected = sorted((n for n in mixed if mixed[n] > 0), key=lambda n: (-mixed[n], n))[:10]
        assert found.tolist() == expected + [-1] * (10 - len(expected))


def test_no_weight_is_the_beam_and_excluded_items_stay_out() -> None:
    ranking, counts, examples = world(3)
    mixture = prior.mix(ranking, lambda h: counts[: len(h)], examples, exclude_history=True)
    pure = mixture.ranked(0.0, k=WIDTH)
    for found, beam in zip(pure, ranking.items_EW, strict=True):
        kept = beam[beam >= 0].tolist()
        assert found.tolist() == kept + [-1] * (WIDTH - len(kept))
    for found, history in zip(mixture.ranked(1.0, k=10), examples.histories, strict=True):
        assert not set(found.tolist()) & set(history.tolist())


def test_the_best_weight_is_the_best_of_all_and_the_smallest_of_equals() -> None:
    items = np.array([[0, 1], [0, 1]])
    model, counts = np.array([[0.6, 0.4], [0.6, 0.4]]), np.array([[0.25, 0.75], [0.7, 0.3]])
    mixture = prior.Mixture(items, model, counts)

    def reached(weight: float) -> float:
        ranked = mixture.ranked(weight, k=10)
        return metrics.ranking_metrics(ranked, np.array([1, 0]), cutoffs=(10,))["N@10"].mean()

    weight = prior.best_prior_weight(mixture, np.array([1, 0]))
    assert reached(weight) == 1.0 == max(map(reached, prior.WEIGHTS))
    assert weight == min(w for w in prior.WEIGHTS if reached(w) == 1.0) == 0.3
    assert prior.best_prior_weight(mixture, np.array([0, 0])) == 0.0


@pytest.mark.parametrize("users", [1, 5])
def test_scores_are_not_written_to(users: int) -> None:
    ranking, counts, examples = world(1, users)
    before = counts.copy()
    prior.mix(ranking, lambda h: counts[: len(h)], examples, exclude_history=True)
    assert np.array_equal(counts, before)
