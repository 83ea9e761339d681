"""Exact beam search over the semantic IDs of a catalogue.

A beam's score is the model's log-probability of its codes, each renormalised over the codes that
the trie allows after its prefix: log p(SID | prompt, SID is legal), level by level, which is what
constrained sampling draws from. The search is exact with respect to its width: at every level the
best W of *all* legal continuations survive. A prefix that leads to one item only is finished: its
forced codes have probability 1 and cost no forward pass.

Dimensions: U users, W beams a user, K codes of a level, D hidden size, L levels.

    decoder = BeamDecoder(model, vocabulary=vocabulary, trie=trie)
    prefilled = decoder.prefill(prompts)                 # lists of token ids, `<|sid_begin|>` last
    beams = decoder.search(prefilled, width=20)
    beams.items_UW, beams.scores_UW
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from whyrec.decode.tree_attention import KeyValueStore, check_supported, run
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary


@dataclass(frozen=True)
class Beams:
    """The best items of each user, best first.

    Attributes:
        items_UW: item indices, int64; -1 where fewer than W items can be recommended.
        scores_UW: log-probabilities, float32; -inf where there is no item.
    """

    items_UW: Tensor
    scores_UW: Tensor


@dataclass(frozen=True)
class Prefilled:
    """Prompts whose keys and values are computed; any number of searches can start from them."""

    store: KeyValueStore
    last_hidden_UD: Tensor


class BeamDecoder:
    """Beam search for one model and one catalogue, on the model's device.

    Args:
        model: a causal LM whose vocabulary holds the SID tokens.
        vocabulary: where those tokens are.
        trie: the catalogue's SIDs.

    Raises:
        ValueError: when the model's attention cannot run on trees.
    """

    def __init__(self, model: PreTrainedModel, *, vocabulary: SidVocabulary, trie: Trie) -> None:
        check_supported(model)
        assert trie.level_sizes == vocabulary.level_sizes
        self.model = model
        self.vocabulary = vocabulary
        self.device = model.get_input_embeddings().weight.device
        self.trie = trie.to(self.device)
        self._ranks_N = self.trie.item_ranks()

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], *, width: int) -> Prefilled:
        """Compute the prompts' keys and values once.

        Args:
            prompts: token ids of each user's prompt, ending in `<|sid_begin|>`.
            width: the greatest width that will be searched from here.
        """
        lengths = [len(prompt) for prompt in prompts]
        ids = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        ids_UP = torch.from_numpy(ids).to(self.device)
        lengths_U = torch.tensor(lengths, device=self.device)
        num_users, num_slots = ids_UP.shape
        tree_slots = width * (self.trie.num_levels - 1)
        store = KeyValueStore(lengths_U, num_slots, capacity=num_slots + tree_slots)
        positions_UP = torch.arange(num_slots, device=self.device).expand(num_users, -1)
        hidden_UPD = run(self.model, ids_UP, positions_UT=positions_UP.contiguous(), store=store)
        last_hidden_UD = hidden_UPD[torch.arange(num_users, device=self.device), lengths_U - 1]
        return Prefilled(store, last_hidden_UD)

    @torch.no_grad()
    def search(
        self,
        prefilled: Prefilled,
        *,
        width: int,
        excluded: Sequence[Sequence[int]] | None = None,
    ) -> Beams:
        """Find the `width` best items of each user.

        Args:
            prefilled: the prompts.
            width: W; at most the width given to `prefill`.
            excluded: by user, indices of items that must not come; the scores of the others stay
                what they are.
        """
        store, trie = prefilled.store, self.trie
        store.forget_tree()
        num_users, num_levels = len(store.lengths_U), trie.num_levels
        device, users = self.device, torch.arange(len(store.lengths_U), device=self.device)[:, None]
        excluded_UX = None if excluded is None else self._excluded_ranks(excluded)
        rows = self._head_rows()

        nodes_UW = torch.zeros(num_users, 1, dtype=torch.long, device=device)
        scores_UW = torch.zeros(num_users, 1, device=device)
        hidden_UWD = prefilled.last_hidden_UD[:, None]
        # Slots of each beam's tokens so far; a slot that was never computed is never looked at.
        slots_UWA = torch.zeros(num_users, 1, 0, dtype=torch.long, device=device)
        for level in range(num_levels):
            children_UWK = self._live_children(nodes_UW, level, excluded_UX)
            log_probs_UWK = self._log_probs(hidden_UWD, nodes_UW, rows[level], level)
            totals_UWK = (scores_UW[..., None] + log_probs_UWK).masked_fill(
                children_UWK < 0, -torch.inf
            )
            num_codes = totals_UWK.shape[-1]
            keep = min(width, totals_UWK[0].numel())
            scores_UW, flat_UW = totals_UWK.flatten(1).topk(keep)
            nodes_UW = children_UWK.flatten(1).gather(1, flat_UW)
            nodes_UW = nodes_UW.masked_fill(scores_UW == -torch.inf, -1)
            if level + 1 == num_levels:
                break
            parents_UW, codes_UW = flat_UW // num_codes, flat_UW % num_codes
            slots_UWA = slots_UWA[users, parents_UW]

            # Only beams whose next codes are still open cost a forward pass.
            low_UW, high_UW = trie.leaf_range(nodes_UW, level=level + 1)
            open_UW = high_UW - low_UW > 1
            num_open = int(open_UW.sum(1).max())
            hidden_UWD = hidden_UWD.new_zeros(num_users, keep, hidden_UWD.shape[-1])
            slots_UWA = torch.cat([slots_UWA, slots_UWA.new_zeros(num_users, keep, 1)], dim=-1)
            if num_open == 0:
                continue
            chosen_UT = open_UW.int().argsort(dim=1, descending=True, stable=True)[:, :num_open]
            slot_T = store.used + torch.arange(num_open, device=device)
            slots_UWA[users, chosen_UT, -1] = slot_T.expand(num_users, -1)
            ids_UT = codes_UW.gather(1, chosen_UT) + self.vocabulary.offsets[level]
            hidden_UTD = run(
                self.model,
                ids_UT,
                positions_UT=(store.lengths_U[:, None] + level).expand(-1, num_open).contiguous(),
                store=store,
                mask_UTS=self._tree_mask(store, slots_UWA[users, chosen_UT], num_open),
            )
            hidden_UWD[users, chosen_UT] = hidden_UTD.to(hidden_UWD.dtype)

        items_UW = trie.leaf_items(nodes_UW)
        missing = width - items_UW.shape[1]
        if missing > 0:
            items_UW = torch.nn.functional.pad(items_UW, (0, missing), value=-1)
            scores_UW = torch.nn.functional.pad(scores_UW, (0, missing), value=-torch.inf)
        return Beams(items_UW, scores_UW)

    def _head_rows(self) -> list[Tensor]:
        """Rows of the language-model head by level, [K, D] each."""
        weight_VD = self.model.get_output_embeddings().weight
        sizes = self.vocabulary.level_sizes
        return [
            weight_VD[offset : offset + size]
            for offset, size in zip(self.vocabulary.offsets, sizes, strict=True)
        ]

    def _log_probs(
        self, hidden_UWD: Tensor, nodes_UW: Tensor, rows_KD: Tensor, level: int
    ) -> Tensor:
        """Log-probabilities over the legal codes, in float32; 0 for a forced code."""
        logits_UWK = (hidden_UWD.to(rows_KD.dtype) @ rows_KD.T).float()
        legal_UWK = self.trie.mask(nodes_UW, level=level)
        # A dead beam has no legal code: its NaNs are masked by `children_UWK < 0`.
        return logits_UWK.masked_fill(~legal_UWK, -torch.inf).log_softmax(-1)

    def _live_children(self, nodes_UW: Tensor, level: int, excluded_UX: Tensor | None) -> Tensor:
        """Children by code [U, W, K], -1 for illegal ones and those with excluded items only."""
        children_UWK = self.trie.children(nodes_UW, level=level)
        if excluded_UX is None:
            return children_UWK
        low_UWK, high_UWK = self.trie.leaf_range(children_UWK, level=level + 1)
        inside_UWK = [
            torch.searchsorted(excluded_UX, end_UWK.flatten(1)).view_as(end_UWK)
            for end_UWK in (low_UWK, high_UWK)
        ]
        num_excluded_UWK = inside_UWK[1] - inside_UWK[0]
        return children_UWK.masked_fill(num_excluded_UWK == high_UWK - low_UWK, -1)

    def _excluded_ranks(self, excluded: Sequence[Sequence[int]]) -> Tensor:
        """Leaf ranks of excluded items, sorted, padded with N: [U, X]."""
        longest = max(1, *(len(set(items)) for items in excluded))
        ranks = self._ranks_N.cpu().numpy()
        padded = np.full((len(excluded), longest), self.trie.num_items, dtype=np.int64)
        for row, items in zip(padded, excluded, strict=True):
            unique = np.unique(np.asarray(items, dtype=np.int64))
            row[: len(unique)] = np.sort(ranks[unique])
        return torch.from_numpy(padded).to(self.device)

    def _tree_mask(self, store: KeyValueStore, slots_UTA: Tensor, num_new: int) -> Tensor:
        """What each new token sees: its user's prompt, its own ancestors and itself."""
        num_tokens = slots_UTA.shape[1]
        slot_S = torch.arange(store.used + num_new, device=self.device)
        prompt_US = slot_S < store.lengths_U[:, None]
        mask_UTS = prompt_US[:, None].repeat(1, num_tokens, 1)
        return mask_UTS.scatter_(2, slots_UTA, True)
