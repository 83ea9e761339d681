"""Triton kernels of `legal_loss.py`: the loss of a code, and its gradient.

    nll      = lse - (1 - ε) z[target] - ε mean(z over the legal)
    ∂nll/∂z  = softmax(z) - (1 - ε) onehot(target) - ε / number of legal     (0 where not legal)

with z the logits, their log-sum-exp over the legal codes, and ε the label smoothing.

Dimensions: M codes to predict, K codes of their level, B ≥ K a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def legal_loss_kernel(
    logits_ptr, legal_ptr, codes_ptr, nll_ptr, lse_ptr, smoothing, K, B: tl.constexpr
):
    """One position: its loss, and the log-sum-exp that its gradient needs."""
    row = tl.program_id(0).to(tl.int64)
    code_B = tl.arange(0, B)
    legal_B = tl.load(legal_ptr + row * K + code_B, mask=code_B < K, other=0) != 0
    logits_B = tl.load(logits_ptr + row * K + code_B, mask=code_B < K, other=0.0).to(tl.float32)
    masked_B = tl.where(legal_B, logits_B, float("-inf"))
    top = tl.max(masked_B, 0)
    lse = top + tl.log(tl.sum(tl.exp(masked_B - top), 0))
    mean = tl.sum(tl.where(legal_B, logits_B, 0.0), 0) / tl.sum(legal_B.to(tl.float32), 0)
    wanted = tl.load(logits_ptr + row * K + tl.load(codes_ptr + row)).to(tl.float32)
    tl.store(nll_ptr + row, lse - (1.0 - smoothing) * wanted - smoothing * mean)
    tl.store(lse_ptr + row, lse)


@triton.jit
def legal_slope_kernel(
    logits_ptr, legal_ptr, codes_ptr, lse_ptr, wanted_ptr, slope_ptr, smoothing, K, B: tl.constexpr
):
    """One position: the gradient of its logits, times what is wanted of the losses' sum."""
    row = tl.program_id(0).to(tl.int64)
    code_B = tl.arange(0, B)
    legal_B = tl.load(legal_ptr + row * K + code_B, mask=code_B < K, other=0) != 0
    logits_B = tl.load(logits_ptr + row * K + code_B, mask=code_B < K, other=0.0).to(tl.float32)
    slope_B = tl.exp(tl.where(legal_B, logits_B, float("-inf")) - tl.load(lse_ptr + row))
    slope_B -= smoothing / tl.sum(legal_B.to(tl.float32), 0)
    slope_B -= tl.where(code_B == tl.load(codes_ptr + row), 1.0 - smoothing, 0.0)
    slope_B = tl.where(legal_B, slope_B * tl.load(wanted_ptr), 0.0)
    tl.store(slope_ptr + row * K + code_B, slope_B.to(slope_ptr.dtype.element_ty), mask=code_B < K)
