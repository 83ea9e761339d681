"""The beam against brute force (every item by plain forward passes) and a naive beam in Python."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import make_codes, make_model, make_vocabulary
from whyrec.backbone.lora import plain_model
from whyrec.decode.beam import BeamDecoder, Beams
from whyrec.sid.trie import Trie

Prefixes = dict[tuple[int, ...], float]  # log-probability of each code, given the codes before it


@dataclass
class Case:
    """A model, a catalogue and prompts."""

    model: Any
    level_sizes: tuple[int, ...]
    codes_NL: Tensor
    prompts: list[list[int]]

    @property
    def num_items(self) -> int:
        return len(self.codes_NL)

    def decoder(self, model: torch.nn.Module | None = None) -> BeamDecoder:
        return BeamDecoder(
            model or self.model,
            vocabulary=make_vocabulary(self.level_sizes),
            trie=Trie.build(self.codes_NL, level_sizes=self.level_sizes),
        )


def make_case(
    level_sizes: Sequence[int],
    *,
    num_items: int,
    lengths: Sequence[int] = (5,),
    kind: str = "llama",
    tied: bool = True,
    seed: int = 0,
) -> Case:
    sizes = tuple(level_sizes)
    model = make_model(kind, vocab_size=8 + sum(sizes) + 3, tied=tied, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    high = model.config.vocab_size
    prompts = [torch.randint(high, (n,), generator=generator).tolist() for n in lengths]
    return Case(model, sizes, make_codes(sizes, num_items=num_items, seed=seed), prompts)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return make_case(
        draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)),
        num_items=draw(st.integers(1, 40)),
        lengths=draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)),
        kind=draw(st.sampled_from(["llama", "qwen2", "qwen3"])),
        tied=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
    )


@torch.no_grad()
def prefix_log_probs(case: Case, prompt: list[int]) -> Prefixes:
    """Every legal prefix's last code, renormalised over its legal siblings, by plain passes."""
    offsets = make_vocabulary(case.level_sizes).offsets
    table: Prefixes = {}
    codes = case.codes_NL.tolist()
    ids = [prompt + [o + c for o, c in zip(offsets, row, strict=True)] for row in codes]
    logits_NTV = case.model(input_ids=torch.tensor(ids)).logits.double()
    for item, row in enumerate(codes):
        for level, offset in enumerate(offsets):
            siblings = sorted({other[level] for other in codes if other[:level] == row[:level]})
            scores = logits_NTV[item, len(prompt) - 1 + level, [offset + c for c in siblings]]
            log_probs = scores.log_softmax(0)
            table[tuple(row[: level + 1])] = float(log_probs[siblings.index(row[level])])
    return table


def brute_force(case: Case, prompt: list[int]) -> list[float]:
    """The score of every item."""
    table = prefix_log_probs(case, prompt)
    depths = range(1, len(case.level_sizes) + 1)
    return [sum(table[tuple(row[:d])] for d in depths) for row in case.codes_NL.tolist()]


def naive_beam(case: Case, prompt: list[int], width: int, excluded: set[int]) -> list[int]:
    """Beam search as a textbook writes it; skips an example whose cut is a near tie."""
    table = prefix_log_probs(case, prompt)
    codes = [tuple(row) for row in case.codes_NL.tolist()]
    allowed = [row for item, row in enumerate(codes) if item not in excluded]
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for level in range(len(case.level_sizes)):
        grown = {
            row[: level + 1]: score + table[row[: level + 1]]
            for prefix, score in beams
            for row in allowed
            if row[:level] == prefix
        }
        ranked = sorted(grown.items(), key=lambda beam: -beam[1])
        for (_, better), (_, worse) in itertools.pairwise(ranked[: width + 1]):
            assume(better - worse > 1e-4)
        beams = ranked[:width]
    return [codes.index(prefix) for prefix, _ in beams]


def pairs(beams: Beams, user: int) -> tuple[list[int], list[float]]:
    """A user's items and scores; whatever is empty must come last and say so."""
    items, scores = beams.items_UW[user].tolist(), beams.scores_UW[user].tolist()
    found = sum(item >= 0 for item in items)
    assert all(item == -1 for item in items[found:])
    assert all(score == -math.inf for score in scores[found:])
    return items[:found], scores[:found]


def excluded_sets(case: Case, data: st.DataObject) -> list[list[int]]:
    one = st.lists(st.integers(0, case.num_items - 1), max_size=case.num_items)
    return [data.draw(one) for _ in case.prompts]


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 3), st.data())
def test_wide_beams_equal_brute_force(case: Case, spare: int, data: st.DataObject) -> None:
    width = case.num_items + spare
    excluded = excluded_sets(case, data)
    decoder = case.decoder()
    prefilled = decoder.prefill(case.prompts, width=width)
    beams = decoder.search(prefilled, width=width, excluded=excluded)
    assert beams.items_UW.shape == beams.scores_UW.shape == (len(case.prompts), width)
    for user, prompt in enumerate(case.prompts):
        expected = brute_force(case, prompt)
        items, scores = pairs(beams, user)
        assert sorted(items) == sorted(set(range(case.num_items)) - set(excluded[user]))
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([expected[item] for item in items], abs=1e-4)
    everything = sum(math.exp(score) for score in brute_force(case, case.prompts[0]))
    assert everything == pytest.approx(1, abs=1e-6)  # the reference itself is a distribution


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 8), st.data())
def test_narrow_beams_equal_a_naive_beam(case: Case, width: int, data: st.DataObject) -> None:
    excluded = excluded_sets(case, data)
    decoder = case.decoder()
    beams = decoder.search(
        decoder.prefill(case.prompts, width=width), width=width, excluded=excluded
    )
    for user, prompt in enumerate(case.prompts):
        expected = naive_beam(case, prompt, width, set(excluded[user]))
        items, scores = pairs(beams, user)
        assert items == expected
        scored = brute_force(case, prompt)
        assert scores == pytest.approx([scored[item] for item in items], abs=1e-4)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case((5, 4, 6), num_items=35, lengths=(3, 17, 9), seed=3)


def same(left: Beams, right: Beams) -> None:
    assert torch.equal(left.items_UW, right.items_UW)
    torch.testing.assert_close(left.scores_UW, right.scores_UW, atol=1e-5, rtol=0)


def test_two_searches_from_one_prefill_are_independent(case: Case) -> None:
    decoder = case.decoder()
    prefilled = decoder.prefill(case.prompts, width=12)
    first = decoder.search(prefilled, width=12)
    other = decoder.search(prefilled, width=5, excluded=[[0, 1, 2], [], [7]])
    same(first, decoder.search(prefilled, width=12))
    fresh = decoder.prefill(case.prompts, width=5)
    same(other, decoder.search(fresh, width=5, excluded=[[0, 1, 2], [], [7]]))


def test_a_batch_of_users_equals_each_alone(case: Case) -> None:
    decoder = case.decoder()
    excluded = [[1, 2], [], list(range(30))]
    together = decoder.search(decoder.prefill(case.prompts, width=9), width=9, excluded=excluded)
    for user, prompt in enumerate(case.prompts):
        alone = decoder.search(
            decoder.prefill([prompt], width=9), width=9, excluded=[excluded[user]]
        )
        same(alone, Beams(together.items_UW[[user]], together.scores_UW[[user]]))


def test_excluding_changes_no_other_score(case: Case) -> None:
    decoder = case.decoder()
    prefilled = decoder.prefill(case.prompts, width=35)
    before = decoder.search(prefilled, width=35)
    best = before.items_UW[:, :6].tolist()
    after = decoder.search(prefilled, width=35, excluded=best)
    for user in range(3):
        scores = dict(zip(*pairs(before, user), strict=True))
        items, left = pairs(after, user)
        assert items == [item for item in pairs(before, user)[0] if item not in best[user]]
        assert left == pytest.approx([scores[item] for item in items], abs=1e-5)


def test_everything_excluded_leaves_nothing(case: Case) -> None:
    decoder = case.decoder()
    prefilled = decoder.prefill(case.prompts, width=4)
    beams = decoder.search(prefilled, width=4, excluded=[list(range(35)), [3], [3]])
    assert pairs(beams, 0) == ([], [])
    assert len(pairs(beams, 1)[0]) == 4


def test_a_duplicate_in_an_exclusion_counts_once(case: Case) -> None:
    decoder = case.decoder()
    prefilled = decoder.prefill(case.prompts[:1], width=35)
    once = decoder.search(prefilled, width=35, excluded=[[4]])
    same(once, decoder.search(prefilled, width=35, excluded=[[4, 4, 4]]))


def tokens_by_call(model: Any, decoder: BeamDecoder, width: int) -> list[int]:
    """Tokens a user of each forward pass."""
    calls: list[int] = []

    def note(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        calls.append(kwargs["input_ids"].shape[1])

    hook = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        decoder.search(decoder.prefill([[1, 2, 3]], width=width), width=width)
    finally:
        hook.remove()
    return calls


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        # the first code says it all
        ([[0, 1, 2], [1, 0, 0], [2, 2, 1]], [3]),
        # the second decides for two of four items: two open beams are one, after code 0
        ([[0, 1, 2], [0, 2, 0], [1, 2, 1], [2, 0, 0]], [3, 1]),
        # one chain to a choice at the end: the codes before it must be read
        ([[1, 1, 0], [1, 1, 2]], [3, 1, 1]),
        # one item: nothing is left to choose
        ([[2, 1, 0]], [3]),
        # all levels are open
        ([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], [3, 2, 4]),
    ],
)
def test_forced_codes_cost_no_forward_pass(codes: list[list[int]], expected: list[int]) -> None:
    case = make_case((3, 3, 3), num_items=1)
    case.codes_NL = torch.tensor(codes)
    assert tokens_by_call(case.model, case.decoder(), width=8) == expected


def test_one_item_has_probability_one() -> None:
    case = make_case((3, 3, 3), num_items=1)
    decoder = case.decoder()
    beams = decoder.search(decoder.prefill(case.prompts, width=2), width=2)
    assert beams.items_UW.tolist() == [[0, -1]]
    assert beams.scores_UW.tolist() == [[0.0, -math.inf]]


def test_unmerged_lora_equals_merged() -> None:
    case = make_case((5, 4), num_items=18, lengths=(6, 11), tied=False)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(case.model, config).eval()
    decoder = case.decoder(plain_model(adapted))
    unmerged = decoder.search(decoder.prefill(case.prompts, width=18), width=18)
    case.model = adapted.merge_and_unload()
    merged = case.decoder()
    same(unmerged, merged.search(merged.prefill(case.prompts, width=18), width=18))
    expected = brute_force(case, case.prompts[0])
    items, scores = pairs(unmerged, 0)
    assert scores == pytest.approx([expected[item] for item in items], abs=1e-4)


def test_the_model_is_left_as_it_was(case: Case) -> None:
    ids = torch.tensor([case.prompts[1]])
    with torch.no_grad():
        before = case.model(input_ids=ids).logits
    implementation = case.model.config._attn_implementation
    decoder = case.decoder()
    decoder.search(decoder.prefill(case.prompts, width=5), width=5)
    assert case.model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(case.model(input_ids=ids).logits, before)


TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=8)), "sliding"),
        (
            lambda: Qwen2ForCausalLM(
                Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1)
            ),
            "sliding_attention",
        ),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8)), "sliding|caps"),
    ],
)
def test_attention_that_cannot_run_on_trees_is_refused(model: object, reason: str) -> None:
    codes_NL = torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match=reason) as error:
        BeamDecoder(
            model(),  # type: ignore[operator]
            vocabulary=make_vocabulary((2,)),
            trie=Trie.build(codes_NL, level_sizes=(2,)),
        )
    assert "choose a backbone" in str(error.value) and "\n" not in str(error.value)


def test_mistral_without_a_window_is_welcome() -> None:
    case = make_case((3, 3), num_items=8)
    torch.manual_seed(0)
    config = MistralConfig(**TINY, sliding_window=None, initializer_range=0.3)
    case.model = MistralForCausalLM(config).eval()
    decoder = case.decoder()
    beams = decoder.search(decoder.prefill(case.prompts, width=8), width=8)
    expected = brute_force(case, case.prompts[0])
    items, scores = pairs(beams, 0)
    assert scores == pytest.approx([expected[item] for item in items], abs=1e-4)


def forward_tokens(case: Case) -> tuple[list[tuple[int, int]], object]:
    """Users and tokens of each forward pass from here on, and the hook that notes them."""
    calls: list[tuple[int, int]] = []

    def note(_module: object, _args: object, kwargs: dict) -> None:
        calls.append(tuple(kwargs["input_ids"].shape))

    return calls, case.model.base_model.register_forward_pre_hook(note, with_kwargs=True)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 8), st.integers(1, 3), st.data())
def test_searches_that_share_prefixes_equal_fresh_ones(
    case: Case, width: int, searches: int, data: st.DataObject
) -> None:
    decoder = case.decoder()
    shared = decoder.prefill(case.prompts, width=width, searches=searches)
    for _ in range(3):
        excluded = excluded_sets(case, data)
        narrower = data.draw(st.integers(1, width))
        fresh = decoder.prefill(case.prompts, width=narrower)
        same(
            decoder.search(shared, width=narrower, excluded=excluded),
            decoder.search(fresh, width=narrower, excluded=excluded),
        )


def test_a_second_search_computes_new_prefixes_only() -> None:
    case = make_case((6, 5, 4), num_items=60, lengths=(7, 4), seed=1)
    decoder = case.decoder()
    prefilled = decoder.prefill(case.prompts, width=6, searches=2)
    first = decoder.search(prefilled, width=6)
    calls, hook = forward_tokens(case)
    same(first, decoder.search(prefilled, width=6))
    assert calls == []
    # The best item's place is taken by another one, whose prefix may be new: a few tokens at most.
    decoder.search(prefilled, width=6, excluded=first.items_UW[:, :1].tolist())
    hook.remove()
    assert sum(tokens for _, tokens in calls) <= 4


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 30), st.integers(1, 8), st.integers(0, 1_000))
def test_a_common_beginning_changes_nothing(case: Case, common: int, width: int, seed: int) -> None:
    beginning = [(seed + 7 * i) % case.model.config.vocab_size for i in range(common)]
    prompts = [beginning + prompt for prompt in case.prompts * 4]
    decoder = case.decoder()
    together = decoder.search(decoder.prefill(prompts, width=width), width=width)
    for user, prompt in enumerate(prompts[: len(case.prompts)]):
        alone = decoder.search(decoder.prefill([prompt], width=width), width=width)
        mine, expected = pairs(together, user), pairs(alone, 0)
        assert mine[1] == pytest.approx(expected[1], abs=1e-5)
        scores = brute_force(case, prompt)
        assert mine[1] == pytest.approx([scores[item] for item in mine[0]], abs=1e-4)


def test_a_common_beginning_is_run_once() -> None:
    case = make_case((4, 4), num_items=12, lengths=(3,) * 6, seed=2)
    prompts = [list(range(9)) + prompt for prompt in case.prompts]
    calls, hook = forward_tokens(case)
    case.decoder().prefill(prompts, width=4)
    hook.remove()
    assert calls == [(1, 9), (6, 3)]
