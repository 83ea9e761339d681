"""Teachers: aligned models of other seeds, whose opinion of every code the student learns, too.

    loss of a code = (1 - share) · NLL + share · Σ p(k) · (- log q(k))       over legal codes k

with p the mean of the teachers' distributions (Hinton et al. 2015, arXiv 1503.02531; students of
several seeds: Allen-Zhu & Li 2020, arXiv 2012.09816). Several seeds together rank better than any
of them, since what each has learnt by chance is not what the others have; one student costs at
serving time what one model costs. Teachers read the very rows that the student reads, without
dropout.

Dimensions: T tokens of a row, M positions of a level, K its codes, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whyrec.backbone.packed_blocks import PackedBlocks
from whyrec.decode.model_folder import Settings, load_model_folder, read_settings
from whyrec.sid.legal_loss import legal_log_probs
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary


class Teachers:
    """Models that say how probable each code is.

    Args:
        models: causal LMs with the same tokens as the student; they do not train.
        vocabulary: where the SID tokens are.
        trie: the catalogue's SIDs, on the models' device.
    """

    def __init__(
        self, models: Sequence[PreTrainedModel], *, vocabulary: SidVocabulary, trie: Trie
    ) -> None:
        self.models = [model.eval().requires_grad_(False) for model in models]
        self._vocabulary, self._trie = vocabulary, trie
        self._blocks: list[PackedBlocks] = []

    def read(self, *, longest: int) -> None:
        """Get ready for rows whose documents have so many tokens at most."""
        self._blocks = [PackedBlocks(model, longest=longest) for model in self.models]

    @torch.no_grad()
    def probabilities(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor,
        document_starts: Tensor,
        sid_positions: Sequence[Tensor],
        sid_nodes: Sequence[Tensor],
    ) -> list[Tensor]:
        """Their mean distribution over the legal codes at each wanted position of a packed row.

        Args:
            input_ids, position_ids: [1, T].
            document_starts: [D + 1].
            sid_positions, sid_nodes: by level [M], as `packing.pack` has them.

        Returns:
            By level, float32 [M, K].
        """
        assert self._blocks, "call `read` first"
        legal = [self._trie.mask(nodes_M, level=lv) for lv, nodes_M in enumerate(sid_nodes)]
        means = [torch.zeros(mask.shape, device=mask.device) for mask in legal]
        chosen = torch.cat(list(sid_positions))
        for model, blocks in zip(self.models, self._blocks, strict=True):
            embedded_1TD = model.get_input_embeddings()(input_ids)
            hidden_1TD = blocks(embedded_1TD, position_ids, document_starts)
            wanted = hidden_1TD[0].index_select(0, chosen)
            codes_KD = self._vocabulary.rows_by_level(model.get_output_embeddings().weight)
            by_level = wanted.split([len(positions_M) for positions_M in sid_positions])
            for level, hidden_MD in enumerate(by_level):
                logits_MK = hidden_MD @ codes_KD[level].T
                log_probs_MK = legal_log_probs(logits_MK, legal_MK=legal[level])
                means[level] += log_probs_MK.exp() / len(self.models)
        return means


def check_teachers(folders: Sequence[Path], settings: Settings, *, sids: Path) -> None:
    """Refuse, before any work, teachers that read other prompts or write other SIDs.

    Args:
        folders: model folders.
        settings: what the student will be.
        sids: the run's `sids.parquet`.

    Raises:
        ValueError: with the folder, and what it has of its own.
    """
    for folder in folders:
        theirs = read_settings(folder)
        same = replace(theirs, stage=settings.stage, backbone=settings.backbone)
        if same != settings or theirs.thoughts is not None:
            raise ValueError(
                f"the teacher {folder} reads other prompts than this recipe makes; train it by the "
                "same recipe, with another seed"
            )
        if (folder / "sids.parquet").read_bytes() != sids.read_bytes():
            raise ValueError(
                f"the teacher {folder} has other SIDs than {sids}; train it on this run"
            )


def load_teachers(
    folders: Sequence[Path], *, vocabulary: SidVocabulary, trie: Trie, device: torch.device
) -> Teachers | None:
    """The teachers of some folders, in bf16 on a GPU; None where there are none.

    Raises:
        ValueError: when a teacher's tokens have other ids than the student's.
    """
    models = []
    for folder in folders:
        parts = load_model_folder(folder, device=str(device))
        if parts.vocabulary != vocabulary:
            raise ValueError(
                f"the tokens of the teacher {folder} have other ids than the student's; train it "
                "from the same backbone"
            )
        models.append(parts.model)
    return Teachers(models, vocabulary=vocabulary, trie=trie) if models else None
