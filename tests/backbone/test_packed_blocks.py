"""Recorded blocks. Without a GPU nothing is replayed: what is recorded is looked at instead."""

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from conftest import make_model
from whyrec.backbone.fused_projections import fuse_projections
from whyrec.backbone.lora import add_lora, plain_model
from whyrec.backbone.packed_blocks import PackedBlocks

STARTS = torch.tensor([0, 4, 5, 11, 11], dtype=torch.int32)
POSITIONS_1T = torch.cat([torch.arange(stop - start) for start, stop in pairwise(STARTS.tolist())])[
    None
]


def no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are run while they are recorded, with a gradient of ones, and never again."""
    graph = SimpleNamespace(pool=lambda: None, replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    for name in ("graph", "stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)


def run(model: nn.Module, embedded_1TH: Tensor, blocks: PackedBlocks) -> tuple:
    model.zero_grad()
    embedded_1TH = embedded_1TH.clone().requires_grad_()
    hidden_1TH = blocks(embedded_1TH, POSITIONS_1T, STARTS)
    hidden_1TH.sum().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden_1TH.detach().clone(), embedded_1TH.grad, named


@pytest.mark.parametrize("lora", [False, True])
def test_a_recording_is_the_blocks_and_uses_no_leaf_that_others_use(
    lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: nn.Module = make_model(vocab_size=20)
    if lora:
        model = add_lora(model, token_ids=[18, 19], rank=2, alpha=4, dropout=0.0)  # type: ignore
    model.train()
    before = [id(p) for p in model.parameters()]
    if not lora:
        fuse_projections(model)  # type: ignore[arg-type]
    embedded_1TH = torch.randn(1, int(STARTS[-1]), 16)
    plain = run(model, embedded_1TH, PackedBlocks(plain_model(model), longest=8))
    leaves: list[Tensor] = []
    grad = torch.autograd.grad

    def watched(outputs, inputs, *rest, **settings):
        leaves.extend(inputs)
        return grad(outputs, inputs, *rest, **settings)

    no_recording(monkeypatch)
    monkeypatch.setattr(torch.autograd, "grad", watched)
    recorded = run(model, embedded_1TH, PackedBlocks(plain_model(model), longest=8, graphs=True))
    torch.testing.assert_close(recorded, plain)
    assert [id(p) for p in model.parameters()] == before
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {leaf.data_ptr() for leaf in leaves} >= {p.data_ptr() for p in trained}
    assert not {id(leaf) for leaf in leaves} & {id(p) for p in trained}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_replays_on_a_gpu_are_the_blocks(compiled: bool) -> None:
    """Two rows one after the other, with a loss of the plain blocks that somebody still holds."""
    heads = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(vocab_size=20, **heads, head_dim=64, initializer_range=0.05).cuda().train()
    fuse_projections(model)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    plain, graphed = (PackedBlocks(model, longest=64, graphs=graphs) for graphs in (False, True))
    positions_1T = torch.arange(64, device="cuda").repeat(4)[None]
    starts = torch.arange(0, 257, 64, dtype=torch.int32, device="cuda")
    held = []
    for _ in range(2):
        embedded_1TH = torch.randn(1, 256, 128, device="cuda", dtype=torch.bfloat16)
        found = []
        for blocks in (plain, graphed):
            model.zero_grad(set_to_none=True)
            inputs_1TH = embedded_1TH.clone().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                hidden_1TH = blocks(inputs_1TH, positions_1T, starts)
            loss = hidden_1TH.float().square().sum()
            loss.backward()
            named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append((hidden_1TH.detach().clone(), inputs_1TH.grad, named))
            held.append(loss)
        torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)
