"""Triton kernel of `text_loss.py`: a softmax's loss, and its gradient in place of the logits.

Dimensions: C positions, V vocabulary, W ≥ V logits of a row, B logits read at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def text_kernel(logits_ptr, targets_ptr, nll_ptr, V, W, B: tl.constexpr):
    """One position: log-sum-exp in one pass, the gradient in a second, which finds the L2 warm.

    Masks end at W, a multiple of 16 where V is not: 16 bytes are then read and written at once.
    """
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * W
    target = tl.load(targets_ptr + row)
    top_B = tl.full((B,), -1e30, tl.float32)
    total_B = tl.zeros((B,), tl.float32)
    for start in range(0, W, B):
        here_B = start + tl.arange(0, B)
        logits_B = tl.load(logits_ptr + here_B, mask=here_B < W, other=0.0).to(tl.float32)
        logits_B = tl.where(here_B < V, logits_B, float("-inf"))
        # Each lane sums by itself: one reduction a row instead of one a step.
        new_top_B = tl.maximum(top_B, logits_B)
        total_B = total_B * tl.exp(top_B - new_top_B) + tl.exp(logits_B - new_top_B)
        top_B = new_top_B
    top = tl.max(top_B, 0)
    lse = top + tl.log(tl.sum(total_B * tl.exp(top_B - top), 0))
    wanted = tl.load(logits_ptr + target).to(tl.float32)
    tl.store(nll_ptr + row, lse - wanted)
    # The wanted logit must be read before another thread overwrites it.
    tl.debug_barrier()
    for start in range(0, W, B):
        here_B = start + tl.arange(0, B)
        logits_B = tl.load(logits_ptr + here_B, mask=here_B < W, other=0.0).to(tl.float32)
        gradient_B = tl.exp(logits_B - lse) - tl.where(here_B == target, 1.0, 0.0)
        gradient_B = tl.where(here_B < V, gradient_B, 0.0).to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + here_B, gradient_B, mask=here_B < W)


def nll_and_gradient_(logits_CW: Tensor, targets_C: Tensor, *, vocabulary: int) -> Tensor:
    """Losses [C] in float32; the logits become the gradient of their sum, 0 beyond V."""
    assert logits_CW.is_contiguous()
    nll_C = torch.empty(len(logits_CW), dtype=torch.float32, device=logits_CW.device)
    text_kernel[(len(logits_CW),)](
        logits_CW, targets_C, nll_C, vocabulary, logits_CW.shape[1], B=4096, num_warps=8
    )
    return nll_C
