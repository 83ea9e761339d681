"""The loss of a SID code: a distribution over the codes that the trie allows, and over no others.

In PyTorch's operations it is a dozen passes over the logits, in float32, and as many backward. On
a GPU one kernel reads them for the loss and one for the gradient.

Dimensions: M codes to predict, K codes of their level.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # PyTorch's CUDA builds bring it


def legal_nll(
    logits_MK: Tensor, codes_M: Tensor, *, legal_MK: Tensor, label_smoothing: float
) -> Tensor:
    """Sum of the codes' negative log-likelihoods, renormalised over the legal codes, in float32.

    Args:
        logits_MK: over all codes of the level.
        codes_M: the codes to predict; each must be legal.
        legal_MK: which codes the trie allows; where it allows one only, the loss is 0.
        label_smoothing: probability mass spread evenly over the legal codes.
    """
    if logits_MK.is_cuda and _HAS_TRITON:
        total: Tensor = LegalNll.apply(logits_MK, codes_M, legal_MK, label_smoothing)
        return total
    log_probs_MK = legal_log_probs(logits_MK, legal_MK=legal_MK)
    loss = -log_probs_MK.gather(1, codes_M[:, None]).sum()
    if label_smoothing == 0.0:
        return loss
    spread_M = -log_probs_MK.masked_fill(~legal_MK, 0.0).sum(-1) / legal_MK.sum(-1)
    return (1 - label_smoothing) * loss + label_smoothing * spread_M.sum()


def legal_log_probs(logits_MK: Tensor, *, legal_MK: Tensor) -> Tensor:
    """Log-probabilities renormalised over the legal codes, float32 [M, K]; -inf for the others."""
    return logits_MK.float().masked_fill(~legal_MK, -torch.inf).log_softmax(-1)


class LegalNll(torch.autograd.Function):
    """`legal_nll` by the kernels; the logits are kept as they came, in bf16 or float32."""

    @staticmethod
    def forward(
        ctx: Any, logits_MK: Tensor, codes_M: Tensor, legal_MK: Tensor, label_smoothing: float
    ) -> Tensor:
        """The sum of the losses."""
        from whyrec.sid.legal_kernels import legal_loss_kernel

        given = (logits_MK.contiguous(), legal_MK.contiguous().view(torch.uint8), codes_M)
        # One by one, since kernels are compiled anew for what does not begin at 16 bytes.
        nll_M = logits_MK.new_empty(len(codes_M), dtype=torch.float32)
        lse_M = torch.empty_like(nll_M)
        if len(codes_M):
            legal_loss_kernel[(len(codes_M),)](
                *given, nll_M, lse_M, label_smoothing, **_tile(logits_MK)
            )
        ctx.save_for_backward(*given, lse_M)
        ctx.label_smoothing = label_smoothing
        return nll_M.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *wanted: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, scaled before it is rounded to their type."""
        from whyrec.sid.legal_kernels import legal_slope_kernel

        logits_MK = ctx.saved_tensors[0]
        slope_MK = torch.empty_like(logits_MK)
        if len(logits_MK):
            legal_slope_kernel[(len(logits_MK),)](
                *ctx.saved_tensors, wanted[0], slope_MK, ctx.label_smoothing, **_tile(logits_MK)
            )
        return slope_MK, None, None, None


def _tile(logits_MK: Tensor) -> dict[str, int]:
    """A position in one tile: 1,024 codes for 4 warps."""
    codes = logits_MK.shape[1]
    block = max(1 << (codes - 1).bit_length(), 16)
    return {"K": codes, "B": block, "num_warps": min(max(block // 256, 1), 16)}
