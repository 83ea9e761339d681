"""Triton kernel of `text_loss.py`: a softmax's loss, and its gradient in place of the logits.

Dimensions: C positions, V vocabulary, B logits read at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(logits_ptr, targets_ptr, nll_ptr, V, row_stride, B: tl.constexpr):
    """One position: log-sum-exp in one pass, the gradient in a second, which finds the L2 warm."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row)
    top_B = tl.full((B,), -1e30, tl.float32)
    total_B = tl.zeros((B,), tl.float32)
    for start in range(0, V, B):
        here_B = start + tl.arange(0, B)
        logits_B = tl.load(logits_ptr + here_B, mask=here_B < V, other=float("-inf"))
        logits_B = logits_B.to(tl.float32)
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
    for start in range(0, V, B):
        here_B = start + tl.arange(0, B)
        logits_B = tl.load(logits_ptr + here_B, mask=here_B < V, other=float("-inf"))
        gradient_B = tl.exp(logits_B.to(tl.float32) - lse) - tl.where(here_B == target, 1.0, 0.0)
        gradient_B = gradient_B.to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + here_B, gradient_B, mask=here_B < V)


def nll_and_gradient_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Losses [C] in float32; the logits become the gradient of their sum."""
    assert logits_CV.stride(1) == 1
    nll_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    if len(logits_CV):
        _kernel[(len(logits_CV),)](
            logits_CV,
            targets_C,
            nll_C,
            logits_CV.shape[1],
            logits_CV.stride(0),
            B=4096,
            num_warps=8,
        )
    return nll_C
