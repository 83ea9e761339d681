"""Keys and values of prompts that were seen lately, so that only what is new of one is computed.

Prompts of one user begin alike: the question and the history stay when a thought comes behind them,
or another thought. An entry holds the whole prompt; the longest common beginning with any entry
counts, and the entry that was used least recently leaves first. In the order of their tokens, that
beginning is with one of the two neighbours of what is asked for, so that thousands of entries cost
hardly more to look through than a few. On a CPU, where a prompt costs more than the beam behind it,
this is most of the time of a second recommendation.

Dimensions: J key/value heads, S slots, E head size.
"""

from bisect import bisect, bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from whyrec.decode.tree_attention import KeyValueStore


@dataclass(frozen=True)
class Known:
    """The beginning of a prompt whose keys and values are there.

    Attributes:
        length: tokens of it; 0 when nothing is known.
        keys, values: by layer, [J, at least `length` slots, E].
    """

    length: int
    keys: dict[int, Tensor]
    values: dict[int, Tensor]


@dataclass(frozen=True)
class _Entry:
    ids: np.ndarray
    known: Known

    @property
    def nbytes(self) -> int:
        return sum(
            part.nbytes for parts in (self.known.keys, self.known.values) for part in parts.values()
        )


class PromptCache:
    """Least recently used prompts.

    Args:
        max_bytes: of keys and values in all.

    Attributes:
        hits, tokens: how many tokens were found, of how many that were asked for.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.tokens = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._order: list[bytes] = []  # the keys, sorted as their tokens are
        self._nbytes = 0

    def find(self, ids: Sequence[int]) -> Known:
        """The longest beginning of `ids` that any entry begins with."""
        asked = np.asarray(ids, dtype=np.int64)
        best, best_key = 0, None
        place = bisect_left(self._order, _key(asked))
        for key in self._order[max(place - 1, 0) : place + 1]:
            length = _common(asked, self._entries[key].ids)
            if length > best:
                best, best_key = length, key
        self.hits += best
        self.tokens += len(asked)
        if best_key is None:
            return Known(0, {}, {})
        self._entries.move_to_end(best_key)
        entry = self._entries[best_key]
        return Known(best, entry.known.keys, entry.known.values)

    def put(self, ids: Sequence[int], store: KeyValueStore, user: int) -> None:
        """Keep a copy of one user's prompt; entries that it begins with are no longer needed."""
        asked = np.asarray(ids, dtype=np.int64)
        own_key = _key(asked)
        place = bisect_left(self._order, own_key)
        if place < len(self._order) and self._order[place].startswith(own_key):
            self._entries.move_to_end(self._order[place])  # it is there, or one that begins so
            return
        self._drop_beginnings(asked)
        keys, values = (
            {layer: part[user, :, : len(ids)].clone() for layer, part in parts.items()}
            for parts in (store.keys, store.values)
        )
        entry = _Entry(asked, Known(len(ids), keys, values))
        if entry.nbytes > self.max_bytes:
            return
        self._entries[own_key] = entry
        insort(self._order, own_key)
        self._nbytes += entry.nbytes
        while self._nbytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop_beginnings(self, asked: np.ndarray) -> None:
        """Forget the entries that a new one begins with: they stand before it, longest last."""
        length = len(asked)
        while length and (place := bisect(self._order, _key(asked[:length]))):
            ids = self._entries[self._order[place - 1]].ids
            length = _common(asked[:length], ids)
            if length == len(ids):
                self._drop(self._order[place - 1])

    def _drop(self, key: bytes) -> None:
        self._nbytes -= self._entries.pop(key).nbytes
        del self._order[bisect_left(self._order, key)]


def _key(ids: np.ndarray) -> bytes:
    """Bytes that are in the order of the numbers: the first differing byte decides, as it does."""
    return ids.astype(">i8").tobytes()


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """How many numbers two arrays begin with alike."""
    size = min(len(left), len(right))
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size
