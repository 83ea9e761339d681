"""The beam as a tree: which codes were followed, how probable each was, and which were left.

The beam search (`decode/beam.py`) keeps the hidden state behind every prefix that it computed. Here
they are read once more: each gives the probabilities of the codes that may follow it, so that the
tree tells of every branch what it had before its siblings took over. Along the path to an item the
logarithms add up to its score.

    items, branches = beam_tree(decoder, prompt, width=20, rule=Rule(excluded=history))
    branches[0].code, branches[0].probability, branches[0].children
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from whyrec.decode.beam import BeamDecoder, Prefilled
from whyrec.decode.permitted import Rule
from whyrec.decode.prompt_cache import PromptCache
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
    rule: Rule | None = None,
    cache: PromptCache | None = None,
) -> tuple[list[tuple[int, float]], list[Branch]]:
    """Search from one prompt, and tell the tree that was searched.

    Args:
        decoder: of the model.
        prompt: token ids, ending in `<|sid_begin|>`.
        width: of the beam.
        rule: which items may come; None allows all.
        cache: as for `BeamDecoder.prefill`.

    Returns:
        Items with their log-probabilities, best first, and the branches behind the root. A prefix
        that the beam left and for which it computed nothing, since only one item has it, is not
        told.
    """
    permitted = None if rule is None else decoder.permitted([rule])
    prefilled = decoder.prefill([prompt], width=width, cache=cache)
    beams = decoder.search(prefilled, width=width, permitted=permitted)
    pairs = zip(beams.items_UW[0].tolist(), beams.scores_UW[0].tolist(), strict=True)
    items = [(item, score) for item, score in pairs if item >= 0]
    trie = decoder.host_trie
    leaves = {_codes(trie, int(decoder.ranks_N[i]) + trie.num_internal): i for i, _ in items}
    followed = {codes[:depth] for codes in leaves for depth in range(1, len(codes) + 1)}
    computed = {_codes(trie, n) for n in prefilled.nodes_UB[0].unique().tolist() if n > 0}
    probabilities = _probabilities(decoder, prefilled, followed | computed)
    behind: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for codes in probabilities:
        behind.setdefault(codes[:-1], []).append(codes)

    def grow(prefix: tuple[int, ...], log_prob: float) -> list[Branch]:
        found = []
        for codes in behind.get(prefix, []):
            total = log_prob + probabilities[codes]
            found.append(
                Branch(
                    code_token(len(prefix), codes[-1]),
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
    vocabulary, found = decoder.vocabulary, dict[tuple[int, ...], float]()
    for level in range(vocabulary.num_levels):
        wanted = sorted(codes for codes in prefixes if len(codes) == level + 1)
        if not wanted:
            break
        row_of = {before: row for row, before in enumerate(dict.fromkeys(c[:-1] for c in wanted))}
        before_PL = torch.tensor(list(row_of), dtype=torch.long, device=decoder.device)
        nodes_1P = decoder.trie.walk(before_PL.view(len(row_of), level))[None]
        legal_PK = decoder.trie.children(nodes_1P, level=level)[0] >= 0
        known_1P, _, hidden_1PD = prefilled.find(nodes_1P)
        if level == 0:
            hidden_1PD = prefilled.last_hidden_UD[:, None]
        else:
            # Only forced codes are never computed; of one code the probability is 1 in any case.
            assert bool((known_1P[0] | (legal_PK.sum(-1) == 1)).all())
        first = vocabulary.offsets[level]
        rows_KD = decoder.tree.head_rows(first, first + vocabulary.level_sizes[level])
        logits_PK = (hidden_1PD[0].to(rows_KD.dtype) @ rows_KD.T).float()
        log_probs_PK = logits_PK.masked_fill(~legal_PK, -torch.inf).log_softmax(-1)
        rows = [row_of[codes[:-1]] for codes in wanted]
        last = [codes[-1] for codes in wanted]
        found |= zip(wanted, log_probs_PK[rows, last].tolist(), strict=True)
    return found
