"""Permitted items against brute force, and searches that keep to them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_codes, make_model, make_vocabulary
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.permitted import Permitted, Rule
from whyrec.sid.trie import Trie

LEVELS, NUM_ITEMS = (4, 3, 5), 31


@pytest.fixture(scope="module")
def decoder() -> BeamDecoder:
    codes_NL = make_codes(LEVELS, num_items=NUM_ITEMS, seed=1)
    model = make_model(vocab_size=8 + sum(LEVELS) + 3)
    return BeamDecoder(
        model,
        vocabulary=make_vocabulary(LEVELS),
        trie=Trie.build(codes_NL, level_sizes=LEVELS),
    )


CODES = make_codes(LEVELS, num_items=NUM_ITEMS, seed=1).tolist()


def may_come(rule: Rule) -> set[int]:
    """The items that a rule leaves, by looking at each."""
    return {
        item
        for item, codes in enumerate(CODES)
        if item not in rule.excluded
        and (rule.allowed is None or item in rule.allowed)
        and (
            rule.prefixes is None
            or any(codes[: len(prefix)] == list(prefix) for prefix in rule.prefixes)
        )
    }


item_lists = st.lists(st.integers(0, NUM_ITEMS - 1), max_size=NUM_ITEMS)
prefix_lists = st.lists(
    st.tuples(*(st.integers(0, size - 1) for size in LEVELS)).flatmap(
        lambda codes: st.integers(0, 3).map(lambda length: codes[:length])
    ),
    max_size=6,
)
rules = st.builds(Rule, item_lists, st.none() | item_lists, st.none() | prefix_lists)


@settings(max_examples=150, deadline=None)
@given(st.lists(rules, min_size=1, max_size=4), st.integers(1, 9))
def test_ranges_equal_brute_force(decoder: BeamDecoder, asked: list[Rule], intervals: int) -> None:
    permitted = decoder.permitted(asked, intervals=intervals)
    assert permitted.starts_UX.shape[1] >= intervals
    order = decoder.trie.item.tolist()
    ends = torch.arange(NUM_ITEMS + 1, dtype=torch.int32)
    low_UWK = ends[:, None].expand(len(asked), -1, NUM_ITEMS + 1)
    high_UWK = ends[None].expand(len(asked), NUM_ITEMS + 1, -1)
    found_UWK = permitted.any_between(low_UWK.contiguous(), high_UWK.contiguous())
    for user, rule in enumerate(asked):
        good = np.array([item in may_come(rule) for item in order])
        assert not found_UWK[user, 0, 0]  # a dead node's range
        for low in range(NUM_ITEMS):
            for high in range(low + 1, NUM_ITEMS + 1):
                assert bool(found_UWK[user, low, high]) == bool(good[low:high].any())


@settings(max_examples=40, deadline=None)
@given(st.lists(rules, min_size=2, max_size=2))
def test_a_search_keeps_to_its_rules_and_its_scores(
    decoder: BeamDecoder, asked: list[Rule]
) -> None:
    prompts = [[3, 4, 5], [6, 1]]
    everything = decoder.search(decoder.prefill(prompts, width=NUM_ITEMS), width=NUM_ITEMS)
    for compact in (True, False):
        beams = decoder.search(
            decoder.prefill(prompts, width=NUM_ITEMS),
            width=NUM_ITEMS,
            permitted=decoder.permitted(asked),
            compact=compact,
        )
        for user, rule in enumerate(asked):
            found = [item for item in beams.items_UW[user].tolist() if item >= 0]
            assert set(found) == may_come(rule) and len(found) == len(set(found))
            full = dict(
                zip(
                    everything.items_UW[user].tolist(),
                    everything.scores_UW[user].tolist(),
                    strict=True,
                )
            )
            scores = beams.scores_UW[user, : len(found)].tolist()
            assert scores == pytest.approx([full[item] for item in found], abs=1e-4)


def test_buffers_are_taken_over_in_place(decoder: BeamDecoder) -> None:
    buffer = decoder.permitted([Rule()], intervals=8)
    address = buffer.starts_UX.data_ptr()
    other = decoder.permitted([Rule(excluded=[2, 9])], intervals=8)
    buffer.copy_(other)
    assert buffer.starts_UX.data_ptr() == address
    assert all(
        torch.equal(getattr(buffer, name), getattr(other, name))
        for name in ("starts_UX", "stops_UX")
    )
    assert isinstance(buffer.to(torch.device("cpu")), Permitted)


@settings(max_examples=50, deadline=None)
@given(st.lists(rules, min_size=1, max_size=3))
def test_padding_permits_nothing_more(decoder: BeamDecoder, asked: list[Rule]) -> None:
    host = decoder.permitted_on_host(asked)
    wide = host.widened(5, host.most + 3, num_items=NUM_ITEMS)
    assert wide.most == host.most + 3
    expected = decoder.permitted_on_host(asked, intervals=wide.most)
    for name in ("starts_UX", "stops_UX"):
        assert torch.equal(getattr(wide, name)[: len(asked)], getattr(expected, name))
    low_UWK = torch.arange(NUM_ITEMS, dtype=torch.int32).expand(5, 1, -1).contiguous()
    assert not wide.any_between(low_UWK, low_UWK + 1)[len(asked) :].any()


def test_more_prefixes_and_users_are_not_more_calls(decoder: BeamDecoder) -> None:
    """A walk through the trie for each prefix would take longer than the beam."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for users, repeats in ((1, 1), (64, 20)):
        with Count() as count:
            decoder.permitted_on_host([Rule([3], None, [[0, 1], [2, 2]] * repeats)] * users)
        counts.append(count.calls)
    assert counts[0] == counts[1]
