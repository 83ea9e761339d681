"""Rewards against brute force, and rewards that cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whyrec.catalog.dataset import Item
from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.mentions import MentionFinder
from whyrec.train.rewards import REWARDS, Catalogue, Outcomes, check_rewards, rewards_of, total

ITEMS, LEVELS, WIDTH = 12, 3, 5
FILMS = [
    Item(f"f{n}", f"Film {n}", "", ("Films", f"Genre {n % 3}"), f"Maker {n % 4}")
    for n in range(ITEMS)
]


def make_catalogue(seed: int = 0) -> Catalogue:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((ITEMS, 4))
    book = FactBook(FILMS)
    return Catalogue(
        rng.integers(0, 3, (ITEMS, LEVELS)),
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        book,
        MentionFinder(book),
    )


def make_outcomes(seed: int = 0, *, rows: int = 6, **changes: object) -> Outcomes:
    """Random beams whose probabilities add up to less than 1; some are short."""
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(ITEMS)[:WIDTH] for _ in range(rows)])
    mass = rng.dirichlet(np.ones(WIDTH + 1), rows)[:, :WIDTH]
    scores = np.log(-np.sort(-mass, axis=1))
    for row, kept in enumerate(rng.integers(0, WIDTH + 1, rows)):
        items[row, kept:], scores[row, kept:] = -1, -np.inf
    known = {
        "items_RW": items,
        "scores_RW": scores,
        "targets_R": rng.integers(0, ITEMS, rows),
        "target_scores_R": -rng.exponential(3, rows),
        "texts": ["Genre 1 next."] * rows,
        "tokens_R": rng.integers(0, 8, rows),
        "closed_R": rng.random(rows) < 0.5,
        "histories": [[1, 2]] * rows,
        "max_tokens": 8,
    }
    return Outcomes(**(known | changes))  # type: ignore[arg-type]


@given(seed=st.integers(0, 10_000))
def test_beam_rewards_against_loops(seed: int) -> None:
    catalogue, outcomes = make_catalogue(seed), make_outcomes(seed)
    names = ["rollout_beam", "prefix", "likelihood", "reciprocal_rank", "similarity", "length"]
    found = rewards_of(names, outcomes, catalogue)
    for row, target in enumerate(outcomes.targets_R):
        wanted = catalogue.codes_NL[target].tolist()
        best, expected, rank, cosines = 0.0, 0.0, 0.0, []
        for place, item in enumerate(outcomes.items_RW[row].tolist()):
            if item < 0:
                continue
            codes = catalogue.codes_NL[item].tolist()
            best = max(best, sum(a == b for a, b in zip(codes, wanted, strict=True)) / LEVELS)
            shared = 0
            while shared < LEVELS and codes[shared] == wanted[shared]:
                shared += 1
            if shared:
                expected += np.exp(outcomes.scores_RW[row, place]) * 0.5 ** (LEVELS - shared)
            if item == target:
                rank = 1 / (place + 1)
            cosines.append(float(catalogue.vectors_ND[item] @ catalogue.vectors_ND[target]))
        assert found["rollout_beam"][row] == pytest.approx(best)
        assert found["prefix"][row] == pytest.approx(expected)
        assert found["reciprocal_rank"][row] == pytest.approx(rank)
        assert found["similarity"][row] == pytest.approx(np.mean(cosines or [0.0]))
        score = outcomes.target_scores_R[row]
        assert found["likelihood"][row] ** LEVELS == pytest.approx(np.exp(score))
        assert found["length"][row] == pytest.approx(1 - outcomes.tokens_R[row] / 8)


@given(seed=st.integers(0, 10_000))
def test_every_reward_lies_within_its_bounds(seed: int) -> None:
    found = rewards_of(list(REWARDS), make_outcomes(seed), make_catalogue(seed))
    for name, values_R in found.items():
        least = -1 if name == "similarity" else 0
        assert values_R.shape == (6,) and np.isfinite(values_R).all(), name
        assert (values_R >= least - 1e-6).all() and (values_R <= 1 + 1e-6).all(), name


def test_a_sure_hit_is_worth_all_there_is() -> None:
    catalogue = make_catalogue()
    outcomes = make_outcomes(
        rows=1,
        items_RW=np.array([[7, -1]]),
        scores_RW=np.array([[0.0, -np.inf]]),
        targets_R=np.array([7]),
        target_scores_R=np.array([0.0]),
    )
    names = ["rollout_beam", "prefix", "likelihood", "reciprocal_rank", "similarity"]
    for name, values_R in rewards_of(names, outcomes, catalogue).items():
        assert values_R.tolist() == [pytest.approx(1.0)], name


def test_format_wants_words_in_one_line_and_an_end() -> None:
    texts = ["Genre 1 next.", "Genre 1 next.", "", "  ", "Genre 1\nGenre 1", " Genre 1 next.\n"]
    closed = np.array([True, False, True, True, True, True])
    outcomes = make_outcomes(texts=texts, closed_R=closed)
    assert REWARDS["format"](outcomes, make_catalogue()).tolist() == [1, 0, 0, 0, 0, 1]


def test_truthful_counts_facts_that_hold() -> None:
    texts = [
        "The history shares Genre 1. Next: Films > Genre 1.",  # of item 1: all true
        "The history shares Genre 0. Next: Films > Genre 1.",  # one of three is not
        "They seem to like Genre 1 and Genre 0.",  # free words, half of them true
        "Nothing to say",
        "",
        "Next: Films > Genre 77.",  # no such genre
    ]
    outcomes = make_outcomes(texts=texts, histories=[[1, 4]] * 6)
    found = REWARDS["truthful"](outcomes, make_catalogue()).tolist()
    assert found == pytest.approx([1, 2 / 3, 1 / 2, 0, 0, 1 / 2])


def test_the_total_is_the_weighted_sum() -> None:
    rewards = {"a": np.array([1.0, 0.0]), "b": np.array([0.5, 2.0])}
    assert total(rewards, [2.0, 0.5]).tolist() == [2.25, 1.0]


@pytest.mark.parametrize(
    ("names", "weights", "sentence"),
    [
        (
            ["reciprocal_rnak"],
            [1.0],
            r"'reciprocal_rnak'; did you mean 'reciprocal_rank'",
        ),
        (["zzz"], [1.0], r"no reward 'zzz'; known ones: rollout_beam, prefix"),
        (["prefix", "prefix"], [1.0, 1.0], "a reward is named twice"),
        (["prefix", "format"], [1.0], "rewards names 2 and reward_weights has 1"),
        (["prefix"], [0.0], "at least one reward must weigh more than 0"),
    ],
)
def test_rewards_that_cannot_be(names, weights, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_rewards(names, weights)
