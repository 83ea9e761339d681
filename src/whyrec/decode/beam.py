"""Exact beam search over the semantic IDs of a catalogue.

A beam's score is the model's log-probability of its codes, each renormalised over the codes that
the trie allows after its prefix: log p(SID | prompt, SID is legal), level by level, which is what
constrained sampling draws from. The search is exact with respect to its width: at every level the
best W of *all* legal continuations survive. A prefix that leads to one item only is finished: its
forced codes have probability 1 and cost no forward pass. Nor does what was computed before: the
common beginning of a batch's prompts is run once, and searches from the same prompts, with other
exclusions, share the prefixes that they both visit.

Dimensions: U users, W beams a user, K codes of a level, D hidden size, L levels, and B beam tokens
of a user that are kept.

    decoder = BeamDecoder(model, vocabulary=vocabulary, trie=trie)
    prefilled = decoder.prefill(prompts, width=20)       # lists of token ids, `<|sid_begin|>` last
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


@dataclass
class Prefilled:
    """Prompts whose keys and values are computed; any number of searches can start from them.

    Attributes:
        store: keys and values of the prompts and of the beam tokens behind them.
        last_hidden_UD: hidden states after the prompts.
        nodes_UB: trie nodes of the beam tokens in the store, by slot; -1 for a slot of no use.
        hidden_UBD: their hidden states.
    """

    store: KeyValueStore
    last_hidden_UD: Tensor
    nodes_UB: Tensor
    hidden_UBD: Tensor

    def make_room(self, num_tokens: int) -> None:
        """Forget all beam tokens if so many new ones might not fit beside them."""
        if self.store.used + num_tokens > self.store.capacity:
            self.store.forget_tree()
            self.nodes_UB = self.nodes_UB[:, :0]
            self.hidden_UBD = self.hidden_UBD[:, :0]

    def find(self, nodes_UW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look up beam tokens by node: found [U, W], slots [U, W] and hidden states [U, W, D]."""
        if self.nodes_UB.shape[1] == 0:
            nothing_UW = torch.zeros_like(nodes_UW)
            hidden_UWD = self.hidden_UBD.new_zeros(*nodes_UW.shape, self.hidden_UBD.shape[-1])
            return nothing_UW.bool(), nothing_UW, hidden_UWD
        same_UWB = nodes_UW[..., None] == self.nodes_UB[:, None]
        found_UW, where_UW = same_UWB.max(-1)
        users = torch.arange(len(nodes_UW), device=nodes_UW.device)[:, None]
        hidden_UWD = self.hidden_UBD[users, where_UW]
        return found_UW & (nodes_UW >= 0), where_UW + self.store.prompt_slots, hidden_UWD

    def keep(self, nodes_UT: Tensor, hidden_UTD: Tensor) -> None:
        """Note what the tokens are that were just written into the store."""
        self.nodes_UB = torch.cat([self.nodes_UB, nodes_UT], dim=1)
        self.hidden_UBD = torch.cat([self.hidden_UBD, hidden_UTD], dim=1)


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
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        width: int,
        searches: int = 1,
        other_slots: int = 0,
    ) -> Prefilled:
        """Compute the prompts' keys and values once.

        Args:
            prompts: token ids of each user's prompt, ending in `<|sid_begin|>` for a search.
            width: the greatest width that will be searched from here; 0 for no search.
            searches: how many searches of that width shall share the prefixes they visit; more
                are right too, only slower.
            other_slots: room behind each prompt for tokens other than a beam's, such as thoughts.
        """
        lengths = [len(prompt) for prompt in prompts]
        ids = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        ids_UP = torch.from_numpy(ids).to(self.device)
        lengths_U = torch.tensor(lengths, device=self.device)
        num_users, num_slots = ids_UP.shape
        tree_slots = width * (self.trie.num_levels - 1) * searches + other_slots
        store = KeyValueStore(lengths_U, num_slots, capacity=num_slots + tree_slots)
        positions_UP = torch.arange(num_slots, device=self.device).expand(num_users, -1)
        shared = _shared_prefix(ids, min(lengths))
        mask_UTS = None
        if shared:
            first = KeyValueStore(lengths_U[:1], shared, capacity=shared)
            run(
                self.model, ids_UP[:1, :shared], positions_UT=positions_UP[:1, :shared], store=first
            )
            store.start_with(first)
            slot_P = torch.arange(num_slots, device=self.device)
            mask_UTS = (slot_P <= slot_P[shared:, None])[None]
        hidden_UTD = run(
            self.model,
            ids_UP[:, shared:],
            positions_UT=positions_UP[:, shared:].contiguous(),
            store=store,
            mask_UTS=mask_UTS,
        )
        users = torch.arange(num_users, device=self.device)
        return Prefilled(
            store,
            last_hidden_UD=hidden_UTD[users, lengths_U - 1 - shared],
            nodes_UB=torch.zeros(num_users, 0, dtype=torch.long, device=self.device),
            hidden_UBD=hidden_UTD[:, :0],
        )

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
        prefilled.make_room(width * (trie.num_levels - 1))
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
            children_UWK = trie.children(nodes_UW, level=level)
            log_probs_UWK = self._log_probs(hidden_UWD, rows[level], legal_UWK=children_UWK >= 0)
            if excluded_UX is not None:
                children_UWK = self._without_excluded(children_UWK, level, excluded_UX)
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

            # Only beams whose next codes are still open, and unknown, cost a forward pass.
            low_UW, high_UW = trie.leaf_range(nodes_UW, level=level + 1)
            open_UW = high_UW - low_UW > 1
            known_UW, slots_UW, hidden_UWD = prefilled.find(nodes_UW)
            slots_UWA = torch.cat([slots_UWA, slots_UW[..., None]], dim=-1)
            new_UW = open_UW & ~known_UW
            num_new = int(new_UW.sum(1).max())
            if num_new == 0:
                continue
            # Users with fewer new beams fill up with others, known ones first: they are computed
            # again. A closed one's token is nonsense, but nobody will look at it.
            urgency_UW = 2 * new_UW.int() + open_UW.int()
            chosen_UT = urgency_UW.argsort(dim=1, descending=True, stable=True)[:, :num_new]
            slot_T = store.used + torch.arange(num_new, device=device)
            slots_UWA[users, chosen_UT, -1] = slot_T.expand(num_users, -1)
            hidden_UTD = run(
                self.model,
                codes_UW.gather(1, chosen_UT) + self.vocabulary.offsets[level],
                positions_UT=(store.lengths_U[:, None] + level).expand(-1, num_new).contiguous(),
                store=store,
                mask_UTS=self._tree_mask(store, slots_UWA[users, chosen_UT], num_new),
            ).to(hidden_UWD.dtype)
            hidden_UWD[users, chosen_UT] = hidden_UTD
            prefilled.keep(nodes_UW.masked_fill(~open_UW, -1).gather(1, chosen_UT), hidden_UTD)

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

    def _log_probs(self, hidden_UWD: Tensor, rows_KD: Tensor, *, legal_UWK: Tensor) -> Tensor:
        """Log-probabilities over the legal codes, in float32; 0 for a forced code."""
        logits_UWK = (hidden_UWD.to(rows_KD.dtype) @ rows_KD.T).float()
        # A dead beam has no legal code: the caller masks its NaNs.
        return logits_UWK.masked_fill(~legal_UWK, -torch.inf).log_softmax(-1)

    def _without_excluded(self, children_UWK: Tensor, level: int, excluded_UX: Tensor) -> Tensor:
        """The same children, but -1 for those that lead to excluded items only."""
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


def _shared_prefix(ids_UP: np.ndarray, shortest: int) -> int:
    """How many tokens all prompts begin with; 0 where a pass for them would save too little."""
    num_users, num_slots = ids_UP.shape
    differs_P = (ids_UP[:, : shortest - 1] != ids_UP[:1, : shortest - 1]).any(0)
    shared = int(differs_P.argmax()) if differs_P.any() else shortest - 1
    return shared if shared * num_users >= 4 * num_slots else 0
