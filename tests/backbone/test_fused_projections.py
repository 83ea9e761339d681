"""Fused blocks: the same function, the same gradients, the same saved file."""

import importlib.util
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from conftest import make_model
from whyrec.backbone import fused_projections, packed_attention, short_attention
from whyrec.backbone.fused_projections import FusedAttention, FusedMLP, fuse_projections
from whyrec.backbone.packed_blocks import PackedBlocks
from whyrec.backbone.short_attention import Tile

STARTS = [0, 5, 6, 23, 40, 40]


def run(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a fixed packed row, and gradients of all weights."""
    generator = torch.Generator().manual_seed(0)
    embedded_1TH = torch.randn(1, STARTS[-1], model.config.hidden_size, generator=generator)
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(STARTS)])
    hidden_1TH = PackedBlocks(model, longest=20)(
        embedded_1TH, positions[None], torch.tensor(STARTS, dtype=torch.int32)
    )
    model.zero_grad()
    (hidden_1TH * torch.randn(hidden_1TH.shape, generator=generator)).sum().backward()
    named = model.named_parameters()
    return hidden_1TH, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize(
    "short",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                importlib.util.find_spec("triton") is None
                or os.environ.get("TRITON_INTERPRET") != "1",
                reason="needs Triton and TRITON_INTERPRET=1",
            ),
        ),
    ],
)
def test_fused_blocks_compute_what_they_did(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(vocab_size=20, hidden_size=64, head_dim=32)
    hidden_1TH, gradients = run(model)
    if short:
        monkeypatch.setattr(short_attention, "TILE", Tile(16, 1, 1))
        for module in (packed_attention, fused_projections):
            monkeypatch.setattr(module, "is_supported", lambda *_, **__: True)
    fuse_projections(model)
    assert [type(layer.self_attn) for layer in model.model.layers] == [FusedAttention] * 2
    assert [type(layer.mlp) for layer in model.model.layers] == [FusedMLP] * 2
    fused_1TH, fused = run(model)
    torch.testing.assert_close(fused_1TH, hidden_1TH, rtol=1e-4, atol=1e-5)
    assert fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_saved_files_and_plain_calls_know_nothing_of_it(tmp_path: Path) -> None:
    model = make_model(vocab_size=20)
    ids = torch.tensor([[1, 5, 7, 3]])
    logits, names = model(ids).logits, list(model.state_dict())
    fuse_projections(model)
    torch.testing.assert_close(model(ids).logits, logits)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].self_attn) is LlamaAttention
    torch.testing.assert_close(again(ids).logits, logits)


def test_layers_with_biases_stay_as_they_are() -> None:
    model = make_model(vocab_size=20, attention_bias=True)
    fuse_projections(model)
    assert type(model.model.layers[0].self_attn) is LlamaAttention
    assert type(model.model.layers[0].mlp) is FusedMLP
