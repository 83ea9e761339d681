"""Triton kernels between the matrix products of `lean_blocks.py`, which says what they are for.

Dimensions: T tokens, M heads that are rotated, E head size, F inner size.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    heads_ptr, cos_ptr, sin_ptr, token_stride,
    M: tl.constexpr, M_ROOM: tl.constexpr, HALF: tl.constexpr, HALF_ROOM: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one token in place; element e is paired with e + E/2, as in Llama."""
    token = tl.program_id(0).to(tl.int64)
    head_M = tl.arange(0, M_ROOM)[:, None]
    element_E = tl.arange(0, HALF_ROOM)[None, :]
    there = (head_M < M) & (element_E < HALF)
    # Both halves of the angles are alike.
    angle_E = token * 2 * HALF + element_E
    cos = tl.load(cos_ptr + angle_E, mask=element_E < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle_E, mask=element_E < HALF, other=0.0).to(tl.float32)
    low_ptr = heads_ptr + token * token_stride + head_M * 2 * HALF + element_E
    low = tl.load(low_ptr, mask=there, other=0.0).to(tl.float32)
    high = tl.load(low_ptr + HALF, mask=there, other=0.0).to(tl.float32)
    kind = heads_ptr.dtype.element_ty
    tl.store(low_ptr, (low * cos - high * sin).to(kind), mask=there)
    tl.store(low_ptr + HALF, (high * cos + low * sin).to(kind), mask=there)


@triton.jit
def gate_kernel(both_ptr, out_ptr, F, BLOCK: tl.constexpr):
    """A block of one token's SiLU(gate) · up, where the two lie side by side."""
    token = tl.program_id(0).to(tl.int64)
    element_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_F = element_F < F
    gate_F = tl.load(both_ptr + token * 2 * F + element_F, mask=inside_F).to(tl.float32)
    up_F = tl.load(both_ptr + token * 2 * F + F + element_F, mask=inside_F).to(tl.float32)
    gated_F = gate_F / (1.0 + tl.exp(-gate_F)) * up_F
    tl.store(out_ptr + token * F + element_F, gated_F.to(out_ptr.dtype.element_ty), mask=inside_F)
