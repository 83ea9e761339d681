"""Causal attention inside documents that lie end to end in one row, for training.

Padding a batch to its longest sequence wastes half of a GPU and gives every batch a shape of its
own. Here the sequences of a batch lie one after the other in a row of fixed length and a token
looks at its own document only (Krell et al. 2021, arXiv 2107.02027). On a CUDA device our own
kernels compute that where documents are short, else PyTorch's variable-length Flash Attention;
elsewhere one call a document does.

The model runs its own code: Transformers' `AttentionInterface` puts this function in place of its
own attention for the length of one call.

Dimensions: T tokens of the row, D documents, H query heads, J key/value heads, E head size.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from whyrec.backbone.short_attention import is_supported, short_attention

PACKED = "whyrec_packed"
# Torch 2.11 takes fewer key/value heads than query heads as they come; later ones want to be told.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def packed_attention(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1JTE: Tensor,
    value_1JTE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    document_starts: Tensor,
    longest: int,
    document_bounds: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over one packed row; returns [1, T, H, E], None.

    Args:
        module: the attention layer.
        query_1HTE, key_1JTE, value_1JTE: heads of the whole row.
        attention_mask: not looked at.
        scaling: of the scores.
        document_starts: int32 [D + 1], where each document starts, and T; documents may be empty.
        longest: no document has more tokens.
        document_bounds: int32 [2, T], of `short_attention.document_bounds`, which then may attend.
    """
    # Rotations may have lifted queries and keys to float32 under autocast.
    query_THE, key_TJE, value_TJE = (
        heads.to(value_1JTE.dtype).transpose(1, 2)[0]
        for heads in (query_1HTE, key_1JTE, value_1JTE)
    )
    if document_bounds is not None and is_supported(value_1JTE, longest=longest):
        short_THE = short_attention(
            torch.cat((query_THE, key_TJE, value_TJE), dim=1),
            document_bounds,
            kv_heads=key_TJE.shape[1],
            scale=query_THE.shape[-1] ** -0.5 if scaling is None else scaling,
        )
        return short_THE[None], None
    if not query_1HTE.is_cuda:
        # The kernel writes no more than `longest` rows of a document: not a thing to learn there.
        assert int(document_starts.diff().max()) <= longest
        pieces = [
            F.scaled_dot_product_attention(
                query_1HTE[:, :, start:stop],
                key_1JTE[:, :, start:stop],
                value_1JTE[:, :, start:stop],
                is_causal=True,
                scale=scaling,
                enable_gqa=key_1JTE.shape[1] != query_1HTE.shape[1],
            )
            for start, stop in pairwise(document_starts.tolist())
            if stop > start
        ]
        return torch.cat(pieces, dim=2).transpose(1, 2), None
    output_THE = varlen_attn(
        query_THE,
        key_TJE,
        value_TJE,
        document_starts,
        document_starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        **_GROUPED,
    )
    assert isinstance(output_THE, Tensor)
    return output_THE[None], None


AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model attend by the interface `name` for a while."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
