"""Prompts' keys and values, computed once: what searches and thoughts start from.

What a batch's prompts begin with alike is run for one of them on a CPU, and what a `PromptCache`
knows is not run at all.

Dimensions: U users, P prompt slots, T tokens to compute, S slots, D hidden size, B beam tokens of a
user that are kept, W beams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from whyrec.decode.prompt_cache import Known, PromptCache
from whyrec.decode.transfer import sent
from whyrec.decode.tree_attention import KeyValueStore, TreeModel


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

    @classmethod
    def of(cls, store: KeyValueStore, last_hidden_UD: Tensor) -> "Prefilled":
        """Prompts that no search has started from yet."""
        num_users, device = len(last_hidden_UD), last_hidden_UD.device
        nodes_UB = torch.zeros(num_users, 0, dtype=torch.long, device=device)
        return cls(store, last_hidden_UD, nodes_UB, last_hidden_UD[:, None][:, :0])

    def make_room(self, num_tokens: int) -> None:
        """Forget all beam tokens if so many new ones might not fit beside them."""
        if self.store.in_sight(num_tokens) > self.store.capacity:
            self.forget_beams()

    def forget_beams(self) -> None:
        """Forget all beam tokens."""
        self.store.forget_tree()
        self.nodes_UB = self.nodes_UB[:, :0]
        self.hidden_UBD = self.hidden_UBD[:, :0]

    def find(self, nodes_UW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look up beam tokens by node: found [U, W], slots [U, W] and hidden states [U, W, D]."""
        if self.nodes_UB.shape[1] == 0:
            nothing_UW = torch.zeros_like(nodes_UW, dtype=torch.long)
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


def prefill(
    tree: TreeModel,
    prompts: Sequence[Sequence[int]],
    *,
    tree_slots: int,
    cache: PromptCache | None = None,
) -> Prefilled:
    """Compute the prompts' keys and values.

    Args:
        tree: the model.
        prompts: token ids of each user's prompt.
        tree_slots: room behind each prompt.
        cache: what is known of the prompts is taken from here, and they are put here.
    """
    if cache is None:
        return _prefill_all(tree, prompts, tree_slots=tree_slots)
    shared = _shared_prefix(prompts)
    if shared > cache.find(prompts[0][:shared]).length:
        beginning = prompts[0][:shared]
        first = _prefill_all(tree, [beginning], tree_slots=0)
        cache.put(beginning, first.store, 0)
    # The last token is run in any case: the beam needs its hidden state.
    known = [cache.find(prompt[:-1]) for prompt in prompts]
    if any(part.length for part in known):
        prefilled = _prefill_behind(tree, prompts, known, tree_slots=tree_slots)
    else:
        prefilled = _prefill_all(tree, prompts, tree_slots=tree_slots)
    for user, prompt in enumerate(prompts):
        cache.put(prompt, prefilled.store, user)
    return prefilled


def _prefill_all(
    tree: TreeModel, prompts: Sequence[Sequence[int]], *, tree_slots: int
) -> Prefilled:
    """Run the prompts, on a CPU their common beginning once.

    On a GPU the mask that its rest would need costs more than it saves: Flash Attention knows none.
    """
    lengths_U, ids_UP = _padded(prompts, tree.device)
    num_users, num_slots = ids_UP.shape
    store = KeyValueStore(lengths_U, num_slots, capacity=num_slots + tree_slots)
    positions_UP = torch.arange(num_slots, device=tree.device).expand(num_users, -1)
    shared = _shared_prefix(prompts) if tree.device.type == "cpu" else 0
    mask_UTS = None
    if shared:
        first = KeyValueStore(lengths_U[:1], shared, capacity=shared)
        tree.run(ids_UP[:1, :shared], positions_UT=positions_UP[:1, :shared], store=first)
        store.start_with(first)
        slot_P = torch.arange(num_slots, device=tree.device)
        mask_UTS = (slot_P <= slot_P[shared:, None])[None]
    hidden_UTD = tree.run(
        ids_UP[:, shared:],
        positions_UT=positions_UP[:, shared:].contiguous(),
        store=store,
        mask_UTS=mask_UTS,
    )
    users = torch.arange(num_users, device=tree.device)
    return Prefilled.of(store, hidden_UTD[users, lengths_U - 1 - shared])


def _prefill_behind(
    tree: TreeModel,
    prompts: Sequence[Sequence[int]],
    known: Sequence[Known],
    *,
    tree_slots: int,
) -> Prefilled:
    """Run what is not known of each prompt, behind what is."""
    device = tree.device
    rests_U, ids_UT = _padded(
        [prompt[part.length :] for prompt, part in zip(prompts, known, strict=True)], device
    )
    known_U = torch.tensor([part.length for part in known], device=device)
    longest, num_tokens = max(part.length for part in known), ids_UT.shape[1]
    slots = longest + num_tokens
    store = KeyValueStore(known_U + rests_U, slots, capacity=slots + tree_slots)
    like = next(part for part in known if part.length)
    for layer, key_JSE in like.keys.items():
        store.allocate(layer, like_UJTE=key_JSE[None])
        for user, part in enumerate(known):
            if part.length:
                store.keys[layer][user, :, : part.length] = part.keys[layer][:, : part.length]
                store.values[layer][user, :, : part.length] = part.values[layer][:, : part.length]
    store.used = longest
    tail_T = torch.arange(num_tokens, device=device)
    seen_US = torch.arange(longest, device=device) < known_U[:, None]
    causal_TT = tail_T <= tail_T[:, None]
    target_UT = known_U[:, None] + tail_T
    hidden_UTD = tree.run(
        ids_UT,
        positions_UT=target_UT.minimum(store.lengths_U[:, None] - 1),  # padding stays inside
        store=store,
        mask_UTS=torch.cat(
            [
                seen_US[:, None].expand(-1, num_tokens, -1),
                causal_TT.expand(len(prompts), -1, -1),
            ],
            dim=-1,
        ),
    )
    if any(part.length < longest for part in known):
        # A prompt is one piece: what was written behind the longest one moves behind its own.
        user_U1 = torch.arange(len(prompts), device=device)[:, None]
        for rows_UJSE in (*store.keys.values(), *store.values.values()):
            written = rows_UJSE[:, :, longest:slots].transpose(1, 2).clone()
            rows_UJSE[user_U1, :, target_UT] = written
    users = torch.arange(len(prompts), device=device)
    return Prefilled.of(store, hidden_UTD[users, rests_U - 1])


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lengths [U] and token ids [U, longest], padded with 0 on the right."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return sent(torch.from_numpy(lengths), device), sent(torch.from_numpy(ids), device)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; 0 where a pass for them would save too little."""
    shortest = min(len(prompt) for prompt in prompts)
    # What the first and the last in order begin with alike, all between them do.
    first, last = min(prompts, key=list), max(prompts, key=list)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = min(sum(1 for _ in alike), shortest - 1)
    longest = max(len(prompt) for prompt in prompts)
    return shared if shared * len(prompts) >= 4 * longest else 0
