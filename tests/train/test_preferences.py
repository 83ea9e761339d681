"""Preferences out of groups, and S-DPO's loss against its formula."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st

from conftest import Extended
from whyrec.decode.think import text_tokens
from whyrec.train.dpo import ReplyCollator, preference_loss
from whyrec.train.policy import Policy, attach_policy, score
from whyrec.train.preferences import Preference, prefer, read_preferences, write_preferences
from whyrec.train.rollouts import Group

from test_rollouts import make_roller  # isort: skip


def make_group(totals: list[float], items: list[list[int]], *, target: int = 9) -> Group:
    many = len(totals)
    return Group(
        step=4,
        prompt=[1, 2],
        words=[[10 + n] for n in range(many)],
        log_probs=[[-1.0]] * many,
        closed_G=np.zeros(many, dtype=bool),
        items_GW=np.array(items),
        rewards={"prefix": np.array(totals)},
        totals_G=np.array(totals),
        target=target,
    )


def test_best_against_worst() -> None:
    group = make_group([0.5, 0.1, 0.9, 0.3], [[1, 9], [9, 2], [9, 3], [4, 5]])
    found = prefer(group, negatives=2)
    assert found is not None
    assert (found.chosen, found.chosen_item, found.chosen_reward) == ([12], 9, 0.9)
    assert found.rejected == [[11], [13]]  # the worst two, the worst first
    assert found.rejected_items == [2, 4]  # the best of their beams that are not the target
    assert found.rejected_reward == pytest.approx(0.2)


def test_ties_with_the_best_are_not_rejected() -> None:
    found = prefer(make_group([0.9, 0.9, 0.1], [[1, 2], [3, 4], [5, 6]]), negatives=5)
    assert found is not None and found.chosen == [10] and found.rejected == [[12]]


def test_no_preference() -> None:
    assert prefer(make_group([0.5, 0.5], [[1, 2], [3, 4]]), negatives=2) is None
    # The worst thought's beam holds nothing but the target: there is no wrong item to reject.
    assert prefer(make_group([0.5, 0.1], [[1, 2], [9, -1]]), negatives=2) is None


def test_preferences_are_kept_shard_by_shard(extended: Extended, tmp_path, monkeypatch) -> None:
    roller = make_roller(extended)
    chosen = list(range(10))

    def write(name: str) -> list[Preference]:
        write_preferences(
            roller,
            extended.model,
            chosen,
            negatives=2,
            shard=4,
            folder=tmp_path / f".{name}",
            file=tmp_path / f"{name}.parquet",
            state=PartialState(cpu=True),
        )
        return read_preferences(tmp_path / f"{name}.parquet")[0]

    whole = write("whole")
    assert 0 < len(whole) <= 10 and {p.step for p in whole} <= set(range(len(roller.steps)))
    groups, live, asked = type(roller).live_groups, [], []

    def dying(self, model, steps, **settings):
        asked.append(steps)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return groups(self, model, steps, **settings)

    monkeypatch.setattr(type(roller), "live_groups", dying)
    with pytest.raises(KeyboardInterrupt):
        write("killed")
    assert not (tmp_path / "killed.parquet").exists()
    assert write("killed") == whole
    assert asked == [chosen[:4], chosen[4:8], chosen[8:], chosen[8:]] and not live
    report = read_preferences(tmp_path / "killed.parquet")[1]
    assert report["groups"] == 10 and report["kept"] == len(whole)
    assert report["dead_groups"] == pytest.approx(report["dead"] / 10)
    assert report["chosen_reward"] > report["rejected_reward"]


def test_nothing_to_prefer_is_said(extended: Extended, tmp_path, monkeypatch) -> None:
    from whyrec.train import rewards as rewards_module

    monkeypatch.setitem(rewards_module.REWARDS, "same", lambda outcomes, _: outcomes.tokens_R * 0.0)
    roller = make_roller(extended, rewards=("same",), weights=(1.0,), rounds=0)
    with pytest.raises(ValueError, match="none of 2 groups of thoughts has a best and a worst"):
        write_preferences(
            roller,
            extended.model,
            [0, 1],
            negatives=1,
            shard=4,
            folder=tmp_path / ".shards",
            file=tmp_path / "found.parquet",
            state=PartialState(cpu=True),
        )


scores = st.floats(-5, 5, allow_nan=False)


@given(
    st.lists(st.tuples(scores, st.lists(scores, min_size=1, max_size=4)), min_size=1, max_size=4)
)
def test_the_loss_is_s_dpos(groups) -> None:
    flat, members, expected = [], [], []
    for place, (chosen, rejected) in enumerate(groups):
        flat += [chosen, *rejected]
        members += [place] * (1 + len(rejected))
        odds = sum(math.exp(score - chosen) for score in rejected)
        expected.append(-math.log(1 / (1 + math.exp(math.log(odds)))))
    found = preference_loss(torch.tensor(flat), torch.tensor(members))
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_with_one_rejected_reply_it_is_dpos() -> None:
    chosen, rejected = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 2.0])
    found = preference_loss(
        torch.stack([chosen, rejected], 1).flatten(), torch.tensor([0, 0, 1, 1])
    )
    torch.testing.assert_close(found, -F.logsigmoid(chosen - rejected))


def test_a_batch_holds_each_reply_as_the_recommender_sees_it(extended: Extended) -> None:
    """And scores its words and codes, but not what the recommender adds by rule."""
    roller = make_roller(extended)
    end = extended.vocabulary.think_end
    preference = Preference(3, [100, 200, end], 7, [[300, 400], []], [8, 11], 1.0, 0.0)
    collator = ReplyCollator(
        [preference], steps=roller.steps, encoder=extended.encoder, codes_NL=extended.codes_NL
    )
    batch = collator([{"index": 0}, {"index": 0}])
    history = roller.steps[3].history
    assert batch["group"].tolist() == [0, 0, 0, 1, 1, 1]
    for row, (words, item) in enumerate([([100, 200], 7), ([300, 400], 8), ([], 11)]):
        prompt = extended.encoder.answer_prompt(history, words)
        expected = [*prompt, *extended.encoder.item(item)]
        assert batch["ids"][row][batch["mask"][row]].tolist() == expected
        assert batch["codes"][row].tolist() == extended.codes_NL[item].tolist()
    words = [batch["ids"][row][batch["text"][row]].tolist() for row in range(3)]
    assert words == [[100, 200, end], [300, 400], []]
    model = copy.deepcopy(extended.model)
    num_rows, stop = model.get_output_embeddings().weight.shape[0], extended.vocabulary.think_end
    text_V = text_tokens(extended.tokenizer, num_rows=num_rows, stop=stop)
    attach_policy(model, Policy(extended.vocabulary, extended.trie, text_V, 1.0))
    scored = score(
        model,
        ids_BT=batch["ids"],
        mask_BT=batch["mask"],
        text_BT=batch["text"],
        codes_BL=batch["codes"],
    )
    assert (scored.words_BT != 0).sum(1).tolist() == [3, 2, 0, 3, 2, 0]
    torch.testing.assert_close(scored.codes_BL[:3], scored.codes_BL[3:])
