"""Rankings with thoughts against one thought at a time, and mixing against brute force."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import NUM_ITEMS
from whyrec import Recommender
from whyrec.decode import ranking as ranking_module
from whyrec.decode.ranking import Ranking, rank_prompts
from whyrec.decode.think import ThoughtSettings
from whyrec.decode.thought_ranking import fuse

THOUGHTS = {"samples": 3, "max_tokens": 5, "temperature": 1.0, "weight": 0.25}


@pytest.fixture(scope="module")
def recommender(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """A model of random weights that thinks."""
    folder = Path(shutil.copytree(saved_model, tmp_path_factory.mktemp("thinks") / "model"))
    values = json.loads((folder / "whyrec.json").read_text())
    (folder / "whyrec.json").write_text(json.dumps(values | {"thoughts": THOUGHTS}))
    return Recommender.from_pretrained(folder)


def histories(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, NUM_ITEMS, 1 + n % 11) for n in range(count)]


def test_a_model_folder_says_how_it_thinks(recommender) -> None:
    assert recommender.settings.thoughts == ThoughtSettings(**THOUGHTS)
    encoder = recommender.encoder
    assert encoder.thinks and encoder.recommendation_prompt([1]) == encoder.answer_prompt([1])


@pytest.mark.parametrize("exclude", [[True, False], [False]])
def test_a_ranking_is_the_mixture_of_its_thoughts(recommender, exclude) -> None:
    asked, own, encoder = histories(9), recommender.settings.thoughts, recommender.encoder
    found = recommender.rank_thinking(asked, width=10, exclude_history=exclude)
    assert found.closed_EG.shape == (9, 3) and len(found.rankings) == len(exclude)
    for place in range(len(exclude)):
        parts = []
        for sample in range(own.samples):
            shown = [h[-recommender.settings.max_history :].tolist() for h in asked]
            prompts = [
                encoder.answer_prompt(history, found.thoughts[n][sample])
                for n, history in enumerate(shown)
            ]
            parts += rank_prompts(
                recommender.decoder, prompts, asked, width=10, exclude_history=[exclude[place]]
            )
        expected = fuse(parts, weights=[1, 1, 1], width=10)
        ranking = found.rankings[place]
        assert np.array_equal(ranking.items_EW, expected.items_EW)
        np.testing.assert_allclose(ranking.scores_EW, expected.scores_EW, atol=1e-4)


def test_thoughts_do_not_depend_on_the_batch(recommender, monkeypatch) -> None:
    asked, keys = histories(8), list(range(100, 108))
    together = recommender.rank_thinking(asked, width=10, keys=keys)
    monkeypatch.setattr(ranking_module, "_BATCH_TOKENS", {"cpu": 200})
    apart = recommender.rank_thinking(asked, width=10, keys=keys)
    assert together.thoughts == apart.thoughts
    assert np.array_equal(together.rankings[0].items_EW, apart.rankings[0].items_EW)
    alone = recommender.rank_thinking(asked[5:6], width=10, keys=keys[5:6])
    assert alone.thoughts == together.thoughts[5:6]
    assert recommender.rank_thinking(asked[5:6], width=10).thoughts != alone.thoughts


def test_the_trace_speaks_for_the_first_item(recommender) -> None:
    ids = [item.item_id for item in recommender.items]
    found = recommender.recommend(ids[:3], k=5, width=10, think=True)
    ranked = recommender.rank_thinking([np.arange(3)], width=10, keys=[0])
    assert [f.item_id for f in found] == [ids[i] for i in ranked.rankings[0].items_EW[0][:5]]
    assert found.trace in ranked.texts(recommender.encoder)[0]
    first = recommender.indices([found[0].item_id])[0]
    scores = []
    for thought in ranked.thoughts[0]:
        prompt = recommender.encoder.answer_prompt([0, 1, 2], thought)
        (one,) = rank_prompts(recommender.decoder, [prompt], [np.arange(3)], width=10)
        scores.append(dict(zip(one.items_EW[0], one.scores_EW[0], strict=True)).get(first, -99))
    best = ranked.thoughts[0][int(np.argmax(scores))]
    assert found.trace == recommender.encoder.tokenizer.decode(best)
    barred = recommender.recommend(ids[:3], k=5, width=10, think=True, exclude=[found[0].item_id])
    assert found[0].item_id not in [f.item_id for f in barred]


def test_a_model_that_has_not_learnt_to_think(saved_model) -> None:
    plain = Recommender.from_pretrained(saved_model)
    with pytest.raises(ValueError, match="is aligned and has not learnt to think"):
        plain.recommend([], think=True)
    with pytest.raises(ValueError, match="has not learnt to think"):
        plain.rank_thinking(histories(2), width=10)


def ranking(rows: list[list[tuple[int, float]]]) -> Ranking:
    return Ranking(
        np.array([[item for item, _ in row] for row in rows]),
        np.array([[score for _, score in row] for row in rows], dtype=np.float32),
    )


def test_fused_lists_mix_probabilities() -> None:
    log = math.log
    left = ranking([[(5, log(0.6)), (2, log(0.3)), (-1, -math.inf)]])
    right = ranking([[(2, log(0.5)), (9, log(0.4)), (5, log(0.1))]])
    fused = fuse([left, right], weights=[3, 1], width=4)
    assert fused.items_EW.tolist() == [[5, 2, 9, -1]]
    expected = [0.75 * 0.6 + 0.25 * 0.1, 0.75 * 0.3 + 0.25 * 0.5, 0.25 * 0.4]
    assert np.exp(fused.scores_EW[0, :3]).tolist() == pytest.approx(expected, rel=1e-5)
    assert fused.scores_EW[0, 3] == -math.inf
    assert fuse([left, right], weights=[1, 0], width=2).items_EW.tolist() == [[5, 2]]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8))
def test_fuse_equals_brute_force(data: st.DataObject, lists: int, users: int, width: int) -> None:
    def one() -> Ranking:
        items = [data.draw(st.permutations(range(6)))[:4] for _ in range(users)]
        gone = data.draw(arrays(bool, (users, 4)))
        scores = data.draw(arrays(np.float32, (users, 4), elements=st.floats(-800, 0, width=32)))
        return Ranking(np.where(gone, -1, items), np.where(gone, -np.inf, scores))

    rankings = [one() for _ in range(lists)]
    weights = data.draw(st.lists(st.floats(0.1, 3), min_size=lists, max_size=lists))
    fused = fuse(rankings, weights=weights, width=width)
    assert fused.items_EW.shape == fused.scores_EW.shape == (users, width)
    for user in range(users):
        mixed: dict[int, float] = {}
        for r, weight in zip(rankings, weights, strict=True):
            for item, score in zip(r.items_EW[user], r.scores_EW[user], strict=True):
                if item >= 0:
                    term = float(score) + math.log(weight / sum(weights))
                    mixed[item] = float(np.logaddexp(mixed.get(item, -math.inf), term))
        best = sorted(mixed.values(), reverse=True)[:width]
        found = fused.items_EW[user].tolist()
        scores = fused.scores_EW[user].tolist()
        assert scores[: len(best)] == pytest.approx(best, abs=1e-3)
        for item, score in zip(found, scores, strict=True):
            assert (item == -1) == (score == -math.inf)
            if item >= 0:
                assert mixed[item] == pytest.approx(score, abs=1e-3)
