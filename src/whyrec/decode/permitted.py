"""Which items a search may return: some excluded, some allowed only, some prefixes to stay inside.

Items in the lexicographic order of their SIDs (leaf ranks) make every rule a set of half-open
intervals: a prefix is one, an excluded item cuts one in two. A node of the trie covers an interval
too, so that "may this prefix still lead somewhere" is one binary search, whatever the rules and
however many, in fixed shapes and without a question to the host.

Dimensions: U users, X intervals of a user at most, N items.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from whyrec.decode.transfer import sent
from whyrec.sid.trie import Trie


@dataclass(frozen=True)
class Rule:
    """What one user may be given.

    Attributes:
        excluded: item indices that must not come.
        allowed: item indices, of which all others must not come; None allows all.
        prefixes: beginnings of SIDs (codes), of which an item must have one; None allows all.
    """

    excluded: Sequence[int] = ()
    allowed: Sequence[int] | None = None
    prefixes: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Permitted:
    """Intervals of leaf ranks, sorted and disjoint, by user.

    Attributes:
        starts_UX: int32, where each interval starts; padded with N, at least once.
        stops_UX: int32, where it ends; padded with N + 1.
    """

    starts_UX: Tensor
    stops_UX: Tensor

    @classmethod
    def of(
        cls, rules: Sequence[Rule], *, trie: Trie, ranks_N: np.ndarray, intervals: int = 1
    ) -> "Permitted":
        """Intervals of each user's rule, on the host.

        Args:
            rules: one a user.
            trie: the catalogue, on the host.
            ranks_N: `trie.item_ranks()` on the host.
            intervals: X is at least this.
        """
        found = [_intervals(rule, trie, ranks_N) for rule in rules]
        most = max(intervals, *(len(starts) + 1 for starts, _ in found))
        starts_UX = np.full((len(rules), most), len(ranks_N), dtype=np.int32)
        stops_UX = np.full((len(rules), most), len(ranks_N) + 1, dtype=np.int32)
        for user, (starts, stops) in enumerate(found):
            starts_UX[user, : len(starts)] = starts
            stops_UX[user, : len(stops)] = stops
        return cls(torch.from_numpy(starts_UX), torch.from_numpy(stops_UX))

    def to(self, device: torch.device) -> "Permitted":
        """The same on a device."""
        return Permitted(*(sent(getattr(self, field.name), device) for field in fields(self)))

    def copy_(self, other: "Permitted") -> None:
        """Take over another's intervals, of the same shape, in place."""
        self.starts_UX.copy_(other.starts_UX)
        self.stops_UX.copy_(other.stops_UX)

    def any_between(self, low_UWK: Tensor, high_UWK: Tensor) -> Tensor:
        """Whether half-open ranges of leaf ranks hold an item that may come: bool, same shape.

        Args:
            low_UWK, high_UWK: int32, as `Trie.leaf_range` gives them: empty only as 0, 0.
        """
        # The first interval that ends behind a range's start; padding, if there is none.
        place_UR = torch.searchsorted(self.stops_UX, low_UWK.flatten(1), right=True)
        return self.starts_UX.gather(1, place_UR).view_as(high_UWK) < high_UWK


def _intervals(rule: Rule, trie: Trie, ranks_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted starts and stops of the leaf ranks that a rule leaves."""
    starts, stops = np.zeros(1, dtype=np.int64), np.full(1, len(ranks_N), dtype=np.int64)
    if len(rule.excluded) == 0 and rule.allowed is None and rule.prefixes is None:
        return starts, stops
    if rule.prefixes is not None:
        starts, stops = _ranges(rule.prefixes, trie)
    excluded = np.unique(ranks_N[np.asarray(rule.excluded, dtype=np.int64)]).astype(np.int64)
    if rule.allowed is not None:
        allowed = np.unique(ranks_N[np.asarray(rule.allowed, dtype=np.int64)]).astype(np.int64)
        allowed = np.setdiff1d(allowed[_inside(allowed, starts, stops)], excluded)
        first = np.diff(allowed, prepend=-2) > 1  # neighbours make one interval
        last = np.diff(allowed, append=np.iinfo(np.int64).max) > 1
        return allowed[first], allowed[last] + 1
    # Each excluded rank cuts the interval that holds it in two.
    if rule.prefixes is not None:
        excluded = excluded[_inside(excluded, starts, stops)]
    starts = np.sort(np.concatenate([starts, excluded + 1]))
    stops = np.sort(np.concatenate([stops, excluded]))
    filled = stops > starts
    return starts[filled], stops[filled]


def _ranges(prefixes: Sequence[Sequence[int]], trie: Trie) -> tuple[np.ndarray, np.ndarray]:
    """Leaf ranks under prefixes, as sorted disjoint intervals."""
    found = []
    for prefix in prefixes:
        codes = torch.as_tensor(list(prefix), dtype=torch.long)
        ends = trie.leaf_range(trie.walk(codes), level=len(prefix))
        found.append((int(ends[0]), int(ends[1])))
    starts, stops = list[int](), list[int]()
    for low, high in sorted(found):
        if high <= low:
            continue  # nobody has this prefix
        if stops and low < stops[-1]:
            stops[-1] = max(stops[-1], high)  # one prefix lies inside another
        else:
            starts.append(low)
            stops.append(high)
    return np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)


def _inside(ranks: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Whether sorted disjoint intervals hold the ranks."""
    place = np.searchsorted(starts, ranks, side="right") - 1
    if len(starts) == 0:
        return np.zeros(len(ranks), dtype=bool)
    return (place >= 0) & (ranks < stops[place.clip(min=0)])
