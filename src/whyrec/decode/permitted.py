"""Which items a search may return: some excluded, some allowed only, some prefixes to stay inside.

Items in the lexicographic order of their SIDs (leaf ranks) make every rule a set of half-open
intervals: a prefix is one, an excluded item cuts one in two. A node of the trie covers an interval
too, so that "may this prefix still lead somewhere" is one binary search, whatever the rules and
however many, in fixed shapes and without a question to the host.

Dimensions: U users, X intervals of a user at most, N items.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
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
        """Intervals of each user's rule, on the host: a few NumPy calls for all of them.

        Args:
            rules: one a user.
            trie: the catalogue, on the host.
            ranks_N: `trie.item_ranks()` on the host.
            intervals: X is at least this.
        """
        num_users, num_items = len(rules), len(ranks_N)
        stride = num_items + 1
        starts, stops = _intervals(rules, trie, ranks_N)
        user = starts // stride
        counts_U = np.bincount(user, minlength=num_users)
        place = np.arange(len(user)) - np.repeat(counts_U.cumsum() - counts_U, counts_U)
        most = max(intervals, int(counts_U.max(initial=0)) + 1)
        starts_UX = np.full((num_users, most), num_items, dtype=np.int32)
        stops_UX = np.full((num_users, most), num_items + 1, dtype=np.int32)
        starts_UX[user, place] = starts - user * stride
        stops_UX[user, place] = stops - user * stride
        return cls(torch.from_numpy(starts_UX), torch.from_numpy(stops_UX))

    @property
    def most(self) -> int:
        """X."""
        return self.starts_UX.shape[1]

    def widened(self, users: int, intervals: int, *, num_items: int) -> "Permitted":
        """The same, padded to more intervals and with users behind them who may be given nothing.

        Args:
            users: U of the result.
            intervals: X of the result.
            num_items: N.
        """
        more = (0, intervals - self.most, 0, users - len(self.starts_UX))
        return Permitted(
            F.pad(self.starts_UX, more, value=num_items),
            F.pad(self.stops_UX, more, value=num_items + 1),
        )

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


def _intervals(
    rules: Sequence[Rule], trie: Trie, ranks_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted starts and stops of what the rules leave, in leaf ranks + user · (N + 1).

    So all users' intervals are disjoint and do not even touch, and are treated as one user's.
    """
    stride = len(ranks_N) + 1
    starts, stops = _ranges([rule.prefixes for rule in rules], trie, stride)
    excluded = _ranks([rule.excluded for rule in rules], ranks_N)
    excluded = excluded[_inside(excluded, starts, stops)]
    limited_U = np.array([rule.allowed is not None for rule in rules])
    if not limited_U.any():
        return _cut(starts, stops, excluded)
    allowed = _ranks([() if rule.allowed is None else rule.allowed for rule in rules], ranks_N)
    allowed = np.setdiff1d(allowed[_inside(allowed, starts, stops)], excluded, assume_unique=True)
    first = np.diff(allowed, prepend=-2) > 1  # neighbours make one interval
    last = np.diff(allowed, append=np.iinfo(np.int64).max) > 1
    free, free_excluded = ~limited_U[starts // stride], ~limited_U[excluded // stride]
    cut_starts, cut_stops = _cut(starts[free], stops[free], excluded[free_excluded])
    starts = np.concatenate([cut_starts, allowed[first]])
    stops = np.concatenate([cut_stops, allowed[last] + 1])
    return np.sort(starts), np.sort(stops)


def _cut(
    starts: np.ndarray, stops: np.ndarray, excluded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted disjoint intervals less some ranks in them: each cuts the one that holds it in two."""
    starts = np.sort(np.concatenate([starts, excluded + 1]))
    stops = np.sort(np.concatenate([stops, excluded]))
    filled = stops > starts
    return starts[filled], stops[filled]


def _ranks(items: Sequence[Sequence[int]], ranks_N: np.ndarray) -> np.ndarray:
    """Leaf ranks + user · (N + 1) of some items of each user, sorted and each once."""
    counts_U = [len(own) for own in items]
    flat = np.fromiter(chain.from_iterable(items), dtype=np.int64, count=sum(counts_U))
    user = np.repeat(np.arange(len(items)), counts_U)
    return np.unique(ranks_N[flat] + user * (len(ranks_N) + 1))


def _ranges(
    prefixes: Sequence[Sequence[Sequence[int]] | None], trie: Trie, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Leaf ranks + user · stride under each user's prefixes, as sorted disjoint intervals.

    Users without a wish have one interval of all ranks.
    """
    codes: dict[int, list[int]] = {}  # by depth, the codes of all prefixes of it
    owners: dict[int, list[int]] = {0: [u for u, own in enumerate(prefixes) if own is None]}
    for user, own in enumerate(prefixes):
        for prefix in own or ():
            codes.setdefault(len(prefix), []).extend(prefix)
            owners.setdefault(len(prefix), []).append(user)
    all_lows, all_highs = list[np.ndarray](), list[np.ndarray]()
    for depth, users in owners.items():
        codes_PD = np.array(codes.get(depth, []), dtype=np.int64).reshape(len(users), depth)
        low_P, high_P = trie.leaf_range(trie.walk(torch.from_numpy(codes_PD)), level=depth)
        at_P = np.array(users, dtype=np.int64) * stride
        all_lows.append(low_P.numpy() + at_P)
        all_highs.append(high_P.numpy() + at_P)
    lows, highs = np.concatenate(all_lows), np.concatenate(all_highs)
    somebody = highs > lows  # nobody has the others
    lows, highs = lows[somebody], highs[somebody]
    order = np.lexsort((-highs, lows))
    lows, highs = lows[order], highs[order]
    # One prefix's range lies inside another's or apart from it: those inside are left out.
    before = np.maximum.accumulate(np.concatenate([[0], highs]))[:-1]
    apart = lows >= before
    return lows[apart], highs[apart]


def _inside(ranks: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Whether sorted disjoint intervals hold the ranks."""
    place = np.searchsorted(starts, ranks, side="right") - 1
    if len(starts) == 0:
        return np.zeros(len(ranks), dtype=bool)
    return (place >= 0) & (ranks < stops[place.clip(min=0)])
