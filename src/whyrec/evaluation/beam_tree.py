"""The beam as a tree: which codes were followed, how probable each was, and which were left.

The beam search (`decode/beam.py`) keeps the hidden state behind every prefix that it computed. Here
they are read once more: each gives the probabilities of the codes that may follow it, so that the
tree tells of every branch what it had before its siblings took over. Along the path to an item the
logarithms add up to its score.

    items, branches = beam_tree(decoder, prompt, width=20, excluded=history)
    branches[0].code, branches[0].probability, branches[0].children
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from whyrec.decode.beam import BeamDecoder, Prefilled
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import code_token


@dataclass
class Branch:
    """A code after a prefix.

    Attributes:
        code: the code's token as text.
        probability: of the code among those that may follow its prefix.
        log_prob: of the prefix with the code.
        item: the item at a leaf; None inside the tree.
        children: the likeliest first.
        left: a prefix that the beam followed and then left: none of its items is in the list.
    """

    code: str
    probability: float
    log_prob: float
    item: int | None = None
    children: list["Branch"] = field(default_factory=list)
    left: bool = False


@torch.no_grad()
def beam_tree(
    decoder: BeamDecoder,
    prompt: Sequence[int],
    *,
    width: int,
    excluded: Sequence[int] = (),
) -> tuple[list[tuple[int, float]], list[Branch]]:
    """Search from one prompt, and tell the tree that was searched.

    Args:
        decoder: of the model.
        prompt: token ids, ending in `<|sid_begin|>`.
        width: of the beam.
        excluded: item indices that must not come.

    Returns:
        Items with their log-probabilities, best first, and the branches behind the root. A prefix
        that the beam left and for which it computed nothing, since only one item has it, is not
        told.
    """
    prefilled = decoder.prefill([prompt], width=width)
    beams = decoder.search(prefilled, width=width, excluded=[list(excluded)])
    pairs = zip(beams.items_UW[0].tolist(), beams.scores_UW[0].tolist(), strict=True)
    items = [(item, score) for item, score in pairs if item >= 0]
    trie = decoder.trie
    leaf_of = (trie.item_ranks() + trie.num_internal).tolist()
    paths = {item: _codes(trie, leaf_of[item]) for item, _ in items}
    followed = {codes[:depth] for codes in paths.values() for depth in range(1, len(codes) + 1)}
    computed = {_codes(trie, n) for n in prefilled.nodes_UB[0].unique().tolist() if n > 0}
    probabilities = _probabilities(decoder, prefilled, followed | computed)
    leaves = {codes: item for item, codes in paths.items()}

    def grow(prefix: tuple[int, ...], log_prob: float) -> list[Branch]:
        depth = len(prefix) + 1
        found = []
        for codes in followed | computed:
            if len(codes) == depth and codes[:-1] == prefix:
                total = log_prob + probabilities[codes]
                found.append(
                    Branch(
                        code_token(depth - 1, codes[-1]),
                        math.exp(probabilities[codes]),
                        total,
                        leaves.get(codes),
                        grow(codes, total),
                        codes not in followed,
                    )
                )
        return sorted(found, key=lambda branch: (branch.left, -branch.log_prob, branch.code))

    return items, grow((), 0.0)


def _codes(trie: Trie, node: int) -> tuple[int, ...]:
    """The codes that lead to a node: up to the root, where a parent is found by its children."""
    codes: tuple[int, ...] = ()
    while node:
        codes = (int(trie.code[node]), *codes)
        node = int(torch.searchsorted(trie.first_child, node, right=True)) - 1
    return codes


def _probabilities(
    decoder: BeamDecoder, prefilled: Prefilled, prefixes: set[tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """Log-probability of the last code of each prefix, among those that may stand there."""
    trie, vocabulary = decoder.trie, decoder.vocabulary
    found = {}
    for before in {codes[:-1] for codes in prefixes}:
        level = len(before)
        node_1 = trie.walk(torch.tensor([before], dtype=torch.long, device=decoder.device))
        known, _, hidden_11D = prefilled.find(node_1[None])
        legal_K = trie.children(node_1, level=level)[0] >= 0
        if level == 0:
            hidden_D = prefilled.last_hidden_UD[0]
        elif bool(known[0, 0]):
            hidden_D = hidden_11D[0, 0]
        else:
            assert int(legal_K.sum()) == 1  # only forced codes are never computed
            hidden_D = None
        if hidden_D is None:
            log_probs_K = torch.zeros(len(legal_K))
        else:
            first = vocabulary.offsets[level]
            rows_KD = decoder.tree.head_rows(first, first + vocabulary.level_sizes[level])
            logits_K = (hidden_D.to(rows_KD.dtype) @ rows_KD.T).float()
            log_probs_K = logits_K.masked_fill(~legal_K, -torch.inf).log_softmax(-1)
        for codes in prefixes:
            if codes[:-1] == before:
                found[codes] = float(log_probs_K[codes[-1]])
    return found
