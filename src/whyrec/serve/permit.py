"""Rows of logits that keep the children of a trie node and nothing else.

The codes below a node lie side by side in the trie, so a row needs three numbers: its first child,
its last one, and the token id of code 0. A batch of rows at any levels is then one copy to the
device and eleven kernels, whatever the catalogue's size; nothing is asked of the device.

The root's code is 0: the span 0 .. 0 with the id of a token as its "code 0" is that token alone.

Dimensions: B rows of a batch, V vocabulary, R rows inside a SID, W the widest span.
"""

import torch
from torch import Tensor

TEXT_ONLY = "whyrec_text"


def permit_spans(
    logits_BV: Tensor,
    spans_4R: Tensor,
    *,
    code: Tensor,
    ramp_W: Tensor,
) -> None:
    """Leave only some spans of children to some rows, in place.

    A span whose tokens all had no probability gets equal ones.

    Args:
        logits_BV: of a batch.
        spans_4R: int64: which rows; their first and their last child; the token id of code 0.
        code: int32 [nodes], of the trie, on the same device.
        ramp_W: int64, 0 .. W - 1, where W is at least the widest span's length.
    """
    rows_R1, first_R1, last_R1, offset_R1 = spans_4R.unsqueeze(-1)
    token_RW = _tokens(code, first_R1, last_R1, offset_R1, ramp_W)
    kept_RW = logits_BV[rows_R1, token_RW]
    kept_RW.masked_fill_((kept_RW == -torch.inf).all(-1, keepdim=True), 0.0)
    logits_BV.index_fill_(0, spans_4R[0], -torch.inf)
    logits_BV.index_put_((rows_R1, token_RW), kept_RW)


def permit_spans_where(
    logits_BV: Tensor,
    inside_B: Tensor,
    *,
    first_B: Tensor,
    last_B: Tensor,
    offset_B: Tensor,
    code: Tensor,
    ramp_W: Tensor,
) -> None:
    """The same for the rows where `inside_B` is true, which the host need not know.

    Args:
        logits_BV: of a batch.
        inside_B: bool.
        first_B, last_B, offset_B: int64; 0, 0, 0 where `inside_B` is false.
        code, ramp_W: as for `permit_spans`.
    """
    inside_B1 = inside_B[:, None]
    token_BW = _tokens(code, first_B[:, None], last_B[:, None], offset_B[:, None], ramp_W)
    kept_BW = logits_BV.gather(1, token_BW)
    silenced_B1 = (kept_BW == -torch.inf).all(-1, keepdim=True)
    kept_BW.masked_fill_(silenced_B1 & inside_B1, 0.0)
    logits_BV.masked_fill_(inside_B1, -torch.inf)
    logits_BV.scatter_(1, token_BW, kept_BW)  # outside a SID token 0 gets its own value again


def _tokens(
    code: Tensor, first_R1: Tensor, last_R1: Tensor, offset_R1: Tensor, ramp_W: Tensor
) -> Tensor:
    """Token ids of the codes of spans [R, W]; a shorter span repeats its last one."""
    return code[torch.minimum(first_R1 + ramp_W, last_R1)] + offset_R1
