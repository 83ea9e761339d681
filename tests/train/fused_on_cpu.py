"""What a GPU makes of the blocks, on the CPU: fused projections and short attention.

Nothing is compiled or recorded, and one dense product stands in for the kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whyrec.backbone import fused_projections, packed_attention
from whyrec.backbone.fused_projections import fuse_projections
from whyrec.backbone.lora import plain_model
from whyrec.train.trainer import AlignTrainer


def dense_attention(
    heads_TNE: Tensor,
    bounds_2T: Tensor,
    *,
    kv_heads: int,
    scale: float,
    cos_TE: Tensor | None = None,
    sin_TE: Tensor | None = None,
) -> Tensor:
    """`short_attention` by its definition, all pairs of tokens at once."""
    value_TJE = heads_TNE[:, -kv_heads:]
    turned = heads_TNE[:, :-kv_heads]
    if cos_TE is not None and sin_TE is not None:
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos_TE[:, None] + torch.cat((-high, low), dim=-1) * sin_TE[:, None]
        turned = turned.to(heads_TNE.dtype)
    query_THE, key_TJE = turned[:, :-kv_heads], turned[:, -kv_heads:]
    shared = query_THE.shape[1] // kv_heads
    key_THE, value_THE = (x.repeat_interleave(shared, 1) for x in (key_TJE, value_TJE))
    at_T = torch.arange(len(heads_TNE))
    seen_TT = (at_T <= at_T[:, None]) & (at_T >= bounds_2T[0][:, None])
    scores_HTT = torch.einsum("the,she->hts", query_THE, key_THE) * scale
    weights_HTT = scores_HTT.masked_fill(~seen_TT, float("-inf")).softmax(-1)
    return torch.einsum("hts,she->the", weights_HTT.to(value_THE.dtype), value_THE)


def fuse_in_training(
    setattr: Callable[[Any, str, Any], None] = setattr,
    attention: Callable[..., Tensor] = dense_attention,
) -> list[AlignTrainer]:
    """Let every `AlignTrainer` train fused blocks; returns the trainers, as they are made."""
    trainers: list[AlignTrainer] = []
    init = AlignTrainer.__init__

    def fused(self: AlignTrainer, *arguments: Any, **settings: Any) -> None:
        init(self, *arguments, **settings)
        fuse_projections(plain_model(self.model))
        trainers.append(self)

    setattr(AlignTrainer, "__init__", fused)
    for module in (packed_attention, fused_projections):
        setattr(module, "is_supported", lambda *_, **__: True)
        setattr(module, "short_attention", attention)
    return trainers
