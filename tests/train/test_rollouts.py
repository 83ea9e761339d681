"""Rollouts against one thought and one beam at a time; dead groups, planted."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from conftest import Extended
from whyrec.decode.beam import BeamDecoder
from whyrec.reasoning.asking import Step
from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.mentions import MentionFinder
from whyrec.train import rewards as rewards_module
from whyrec.train.rationales import training_steps
from whyrec.train.rollouts import Roller, RolloutSettings

SETTINGS = RolloutSettings(
    samples=3,
    max_tokens=5,
    temperature=1.0,
    width=12,
    rows=6,
    rounds=2,
    rewards=("reciprocal_rank", "likelihood"),
    weights=(1.0, 0.5),
    seed=0,
)


def make_roller(extended: Extended, **settings: object) -> Roller:
    dataset = extended.dataset
    book = FactBook(dataset.items)
    vectors = np.random.default_rng(0).standard_normal((len(dataset.items), 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Roller(
        training_steps(dataset, steps_per_user=2, max_history=4),
        sequences=dataset.training_sequences(),
        encoder=extended.encoder,
        trie=extended.trie,
        catalogue=rewards_module.Catalogue(
            extended.codes_NL.numpy(), vectors, book, MentionFinder(book)
        ),
        settings=replace(SETTINGS, **settings),  # type: ignore[arg-type]
    )


def check_groups(extended: Extended, roller: Roller, chosen: list[int], *, seed: int) -> None:
    """Groups are what one thought and one beam at a time give."""
    decoder = BeamDecoder(extended.model, vocabulary=extended.vocabulary, trie=extended.trie)
    groups = roller.groups(extended.model, chosen, seed=seed)
    for number, group in zip(chosen, groups, strict=True):
        step = roller.steps[number]
        assert group.step == number and group.target == step.target
        assert group.prompt == extended.encoder.thinking_prompt(step.history)
        assert len(group.words) == 3 and len({tuple(words) for words in group.words}) > 1
        before = extended.dataset.training_sequences()[step.user][: step.position].tolist()
        for place, words in enumerate(group.words):
            bare = words[:-1] if group.closed_G[place] else words
            assert 0 < len(words) == len(group.log_probs[place]) <= 5
            prompt = extended.encoder.answer_prompt(step.history, bare)
            prefilled = decoder.prefill([prompt], width=12)
            beams = decoder.search(prefilled, width=12, excluded=[before])
            items = beams.items_UW[0].tolist()
            assert group.items_GW[place].tolist() == items
            rank = 1 / (items.index(step.target) + 1) if step.target in items else 0.0
            assert group.rewards["reciprocal_rank"][place] == pytest.approx(rank)
            every = decoder.prefill([prompt], width=len(extended.dataset.items))
            all_beams = decoder.search(every, width=len(extended.dataset.items))
            where = all_beams.items_UW[0].tolist().index(step.target)
            mean = float(np.exp(all_beams.scores_UW[0, where] / 3))
            assert group.rewards["likelihood"][place] == pytest.approx(mean, abs=1e-4)
            expected = rank + 0.5 * group.rewards["likelihood"][place]
            assert group.totals_G[place] == pytest.approx(expected)


def test_a_group_is_what_one_thought_and_one_beam_at_a_time_give(extended: Extended) -> None:
    check_groups(extended, make_roller(extended), [0, 5, 17, 40], seed=3)


def test_a_target_that_comes_again_may_be_found(extended: Extended) -> None:
    roller = make_roller(extended, width=30)
    roller.sequences = [np.array([3, 4, 5, 4])]
    roller.steps = [Step(0, 3, [3, 4, 5], 4, [])]
    (group,) = roller.groups(extended.model, [0], seed=0)
    for items in group.items_GW.tolist():
        assert 4 in items and 3 not in items and 5 not in items


def test_rollouts_do_not_depend_on_the_batch(extended: Extended) -> None:
    chosen = [2, 9, 30, 31, 44]
    many = make_roller(extended, rows=100).groups(extended.model, chosen, seed=1)
    few = make_roller(extended, rows=3).groups(extended.model, chosen[::-1], seed=1)[::-1]
    other = make_roller(extended).groups(extended.model, chosen, seed=2)
    for a, b, c in zip(many, few, other, strict=True):
        assert a.words == b.words and a.items_GW.tolist() == b.items_GW.tolist()
        assert a.words != c.words
        np.testing.assert_allclose(a.totals_G, b.totals_G, atol=1e-4)


def test_a_generation_config_changes_nothing(extended: Extended) -> None:
    """`do_sample`, `top_k` and the like, as a backbone may bring them along."""
    roller, model = make_roller(extended), copy.deepcopy(extended.model)
    model.generation_config.update(do_sample=False, top_k=1, top_p=0.1, temperature=0.01)
    ours, theirs = (roller.groups(each, [7], seed=0)[0] for each in (extended.model, model))
    assert ours.words == theirs.words and len({tuple(words) for words in ours.words}) == 3


def test_dead_groups_are_counted_and_drawn_again(extended: Extended, monkeypatch) -> None:
    """Planted: thoughts differ in worth only where the target is an even item."""

    def planted(outcomes, _catalogue):
        even = outcomes.targets_R % 2 == 0
        return np.where(even, np.arange(len(even)) % 3, 0.0)

    monkeypatch.setitem(rewards_module.REWARDS, "planted", planted)
    roller = make_roller(extended, rewards=("planted",), weights=(1.0,), rounds=6)
    chosen = [n for n, step in enumerate(roller.steps)][:12]
    odd = [roller.steps[n].target % 2 == 1 for n in chosen]
    assert any(odd) and not all(odd)
    groups, dead, drawn = roller.live_groups(extended.model, chosen, seed=0)
    assert dead == odd and drawn > len(chosen)
    assert not any(group.is_dead for group in groups)
    for group, number, was_dead in zip(groups, chosen, odd, strict=True):
        assert (group.step == number) or was_dead
        assert group.target == roller.steps[group.step].target
    again = roller.live_groups(extended.model, chosen, seed=0)[0]
    assert [group.words for group in again] == [group.words for group in groups]
    elsewhere = roller.live_groups(extended.model, chosen, seed=0, share=(1, 2))[0]
    assert [group.step for group in elsewhere] != [group.step for group in groups]


def test_where_all_are_dead_it_gives_up(extended: Extended, monkeypatch) -> None:
    monkeypatch.setitem(rewards_module.REWARDS, "same", lambda outcomes, _: outcomes.tokens_R * 0.0)
    roller = make_roller(extended, rewards=("same",), weights=(1.0,), rounds=2)
    groups, dead, drawn = roller.live_groups(extended.model, [0, 1], seed=0)
    assert len(groups) == 2 and all(dead) and drawn == 6
