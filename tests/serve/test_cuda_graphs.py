"""Beams in buckets of fixed shapes, uncaptured, against the reference search."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_codes, make_model, make_vocabulary
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.permitted import Rule
from whyrec.serve import cuda_graphs
from whyrec.serve.cuda_graphs import Bucket, Buffers, GraphedBeams, fixed_beam
from whyrec.sid.trie import Trie

LEVELS, NUM_ITEMS = (4, 3, 5), 40


@pytest.fixture(scope="module")
def decoder() -> BeamDecoder:
    codes_NL = make_codes(LEVELS, num_items=NUM_ITEMS, seed=2)
    return BeamDecoder(
        make_model(vocab_size=8 + sum(LEVELS) + 3),
        vocabulary=make_vocabulary(LEVELS),
        trie=Trie.build(codes_NL, level_sizes=LEVELS),
    )


def prompts(lengths: list[int], *, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 20, length).tolist() for length in lengths]


def check(graphed: GraphedBeams, asked: list[list[int]], rules: list[Rule], *, width: int) -> None:
    decoder = graphed.decoder
    found = graphed(asked, width=width, rules=rules)
    expected = decoder.search(
        decoder.prefill(asked, width=width), width=width, permitted=decoder.permitted(rules)
    )
    assert torch.equal(found.items_UW, expected.items_UW)
    torch.testing.assert_close(found.scores_UW, expected.scores_UW, atol=1e-4, rtol=0)


def test_batches_share_buckets_and_leave_nothing_behind(decoder: BeamDecoder) -> None:
    graphed = GraphedBeams(decoder)
    rule = Rule(excluded=[3, 4, 11])
    few = Rule(allowed=list(range(0, NUM_ITEMS, 3)), prefixes=[[0], [1, 2]])
    for seed in range(3):
        check(graphed, prompts([5, 30, 12], seed=seed), [rule, Rule(), few], width=7)
        check(graphed, prompts([31, 2, 9, 9], seed=seed), [few, few, Rule(), rule], width=7)
    check(graphed, prompts([33]), [Rule()], width=7)
    check(graphed, prompts([8]), [rule], width=NUM_ITEMS + 5)
    assert set(graphed._graphs) == {
        Bucket(4, 32, 7, 128),
        Bucket(1, 64, 7, 128),
        Bucket(1, 32, NUM_ITEMS + 5, 128),
    }


def test_a_result_is_not_written_over(decoder: BeamDecoder) -> None:
    graphed = GraphedBeams(decoder)
    first = graphed(prompts([9], seed=1), width=5, rules=[Rule()])
    kept = first.items_UW.clone()
    graphed(prompts([9], seed=2), width=5, rules=[Rule(excluded=kept[0].tolist())])
    assert torch.equal(first.items_UW, kept)


def test_what_fits_no_bucket_is_right_too(decoder: BeamDecoder, monkeypatch) -> None:
    monkeypatch.setattr(cuda_graphs, "USERS", (1, 2))
    monkeypatch.setattr(cuda_graphs, "MAX_SLOTS", 64)
    monkeypatch.setattr(cuda_graphs, "INTERVALS", (2, 8))
    graphed = GraphedBeams(decoder)
    check(graphed, prompts([5, 6, 7, 8, 9]), [Rule()] * 5, width=4)  # too many users
    check(graphed, prompts([70, 3]), [Rule()] * 2, width=4)  # too long
    many = Rule(excluded=decoder.trie.item[1::2].tolist())
    check(graphed, prompts([5]), [many], width=4)  # too many intervals
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", len(graphed._graphs))
    check(graphed, prompts([5]), [Rule()], width=9)  # one bucket too many
    assert set(graphed._graphs) == {Bucket(1, 32, 4, 2), Bucket(2, 32, 4, 2)}


def test_prepared_prefixes_take_the_graphs_of_plain_requests(
    decoder: BeamDecoder, monkeypatch
) -> None:
    """Fifty prefixes less a history are no other bucket, and are looked up once a batch."""
    batches, real = [], BeamDecoder.permitted_on_host

    def note(self, rules, **how):
        batches.append(len(rules))
        return real(self, rules, **how)

    monkeypatch.setattr(BeamDecoder, "permitted_on_host", note)
    codes_NL = make_codes((16, 16, 16), num_items=900, seed=3)
    model = make_model(vocab_size=8 + 48 + 3)
    trie = Trie.build(codes_NL, level_sizes=(16, 16, 16))
    vocabulary = make_vocabulary((16, 16, 16))
    graphed = GraphedBeams(BeamDecoder(model, vocabulary=vocabulary, trie=trie))
    prefixes = torch.unique(codes_NL[:, :2], dim=0)[::3][:50].tolist()
    inside = [n for n, codes in enumerate(codes_NL.tolist()) if codes[:2] in prefixes]
    prepared = Rule(excluded=inside[:100:3], prefixes=prefixes)
    check(graphed, prompts([20, 25]), [Rule([1, 2])] * 2, width=6)
    buckets, batches[:] = set(graphed._graphs), []
    asked = prompts([20, 30])
    graphed(asked, width=6, rules=[prepared, prepared])
    assert batches == [2]
    check(graphed, asked, [prepared, Rule([5])], width=6)
    assert set(graphed._graphs) == buckets == {Bucket(2, 32, 6, cuda_graphs.INTERVALS[0])}


def test_with_all_graphs_made_a_greater_one_is_taken(decoder: BeamDecoder, monkeypatch) -> None:
    monkeypatch.setattr(cuda_graphs, "INTERVALS", (2, 16))
    graphed = GraphedBeams(decoder)
    rule = Rule(excluded=[3, 4, 11, 20])
    for sizes in ([40, 3, 9], [70] * 7, [5, 5]):
        check(graphed, prompts(sizes), [rule] * len(sizes), width=5)
    made = set(graphed._graphs)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", len(made))
    ran: list[Bucket] = []
    for bucket, run in list(graphed._graphs.items()):
        monkeypatch.setitem(
            graphed._graphs, bucket, lambda run=run, bucket=bucket: (ran.append(bucket), run())
        )
    check(graphed, prompts([50, 2]), [Rule(), rule], width=5)  # the smallest that holds it
    check(graphed, prompts([66]), [Rule()], width=5)
    check(graphed, prompts([8]), [Rule()], width=4)  # of this width there is none
    check(graphed, prompts([100]), [Rule()], width=5)  # nor one so long
    assert ran == [Bucket(4, 64, 5, 16), Bucket(8, 96, 5, 16)] and set(graphed._graphs) == made


def test_warming_up_makes_the_buckets(decoder: BeamDecoder) -> None:
    graphed = GraphedBeams(decoder)
    graphed.warm_up([1, 3], prompt_tokens=40, width=6)
    assert set(graphed._graphs) == {Bucket(1, 64, 6, 128), Bucket(4, 64, 6, 128)}


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a CUDA graph would: numbers that come from the host or are asked for there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "lift_fresh", "nonzero", "equal", "unique_dim")
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta", f"{name} sees a tensor on the host"
        return result


@pytest.mark.parametrize("num_items", [6, NUM_ITEMS])
def test_a_beam_of_fixed_shapes_never_asks_the_device(num_items: int) -> None:
    """Tensors on the meta device have no values, so that whatever depends on one fails there."""
    trie = Trie.build(make_codes(LEVELS, num_items=num_items, seed=2), level_sizes=LEVELS)
    assert (None in trie.tables) == (num_items == 6)  # both ways to look children up
    model = make_model(vocab_size=8 + sum(LEVELS) + 3).to("meta")
    decoder = BeamDecoder(model, vocabulary=make_vocabulary(LEVELS), trie=trie)
    lengths_U, ids_UP = torch.ones(2, dtype=torch.long), torch.ones(2, 32, dtype=torch.long)
    permitted = decoder.permitted([Rule(), Rule(excluded=[1])], intervals=8)
    buffers = Buffers(ids_UP.to("meta"), lengths_U.to("meta"), permitted)
    with torch.no_grad(), NothingFromTheHost():
        beams = fixed_beam(decoder, buffers, width=7)
    assert beams.items_UW.shape == beams.scores_UW.shape == (2, 7)
