"""Causal attention inside short documents that lie end to end in one row, forward and backward.

    out_t = Σ_s softmax_s(scale · R_t q_t · R_s k_s) v_s    over s with start(t) ≤ s ≤ t

R is the rotation to a token's position, done here when cosines and sines are given. Queries of H
heads share the keys and values of J (Ainslie et al. 2023, arXiv 2305.13245).

Flash Attention (Dao 2023, arXiv 2307.08691) starts a tile of 128 at every document, so that
documents of 70 tokens leave half of it empty. Here tiles are cut from the row, across documents
(`short_kernels.py`).

What is read is one tensor, as one matrix product can write it: all queries, keys and values of a
token side by side. The backward pass writes its gradient in the same form.

Dimensions: T tokens of the row, D documents, H query heads, J key/value heads, N = H + 2 J, E head
size.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # PyTorch's CUDA builds bring it
HEAD_SIZES = (64,)
# Tokens of a document. The usual length decides what is faster, and a catalogue's longest caption
# is far beyond it: 1,302 tokens in Beauty's mix, whose mean is 59.
LONGEST = 4096


class Tile(NamedTuple):
    """How one kernel is launched."""

    tokens: int
    warps: int
    stages: int


# The fastest of what was tried on an H100: 32,768 tokens in documents of 70 (of 200), a layer of
# SmolLM2-135M, rotation included, take .105 ms forward (.139) and .228 ms backward (.322), where
# Flash Attention without the rotation takes .140 (.181) and .586 (.523). By kernel alone:
#     forward    128 tokens, 8 warps .189 (.220); 32, 2 .136 (.228); 2 stages .138 (.175)
#     queries'   128, 8: + .112 (.111); 32, 2: + .113 (.236); 2 stages + .012 (.009)
#     keys'      32, 2: + .132 (.297); 8 warps + .075 (.102); 2 stages + .038 (.058)
# One kernel for both gradients, which reads nothing twice: .292 (.466).
TILE = Tile(64, 4, 1)


def is_supported(heads: Tensor, *, longest: int) -> bool:
    """Whether the kernels can and should attend for heads [..., E] like these."""
    return (
        _HAS_TRITON
        and heads.is_cuda
        and heads.dtype in (torch.bfloat16, torch.float16)
        and heads.shape[-1] in HEAD_SIZES
        and longest <= LONGEST
    )


def document_bounds(document_starts: Tensor, *, tokens: int) -> Tensor:
    """By token, where its document starts and where it stops: int32 [2, T].

    Args:
        document_starts: int32 [D + 1], ascending from 0 to T; documents may be empty.
        tokens: T.
    """
    every_T = torch.arange(tokens, device=document_starts.device, dtype=torch.int32)
    next_T = torch.searchsorted(document_starts, every_T, right=True)
    return torch.stack((document_starts[next_T - 1], document_starts[next_T]))


def short_attention(
    heads_TNE: Tensor,
    bounds_2T: Tensor,
    *,
    kv_heads: int,
    scale: float,
    cos_TE: Tensor | None = None,
    sin_TE: Tensor | None = None,
) -> Tensor:
    """Attend inside documents; returns [T, H, E].

    Args:
        heads_TNE: H query heads, then J key heads, then J value heads.
        bounds_2T: of `document_bounds`.
        kv_heads: J.
        scale: of the scores.
        cos_TE, sin_TE: rotate queries and keys by these; both halves of E are alike.
    """
    return _attend(heads_TNE, cos_TE, sin_TE, bounds_2T, kv_heads, scale)[0]


@torch.library.custom_op("whyrec::short_attention", mutates_args=())
def _attend(
    heads_TNE: Tensor,
    cos_TE: Tensor | None,
    sin_TE: Tensor | None,
    bounds_2T: Tensor,
    kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from whyrec.backbone.short_kernels import forward_kernel

    out_THE, lse_HT = _outputs(heads_TNE, kv_heads)
    _launch(
        forward_kernel,
        out_THE.shape[1],
        (heads_TNE, cos_TE, sin_TE, bounds_2T, out_THE, lse_HT),
        kv_heads,
        scale,
    )
    return out_THE, lse_HT


@torch.library.custom_op("whyrec::short_attention_backward", mutates_args=())
def _attend_backward(
    heads_TNE: Tensor,
    cos_TE: Tensor | None,
    sin_TE: Tensor | None,
    bounds_2T: Tensor,
    out_THE: Tensor,
    lse_HT: Tensor,
    d_out_THE: Tensor,
    kv_heads: int,
    scale: float,
) -> Tensor:
    from whyrec.backbone.short_kernels import key_gradient_kernel, query_gradient_kernel

    heads_TNE = heads_TNE.contiguous()
    grads_TNE, delta_HT = torch.empty_like(heads_TNE), torch.empty_like(lse_HT)
    given = (heads_TNE, cos_TE, sin_TE, bounds_2T, out_THE, lse_HT, d_out_THE)
    # The first leaves `delta_HT` to the second.
    for kernel, heads in (query_gradient_kernel, len(lse_HT)), (key_gradient_kernel, kv_heads):
        _launch(kernel, heads, (*given, grads_TNE, delta_HT), kv_heads, scale)
    return grads_TNE


def _launch(
    kernel: Any,
    heads: int,
    tensors: tuple[Tensor | None, ...],
    kv_heads: int,
    scale: float,
) -> None:
    """One program a head and tile; of what is read, the kernels know one layout."""
    heads_TNE, cos_TE = tensors[0], tensors[1]
    assert heads_TNE is not None
    tokens, many, size = heads_TNE.shape
    kernel[(heads, -(-tokens // TILE.tokens))](
        *(None if tensor is None else tensor.contiguous() for tensor in tensors),
        tokens,
        scale,
        H=many - 2 * kv_heads,
        J=kv_heads,
        E=size,
        B=TILE.tokens,
        ROTATED=cos_TE is not None,
        num_warps=TILE.warps,
        num_stages=TILE.stages,
    )


def _outputs(heads_TNE: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    tokens, many, size = heads_TNE.shape
    queries = many - 2 * kv_heads
    lse_HT = heads_TNE.new_empty((queries, tokens), dtype=torch.float32)
    return heads_TNE.new_empty((tokens, queries, size)), lse_HT


@_attend.register_fake
def _(heads_TNE, cos_TE, sin_TE, bounds_2T, kv_heads, scale):
    return _outputs(heads_TNE, kv_heads)


@_attend_backward.register_fake
def _(heads_TNE, cos_TE, sin_TE, bounds_2T, out_THE, lse_HT, d_out_THE, kv_heads, scale):
    return torch.empty_like(heads_TNE, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kv_heads, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, d_out_THE: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads_TNE = _attend_backward(*ctx.saved_tensors, d_out_THE, ctx.kv_heads, ctx.scale)
    return grads_TNE, None, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)
