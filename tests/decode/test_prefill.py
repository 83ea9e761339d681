"""Prompts out of the cache, and fixed shapes, against prompts computed whole."""

from itertools import takewhile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_codes, make_model, make_vocabulary
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.prefill import _shared_prefix
from whyrec.decode.prompt_cache import PromptCache
from whyrec.decode.tree_attention import KeyValueStore
from whyrec.sid.trie import Trie

LEVELS = (4, 3, 5)


@pytest.fixture(scope="module")
def decoder() -> BeamDecoder:
    codes_NL = make_codes(LEVELS, num_items=40, seed=2)
    return BeamDecoder(
        make_model(vocab_size=8 + sum(LEVELS) + 3),
        vocabulary=make_vocabulary(LEVELS),
        trie=Trie.build(codes_NL, level_sizes=LEVELS),
    )


def run_tokens(decoder: BeamDecoder) -> list[int]:
    """Tokens of every forward pass from here on."""
    calls: list[int] = []

    def note(_module: object, _args: object, kwargs: dict) -> None:
        calls.append(kwargs["input_ids"].numel())

    decoder.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@st.composite
def families(draw: st.DrawFn) -> list[list[list[int]]]:
    """Batches of prompts that begin as others do."""
    stem = draw(st.lists(st.integers(0, 20), min_size=1, max_size=30))
    one = st.tuples(st.integers(0, len(stem)), st.lists(st.integers(0, 20), max_size=8)).map(
        lambda cut: [*stem[: cut[0]], *cut[1], 1]
    )
    return draw(st.lists(st.lists(one, min_size=1, max_size=5), min_size=1, max_size=4))


@settings(max_examples=40, deadline=None)
@given(families(), st.sampled_from([1 << 30, 40_000, 0]))
def test_known_prompts_change_nothing(
    decoder: BeamDecoder, batches: list[list[list[int]]], max_bytes: int
) -> None:
    cache = PromptCache(max_bytes)
    for prompts in batches:
        fresh = decoder.search(decoder.prefill(prompts, width=6), width=6)
        prefilled = decoder.prefill(prompts, width=6, cache=cache)
        known = decoder.search(prefilled, width=6)
        torch.testing.assert_close(known.scores_UW, fresh.scores_UW, atol=1e-4, rtol=0)
        again = decoder.search(prefilled, width=6)
        torch.testing.assert_close(again.scores_UW, fresh.scores_UW, atol=1e-4, rtol=0)
    assert cache._nbytes <= max_bytes
    assert cache._nbytes == sum(entry.nbytes for entry in cache._entries.values())


def test_only_what_is_new_is_run(decoder: BeamDecoder) -> None:
    cache, calls = PromptCache(1 << 30), run_tokens(decoder)
    prompt = list(range(1, 19))
    decoder.prefill([prompt], width=4, cache=cache)
    decoder.prefill([prompt], width=4, cache=cache)
    decoder.prefill([[*prompt, 5, 6, 7]], width=4, cache=cache)
    decoder.prefill([[*prompt[:10], 3, 3]], width=4, cache=cache)
    assert calls == [18, 1, 3, 2]


def test_the_least_recently_used_prompt_leaves_first(decoder: BeamDecoder) -> None:
    cache = PromptCache(1 << 30)
    decoder.prefill([[2] * 10], width=0, cache=cache)
    cache.max_bytes = 2 * cache._nbytes
    decoder.prefill([[3] * 10], width=0, cache=cache)
    assert cache.find([2] * 10).length == 10  # used again
    decoder.prefill([[4] * 10], width=0, cache=cache)
    assert [cache.find([n] * 10).length for n in (2, 3, 4)] == [10, 0, 10]
    assert cache.find([2, 2, 9]).length == 2


@given(st.lists(st.lists(st.sampled_from([0, 1, 255, 256, 70_000]), min_size=1, max_size=7)))
def test_the_longest_known_beginning_is_found(prompts: list[list[int]]) -> None:
    """Against a look at every entry; one that another begins with needs no place of its own."""
    cache, kept = PromptCache(1 << 30), list[list[int]]()
    for prompt in prompts:
        alike = [
            takewhile(lambda pair: pair[0] == pair[1], zip(prompt, entry, strict=False))
            for entry in kept
        ]
        assert cache.find(prompt).length == max((sum(1 for _ in both) for both in alike), default=0)
        store = KeyValueStore(torch.tensor([len(prompt)]), len(prompt), capacity=len(prompt))
        zeros = torch.zeros(1, 1, len(prompt), 2)
        store.write(0, zeros, zeros)
        cache.put(prompt, store, 0)
        if not any(entry[: len(prompt)] == prompt for entry in kept):
            kept = [entry for entry in kept if prompt[: len(entry)] != entry] + [prompt]
        assert sorted(entry.ids.tolist() for entry in cache._entries.values()) == sorted(kept)
        assert cache._order == sorted(cache._entries)


@pytest.mark.parametrize("width", [1, 5, 60])
@pytest.mark.parametrize("align", [1, 8])
def test_fixed_shapes_equal_compact_ones(decoder: BeamDecoder, width: int, align: int) -> None:
    rng = np.random.default_rng(width)
    prompts = [rng.integers(0, 20, size).tolist() for size in (3, 17, 9)]
    expected = decoder.search(decoder.prefill(prompts, width=width), width=width)
    prefilled = decoder.prefill(prompts, width=width, other_slots=align)
    prefilled.store.align = align
    found = decoder.search(prefilled, width=width, compact=False)
    assert torch.equal(found.items_UW, expected.items_UW)
    torch.testing.assert_close(found.scores_UW, expected.scores_UW, atol=1e-4, rtol=0)


def test_fixed_shapes_search_again_from_the_same_prompts(decoder: BeamDecoder) -> None:
    prompts = [[3, 9, 4, 1], [5, 1]]
    rules: list[list[list[int]] | None] = [[[2, 7], [0]], None]
    expected = [
        decoder.search(decoder.prefill(prompts, width=6), width=6, excluded=excluded)
        for excluded in rules
    ]
    prefilled = decoder.prefill(prompts, width=6)  # room for one search
    for excluded, wanted in zip(rules, expected, strict=True):
        found = decoder.search(prefilled, width=6, excluded=excluded, compact=False)
        assert torch.equal(found.items_UW, wanted.items_UW)
        torch.testing.assert_close(found.scores_UW, wanted.scores_UW, atol=1e-4, rtol=0)


@given(families())
def test_what_prompts_begin_with_alike(batches: list[list[list[int]]]) -> None:
    for prompts in batches:
        shortest = min(map(len, prompts))
        alike = [len({tuple(prompt[:n]) for prompt in prompts}) == 1 for n in range(shortest)]
        shared = max(n for n, same in enumerate(alike) if same)
        worth = shared * len(prompts) >= 4 * max(map(len, prompts))
        assert _shared_prefix(prompts) == (shared if worth else 0)
