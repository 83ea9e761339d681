"""Next-token loss of a model that speaks two languages: text, and SIDs of real items.

A text token is predicted over the whole vocabulary. A SID code is predicted over the codes that
the trie allows after the codes before it: exactly the distribution that constrained decoding
searches and samples, so no capacity goes into learning which codes exist, and a forced code costs
nothing. It is also much cheaper: K rows of the head instead of 49 thousand, for the positions that
want a loss and no others (the logits of the rest are never computed).

    loss = (Σ text NLL + Σ SID NLL) / number of labels

The loss runs inside the model's own `forward`, as TRL's fused head does, so that DDP and FSDP
hooks, which gather parameters around `forward`, see it.

Dimensions: B sequences, T tokens, M positions of one kind, K codes of a level, D hidden size.
"""

import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from whyrec.prompting.encoder import IGNORED
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary

_CHUNK = 1024  # text positions whose logits are in memory at once


@dataclass(frozen=True)
class SidLoss:
    """How the loss of one catalogue is taken.

    Attributes:
        vocabulary: token ids of the SID codes.
        trie: the catalogue's SIDs, on the device of the model.
        label_smoothing: probability mass spread evenly over the legal codes of a SID target.
        dropout: on the input embeddings and on the last hidden states, in training.
    """

    vocabulary: SidVocabulary
    trie: Trie
    label_smoothing: float = 0.0
    dropout: float = 0.0

    def total(
        self, hidden_BTD: Tensor, ids_BT: Tensor, labels_BT: Tensor, head_VD: Tensor
    ) -> Tensor:
        """Sum of the next-token losses over all labels, in float32.

        Args:
            hidden_BTD: last hidden states.
            ids_BT: the tokens that were read.
            labels_BT: the tokens to predict, unshifted; -100 where no loss is wanted.
            head_VD: the language-model head.
        """
        targets_BT = labels_BT[:, 1:]
        is_sid_BT = (targets_BT >= self.vocabulary.first) & (targets_BT < self.vocabulary.stop)
        is_text_BT = (targets_BT != IGNORED) & ~is_sid_BT
        hidden_BTD = hidden_BTD[:, :-1]

        loss = _text_nll(hidden_BTD[is_text_BT], targets_BT[is_text_BT], head_VD)
        rows_B, columns_T = is_sid_BT.nonzero(as_tuple=True)
        sid_targets_M = targets_BT[rows_B, columns_T]
        for level, offset in enumerate(self.vocabulary.offsets):
            size = self.vocabulary.level_sizes[level]
            here = (sid_targets_M >= offset) & (sid_targets_M < offset + size)
            row_M, column_M = rows_B[here], columns_T[here]
            nodes_M = self._nodes(ids_BT, row_M, column_M, level)
            logits_MK = (hidden_BTD[row_M, column_M] @ head_VD[offset : offset + size].T).float()
            loss = loss + self._sid_nll(
                logits_MK, sid_targets_M[here] - offset, self.trie.mask(nodes_M, level=level)
            )
        return loss

    def _nodes(self, ids_BT: Tensor, row_M: Tensor, column_M: Tensor, level: int) -> Tensor:
        """Trie nodes of the codes just before each target; a target's SID is always whole."""
        nodes_M = torch.zeros_like(row_M)
        for depth in range(level):
            token_M = ids_BT[row_M, column_M - (level - 1 - depth)]
            nodes_M = self.trie.step(nodes_M, token_M - self.vocabulary.offsets[depth])
        return nodes_M

    def _sid_nll(self, logits_MK: Tensor, codes_M: Tensor, legal_MK: Tensor) -> Tensor:
        log_probs_MK = logits_MK.masked_fill(~legal_MK, -torch.inf).log_softmax(-1)
        loss = -log_probs_MK.gather(1, codes_M[:, None]).sum()
        if self.label_smoothing == 0.0:
            return loss
        spread_M = -log_probs_MK.masked_fill(~legal_MK, 0.0).sum(-1) / legal_MK.sum(-1)
        return (1 - self.label_smoothing) * loss + self.label_smoothing * spread_M.sum()


def _text_nll(hidden_MD: Tensor, targets_M: Tensor, head_VD: Tensor) -> Tensor:
    """Sum of next-token losses over the whole vocabulary.

    The logits, 49 thousand a position, are made in chunks and made again in the backward pass:
    kept, those of one batch of captions fill a GPU.
    """
    total = hidden_MD.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets_M), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        total = total + checkpoint(
            _chunk_nll, hidden_MD[chunk], targets_M[chunk], head_VD, use_reentrant=False
        )
    return total


def _chunk_nll(hidden_MD: Tensor, targets_M: Tensor, head_VD: Tensor) -> Tensor:
    return F.cross_entropy((hidden_MD @ head_VD.T).float(), targets_M, reduction="sum")


def attach_sid_loss(model: PreTrainedModel, sid_loss: SidLoss) -> None:
    """Make `model(…, labels=…, sid_loss=True)` return the loss above and no logits, in place."""
    plain_forward = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        *args: object,
        sid_loss: bool = False,
        **kwargs: object,
    ) -> object:
        if not sid_loss:
            return plain_forward(input_ids, *args, **kwargs)
        return _forward_with_loss(self, loss, input_ids, **kwargs)  # type: ignore[arg-type]

    loss = sid_loss
    model.forward = types.MethodType(forward, model)


def _forward_with_loss(
    model: PreTrainedModel,
    sid_loss: SidLoss,
    input_ids: Tensor,
    *,
    attention_mask: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **_: object,  # PEFT passes every argument of a causal LM on, as None
) -> CausalLMOutput:
    embedded_BTD = model.get_input_embeddings()(input_ids)
    embedded_BTD = F.dropout(embedded_BTD, sid_loss.dropout, training=model.training)
    hidden_BTD = model.base_model(
        inputs_embeds=embedded_BTD, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
    hidden_BTD = F.dropout(hidden_BTD, sid_loss.dropout, training=model.training)
    head_VD = model.get_output_embeddings().weight
    total = sid_loss.total(hidden_BTD, input_ids, labels, head_VD.to(hidden_BTD.dtype))
    count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutput(loss=total / torch.as_tensor(count, device=total.device).clamp(min=1))
