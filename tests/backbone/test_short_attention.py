"""Attention of short documents: the kernels against float32, document by document.

The kernels run in Triton's interpreter where there is no GPU: `pip install triton` and
`TRITON_INTERPRET=1`.
"""

import importlib.util
import os
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whyrec.backbone import short_attention
from whyrec.backbone.short_attention import Tile, document_bounds

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
@settings(deadline=None)
def test_bounds_are_those_of_every_tokens_document(lengths: list[int]) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    wanted = [
        (start, stop)
        for start, stop in pairwise(starts.tolist())
        for _ in range(start, stop)  # empty documents have no token
    ]
    bounds_2T = document_bounds(starts, tokens=len(wanted))
    assert bounds_2T.dtype == torch.int32
    assert list(zip(*bounds_2T.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(
    ("change", "supported"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"shape": (9, 9, 128)}, False),
        ({"is_cuda": False}, False),
    ],
)
def test_what_the_kernels_do_not_take_is_left_to_pytorch(
    change: dict, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_attention, "_HAS_TRITON", True)
    heads: Any = SimpleNamespace(
        **{"is_cuda": True, "dtype": torch.bfloat16, "shape": (9, 9, 64)} | change
    )
    assert short_attention.is_supported(heads, longest=1302) == supported
    assert not short_attention.is_supported(heads, longest=8192)
    monkeypatch.setattr(short_attention, "_HAS_TRITON", False)
    assert not short_attention.is_supported(heads, longest=1302)


def reference(
    heads_TNE: Tensor, starts: list[int], *, kv_heads: int, scale: float, cos_sin_TE: Tensor | None
) -> Tensor:
    """One call of PyTorch's attention a document, in the dtype of the heads."""
    queries = heads_TNE.shape[1] - 2 * kv_heads
    if cos_sin_TE is not None:
        cos_TE, sin_TE = cos_sin_TE
        turned = heads_TNE[:, :-kv_heads]
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos_TE[:, None] + torch.cat((-high, low), dim=-1) * sin_TE[:, None]
        heads_TNE = torch.cat((turned, heads_TNE[:, -kv_heads:]), dim=1)
    query, key, value = heads_TNE.transpose(0, 1).split((queries, kv_heads, kv_heads))
    pieces = [
        F.scaled_dot_product_attention(
            query[None, :, start:stop],
            key[None, :, start:stop],
            value[None, :, start:stop],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )[0]
        for start, stop in pairwise(starts)
        if stop > start
    ]
    return torch.cat(pieces, dim=1).transpose(0, 1)


ROWS = {
    "tiles": [16, 16, 32, 48],
    "short": [1, 5, 1, 1, 7, 13, 20, 3],
    "long": [3, 90, 2],
    "one": [75],
    "empty": [0, 9, 0, 0, 30, 0],
    "padded": [11, 29, 40, 40, 7],
}


@needs_triton
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rotated"), [(6, 2, True), (2, 2, False), (4, 1, True)]
)
def test_kernels_attend_as_pytorch_does_document_by_document(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    rotated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(short_attention, "TILE", Tile(16, 1, 1))
    tokens, size = sum(lengths), 32
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    heads_TNE = torch.randn(tokens, heads + 2 * kv_heads, size, device=DEVICE, requires_grad=True)
    cos_sin_TE = None
    if rotated:
        angles = torch.rand(tokens, size // 2, device=DEVICE) * 6
        cos_sin_TE = torch.cat((angles, angles), dim=-1)
        cos_sin_TE = torch.stack((cos_sin_TE.cos(), cos_sin_TE.sin()))
    out_THE = short_attention.short_attention(
        heads_TNE,
        document_bounds(starts.to(DEVICE), tokens=tokens),
        kv_heads=kv_heads,
        scale=0.3,
        **({} if cos_sin_TE is None else {"cos_TE": cos_sin_TE[0], "sin_TE": cos_sin_TE[1]}),
    )
    wanted_THE = reference(
        heads_TNE, starts.tolist(), kv_heads=kv_heads, scale=0.3, cos_sin_TE=cos_sin_TE
    )
    torch.testing.assert_close(out_THE, wanted_THE, rtol=1e-4, atol=1e-5)
    d_out_THE = torch.randn_like(out_THE)
    (grads_TNE,) = torch.autograd.grad(out_THE, heads_TNE, d_out_THE)
    (wanted_TNE,) = torch.autograd.grad(wanted_THE, heads_TNE, d_out_THE)
    torch.testing.assert_close(grads_TNE, wanted_TNE, rtol=1e-4, atol=1e-4)
