"""Next-token loss of a model that speaks two languages: text, and SIDs of real items.

A text token is predicted over the whole vocabulary. A SID code is predicted over the codes that
the trie allows after the codes before it: exactly the distribution that constrained decoding
searches and samples, so no capacity goes into learning which codes exist, and a forced code costs
nothing. It is also much cheaper: K rows of the head instead of 49 thousand, for the positions that
want a loss and no others (the logits of the rest are never computed).

    loss = (text_weight · Σ text NLL + Σ SID NLL) / number of labels

The loss runs inside the model's own `forward`, as TRL's fused head does, so that DDP and FSDP
hooks, which gather parameters around `forward`, see it.

A batch is one packed row (`whyrec.train.packing`), which also says where the losses are.

Dimensions: T tokens, M positions of one kind, K codes of a level, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from whyrec.backbone.packed_blocks import PackedBlocks
from whyrec.backbone.second_forward import add_forward
from whyrec.prompting.encoder import IGNORED
from whyrec.sid.legal_loss import legal_nll
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary
from whyrec.train.text_loss import text_nll


@dataclass(frozen=True)
class SidLoss:
    """How the loss of one catalogue is taken.

    Attributes:
        vocabulary: token ids of the SID codes.
        trie: the catalogue's SIDs, on the device of the model.
        label_smoothing: probability mass spread evenly over the legal codes of a SID target.
        dropout: on the input embeddings and on the last hidden states, in training.
        text_weight: of a text token's loss; a code's is 1.
    """

    vocabulary: SidVocabulary
    trie: Trie
    label_smoothing: float = 0.0
    dropout: float = 0.0
    text_weight: float = 1.0

    def total(
        self,
        hidden_TD: Tensor,
        labels_T: Tensor,
        head_VD: Tensor,
        *,
        text_positions: Tensor,
        sid_positions: Sequence[Tensor],
        sid_nodes: Sequence[Tensor],
    ) -> Tensor:
        """Sum of the next-token losses over all labels, in float32.

        Args:
            hidden_TD: last hidden states.
            labels_T: the tokens to predict, unshifted.
            head_VD: the language-model head.
            text_positions: [M], positions whose next token is wanted text.
            sid_positions: by level [M], positions whose next token is a wanted code.
            sid_nodes: by level [M], the trie nodes before those codes.
        """
        targets_T = labels_T.roll(-1)
        # One selection and one part of the head for all levels: the gradient of each is as large
        # as what it was taken from.
        places = [text_positions, *sid_positions]
        chosen = torch.cat(places)
        text_MD, *levels = hidden_TD.index_select(0, chosen).split([len(here) for here in places])
        targets = targets_T[chosen].split([len(here) for here in places])
        loss = self.text_weight * text_nll(text_MD, targets[0], head_VD)
        codes_KD = self.vocabulary.rows_by_level(head_VD)
        for level, offset in enumerate(self.vocabulary.offsets):
            nodes_M = sid_nodes[level]
            if len(nodes_M) == 0:
                continue
            loss = loss + legal_nll(
                levels[level] @ codes_KD[level].T,
                targets[level + 1] - offset,
                legal_MK=self.trie.mask(nodes_M, level=level),
                label_smoothing=self.label_smoothing,
            )
        return loss


def attach_sid_loss(model: PreTrainedModel, sid_loss: SidLoss, *, blocks: PackedBlocks) -> None:
    """Make `model(…, labels=…, sid_loss=True)` return the loss above and no logits, in place.

    Args:
        model: the causal LM.
        sid_loss: the loss.
        blocks: the model's blocks over packed rows.
    """
    add_forward(model, "sid_loss", partial(_forward_with_loss, loss=sid_loss, blocks=blocks))


def _forward_with_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    loss: SidLoss,
    blocks: PackedBlocks,
    labels: Tensor,
    position_ids: Tensor,
    document_starts: Tensor,
    text_positions: Tensor,
    sid_positions: Sequence[Tensor],
    sid_nodes: Sequence[Tensor],
    num_items_in_batch: Tensor | int | None = None,
    **_: object,  # PEFT passes every argument of a causal LM on, as None
) -> CausalLMOutput:
    embedded_1TD = model.get_input_embeddings()(input_ids)
    if torch.is_autocast_enabled(embedded_1TD.device.type):
        # The residual stream in bf16: half the traffic of what bounds a small model's speed.
        embedded_1TD = embedded_1TD.to(torch.get_autocast_dtype(embedded_1TD.device.type))
    embedded_1TD = F.dropout(embedded_1TD, loss.dropout, training=model.training)
    hidden_1TD = blocks(embedded_1TD, position_ids, document_starts)
    hidden_1TD = F.dropout(hidden_1TD, loss.dropout, training=model.training)
    head_VD = model.get_output_embeddings().weight
    total = loss.total(
        hidden_1TD[0],
        labels[0],
        head_VD.to(hidden_1TD.dtype),
        text_positions=text_positions,
        sid_positions=sid_positions,
        sid_nodes=sid_nodes,
    )
    count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutput(loss=total / torch.as_tensor(count, device=total.device).clamp(min=1))
