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

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whyrec.decode.permitted import Permitted, Rule
from whyrec.decode.prefill import Prefilled, prefill
from whyrec.decode.prompt_cache import PromptCache
from whyrec.decode.tree_attention import HuggingFaceTree, KeyValueStore, TreeModel
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


class BeamDecoder:
    """Beam search for one model and one catalogue, on the model's device.

    Args:
        model: a Hugging Face causal LM, or another `TreeModel`, whose vocabulary holds the SID
            tokens.
        vocabulary: where those tokens are.
        trie: the catalogue's SIDs.

    Attributes:
        host_trie: the trie where asking it costs no wait for a device.
        ranks_N: its `item_ranks`, there.

    Raises:
        ValueError: when the model's attention cannot run on trees.
    """

    def __init__(
        self, model: PreTrainedModel | TreeModel, *, vocabulary: SidVocabulary, trie: Trie
    ) -> None:
        assert trie.level_sizes == vocabulary.level_sizes
        hugging_face = isinstance(model, PreTrainedModel)
        self.model: PreTrainedModel = model  # type: ignore[assignment]  # for those who gave one
        self.tree: TreeModel = HuggingFaceTree(model) if hugging_face else model  # type: ignore
        self.vocabulary = vocabulary
        self.device = self.tree.device
        self.trie = trie.to(self.device)
        self.host_trie = trie.to("cpu")
        self.ranks_N = self.host_trie.item_ranks().numpy()

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        width: int,
        searches: int = 1,
        other_slots: int = 0,
        cache: PromptCache | None = None,
    ) -> Prefilled:
        """Compute the prompts' keys and values once.

        Args:
            prompts: token ids of each user's prompt, ending in `<|sid_begin|>` for a search.
            width: the greatest width that will be searched from here; 0 for no search.
            searches: how many searches of that width shall share the prefixes they visit; more
                are right too, only slower.
            other_slots: room behind each prompt for tokens other than a beam's, such as thoughts.
            cache: prompts of earlier calls, whose beginnings are not computed again.
        """
        tree_slots = width * (self.trie.num_levels - 1) * searches + other_slots
        return prefill(self.tree, prompts, tree_slots=tree_slots, cache=cache)

    def permitted(self, rules: Sequence[Rule], *, intervals: int = 1) -> Permitted:
        """Intervals of the items that each user may be given; see `Permitted.of`."""
        return self.permitted_on_host(rules, intervals=intervals).to(self.device)

    def permitted_on_host(self, rules: Sequence[Rule], *, intervals: int = 1) -> Permitted:
        """The same, where they were reckoned."""
        return Permitted.of(rules, trie=self.host_trie, ranks_N=self.ranks_N, intervals=intervals)

    @torch.no_grad()
    def search(
        self,
        prefilled: Prefilled,
        *,
        width: int,
        excluded: Sequence[Sequence[int]] | None = None,
        permitted: Permitted | None = None,
        compact: bool = True,
    ) -> Beams:
        """Find the `width` best items of each user.

        Args:
            prefilled: the prompts.
            width: W; at most the width given to `prefill`.
            excluded: by user, indices of items that must not come; the scores of the others stay
                what they are.
            permitted: all that may come, instead of `excluded`; of `self.permitted`.
            compact: run only the beams whose next codes are open and not yet known. Their number
                is asked for at every level; without this all shapes are fixed and the device is
                asked nothing, as a CUDA graph wants it.
        """
        store, trie = prefilled.store, self.trie
        prefilled.make_room(width * (trie.num_levels - 1))
        num_users, num_levels = len(store.lengths_U), trie.num_levels
        device, users = self.device, torch.arange(len(store.lengths_U), device=self.device)[:, None]
        if excluded is not None:
            assert permitted is None, "say what is excluded in the rules"
            permitted = self.permitted([Rule(excluded=items) for items in excluded])
        rows = self._head_rows()

        nodes_UW = torch.zeros(num_users, 1, dtype=torch.long, device=device)
        scores_UW = torch.zeros(num_users, 1, device=device)
        hidden_UWD = prefilled.last_hidden_UD[:, None]
        # Slots of each beam's tokens so far; a slot that was never computed is never looked at.
        slots_UWA = torch.zeros(num_users, 1, 0, dtype=torch.long, device=device)
        for level in range(num_levels):
            children_UWK = trie.children(nodes_UW, level=level)
            log_probs_UWK = self._log_probs(hidden_UWD, rows[level], legal_UWK=children_UWK >= 0)
            if permitted is not None:
                low_UWK, high_UWK = trie.leaf_range(children_UWK, level=level + 1)
                may_come_UWK = permitted.any_between(low_UWK, high_UWK)
                children_UWK = children_UWK.masked_fill(~may_come_UWK, -1)
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
            if compact:
                # Only beams whose next codes are still open, and unknown, cost a forward pass.
                low_UW, high_UW = trie.leaf_range(nodes_UW, level=level + 1)
                open_UW = high_UW - low_UW > 1
                known_UW, slots_UW, hidden_UWD = prefilled.find(nodes_UW)
                new_UW = open_UW & ~known_UW
                num_new = int(new_UW.sum(1).max())
                # Users with fewer new beams fill up with others, known ones first: they are
                # computed again. A closed one's token is nonsense, but nobody will look at it.
                urgency_UW = 2 * new_UW.int() + open_UW.int()
                chosen_UT = urgency_UW.argsort(dim=1, descending=True, stable=True)[:, :num_new]
            else:
                num_new, slots_UW = keep, torch.zeros_like(flat_UW)
                chosen_UT = torch.arange(keep, device=device).expand(num_users, -1)
            slots_UWA = torch.cat([slots_UWA, slots_UW[..., None]], dim=-1)
            if num_new == 0:
                continue
            slot_T = store.used + torch.arange(num_new, device=device)
            slots_UWA[users, chosen_UT, -1] = slot_T.expand(num_users, -1)
            hidden_UTD = self.tree.run(
                codes_UW.gather(1, chosen_UT) + self.vocabulary.offsets[level],
                positions_UT=(store.lengths_U[:, None] + level).expand(-1, num_new).contiguous(),
                store=store,
                mask_UTS=_tree_mask(store, slots_UWA[users, chosen_UT], num_new),
            )
            if compact:
                hidden_UTD = hidden_UTD.to(hidden_UWD.dtype)
                hidden_UWD[users, chosen_UT] = hidden_UTD
                prefilled.keep(nodes_UW.masked_fill(~open_UW, -1).gather(1, chosen_UT), hidden_UTD)
            else:
                hidden_UWD = hidden_UTD

        items_UW = trie.leaf_items(nodes_UW)
        missing = width - items_UW.shape[1]
        if missing > 0:
            items_UW = torch.nn.functional.pad(items_UW, (0, missing), value=-1)
            scores_UW = torch.nn.functional.pad(scores_UW, (0, missing), value=-torch.inf)
        return Beams(items_UW, scores_UW)

    def _head_rows(self) -> list[Tensor]:
        """Rows of the language-model head by level, [K, D] each."""
        sizes = self.vocabulary.level_sizes
        return [
            self.tree.head_rows(offset, offset + size)
            for offset, size in zip(self.vocabulary.offsets, sizes, strict=True)
        ]

    def _log_probs(self, hidden_UWD: Tensor, rows_KD: Tensor, *, legal_UWK: Tensor) -> Tensor:
        """Log-probabilities over the legal codes, in float32; 0 for a forced code."""
        logits_UWK = (hidden_UWD.to(rows_KD.dtype) @ rows_KD.T).float()
        # A dead beam has no legal code: the caller masks its NaNs.
        return logits_UWK.masked_fill(~legal_UWK, -torch.inf).log_softmax(-1)


def _tree_mask(store: KeyValueStore, slots_UTA: Tensor, num_new: int) -> Tensor:
    """What each new token sees: its user's prompt, its own ancestors and itself, [U, T, S]."""
    slot_S = torch.arange(store.in_sight(num_new), device=slots_UTA.device)
    prompt_US = slot_S < store.lengths_U[:, None]
    mask_UTS = prompt_US[:, None].repeat(1, slots_UTA.shape[1], 1)
    return mask_UTS.scatter_(2, slots_UTA, True)
