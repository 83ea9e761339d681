"""Next-token loss over the whole vocabulary, whose logits are never kept.

    Σ_m −log softmax(W h_m)[target_m]        ∂/∂logits_m = softmax(W h_m) − onehot(target_m)

A loss that ends in a sum knows its gradient in the forward pass: a chunk's logits are overwritten
with theirs and turned into those of W and h at once, so that nothing is kept or made again for the
backward pass (as in Liger's fused linear cross-entropy; Hsu et al. 2024, arXiv 2410.10989).

Dimensions: M positions, C positions of a chunk, V vocabulary, W ≥ V a multiple of 64, D hidden
size.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 4096  # positions whose logits are in memory at once: 0.4 GB in bf16


def text_nll(hidden_MD: Tensor, targets_M: Tensor, head_VD: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods, in float32.

    Args:
        hidden_MD: hidden states.
        targets_M: the tokens to predict.
        head_VD: the language-model head.
    """
    device = hidden_MD.device.type
    if torch.is_autocast_enabled(device):  # which does not look into functions of one's own
        kind = torch.get_autocast_dtype(device)
        hidden_MD, head_VD = hidden_MD.to(kind), head_VD.to(kind)
    total: Tensor = _TextNll.apply(hidden_MD, targets_M, head_VD)
    return total


class _TextNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, targets_M: Tensor, head_VD: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        # Added tokens leave V odd, and for that cuBLAS took Ampere's kernels: on an H100 the three
        # products ran at a third of the speed of the blocks' (V = 50,180). Beyond V is no token.
        vocabulary, width = len(head_VD), -(-len(head_VD) // 64) * 64
        head_WD = F.pad(head_VD, (0, 0, 0, width - vocabulary))
        d_hidden_MD, d_head_WD = torch.empty_like(hidden_MD), torch.zeros_like(head_WD)
        total = hidden_MD.new_zeros((), dtype=torch.float32)
        logits_CW = hidden_MD.new_empty(min(_CHUNK, len(targets_M)), width)
        for start in range(0, len(targets_M), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            here_CW = logits_CW[: len(targets_M[chunk])]
            torch.mm(hidden_MD[chunk], head_WD.T, out=here_CW)
            total += _nll_and_gradient_(here_CW, targets_M[chunk], vocabulary=vocabulary)
            if wanted:
                d_hidden_MD[chunk] = here_CW @ head_WD
                d_head_WD.addmm_(here_CW.T, hidden_MD[chunk])
        ctx.save_for_backward(d_hidden_MD, d_head_WD[:vocabulary])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *wanted: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_MD, d_head_VD = ctx.saved_tensors
        scale = wanted[0]
        return (
            d_hidden_MD * scale.to(d_hidden_MD.dtype) if ctx.needs_input_grad[0] else None,
            None,
            d_head_VD * scale.to(d_head_VD.dtype) if ctx.needs_input_grad[2] else None,
        )


def _nll_and_gradient_(logits_CW: Tensor, targets_C: Tensor, *, vocabulary: int) -> Tensor:
    """Sum of the losses; the logits become their gradient, which is 0 beyond the vocabulary."""
    if logits_CW.is_cuda and importlib.util.find_spec("triton") is not None:
        from whyrec.train.text_kernel import nll_and_gradient_

        return nll_and_gradient_(logits_CW, targets_C, vocabulary=vocabulary).sum()
    log_probs_CV = logits_CW[:, :vocabulary].float().log_softmax(-1)
    loss = -log_probs_CV.gather(1, targets_C[:, None]).sum()
    logits_CW.zero_()[:, :vocabulary] = log_probs_CV.exp_()
    logits_CW[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    return loss
