"""The loss of a SID code: a distribution over the codes that the trie allows, and over no others.

Dimensions: M codes to predict, K codes of their level.
"""

import torch
from torch import Tensor


def legal_nll(
    logits_MK: Tensor, codes_M: Tensor, *, legal_MK: Tensor, label_smoothing: float
) -> Tensor:
    """Sum of the codes' negative log-likelihoods, renormalised over the legal codes.

    Args:
        logits_MK: over all codes of the level.
        codes_M: the codes to predict; each must be legal.
        legal_MK: which codes the trie allows; where it allows one only, the loss is 0.
        label_smoothing: probability mass spread evenly over the legal codes.
    """
    log_probs_MK = logits_MK.masked_fill(~legal_MK, -torch.inf).log_softmax(-1)
    loss = -log_probs_MK.gather(1, codes_M[:, None]).sum()
    if label_smoothing == 0.0:
        return loss
    spread_M = -log_probs_MK.masked_fill(~legal_MK, 0.0).sum(-1) / legal_MK.sum(-1)
    return (1 - label_smoothing) * loss + label_smoothing * spread_M.sum()
