"""Co-visitation: which items stand near each other in users' training sequences.

    C[i, j] = Σ over pairs of one user, at most `window` events apart,
              1/distance where j came after i, `backward`/distance where j came before i
    score(j | i) = C[i, j] / √(events of j + 1)

the item-to-item table of classic shops (Linden, Smith & York 2003). It is a baseline by itself
(`evaluation/baselines.py`), and prompts may show an item's best neighbours (`prompting/notes.py`).

A user must not be told what they did themselves: a pair that only this user made is what training
asks for. `CoVisits.neighbours` therefore takes the pairs of a user's own sequence out of the
counts, and the own events out of the popularity, before it looks.

Dimensions: N items, P pairs with a count, R of them in one row, H events of a user.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from whyrec.catalog.dataset import write_table

WINDOW, BACKWARD = 5, 0.5
_KEPT = 64  # neighbours of an item that a file keeps
_ROUNDING = 1e-4


@dataclass(frozen=True)
class CoVisits:
    """Counts of one catalogue, row by row (CSR).

    Attributes:
        starts_N1: int64, where each item's row begins, and the end.
        items_P: int32, neighbours, best first within a row.
        counts_P: float32, C[i, j].
        events_N: float32, training events of each item.
    """

    starts_N1: np.ndarray
    items_P: np.ndarray
    counts_P: np.ndarray
    events_N: np.ndarray

    @classmethod
    def count(
        cls,
        sequences: Sequence[np.ndarray],
        *,
        num_items: int,
        kept: int | None = _KEPT,
    ) -> "CoVisits":
        """Count the pairs of training sequences.

        Args:
            sequences: by user, item indices in time order.
            num_items: N.
            kept: neighbours of an item at most, the best ones; None for all.
        """
        counts_NN = pair_counts(sequences, num_items=num_items)
        counts_NN.setdiag(0)  # an item is no neighbour of itself
        counts_NN.eliminate_zeros()
        events_N = event_counts(sequences, num_items=num_items)
        rows_P = np.repeat(np.arange(num_items), np.diff(counts_NN.indptr))
        scores_P = counts_NN.data / np.sqrt(events_N[counts_NN.indices] + 1)
        order_P = np.lexsort((counts_NN.indices, -scores_P, rows_P))
        if kept is not None:
            rank_P = np.arange(len(order_P)) - counts_NN.indptr[rows_P]
            order_P = order_P[rank_P < kept]
        sizes_N = np.bincount(rows_P[order_P], minlength=num_items)
        return cls(
            np.concatenate([[0], np.cumsum(sizes_N)]).astype(np.int64),
            counts_NN.indices[order_P].astype(np.int32),
            counts_NN.data[order_P].astype(np.float32),
            events_N.astype(np.float32),
        )

    def neighbours(
        self,
        history: Sequence[int],
        *,
        k: int,
        own: Sequence[int] | np.ndarray | None = None,
        last: int | None = None,
    ) -> list[list[int]]:
        """For each event of a history the items that others chose near it, best first.

        Args:
            history: item indices, oldest first.
            k: neighbours of an event at most; an event itself and those before it are none.
            own: the user's training sequence, whose pairs are taken out of the counts; the history
                itself when None. Pairs that were never counted cost nothing: items of a history
                are no news to whoever asks, and nobody else's counts change.
            last: of how many of the newest events; None for all.

        Returns:
            One list for each of those events; shorter than k where few items were ever near, empty
            for items that are newer than the counts.

        Example:
            >>> visits = CoVisits.count([np.array([0, 1]), np.array([0, 1, 2])], num_items=3)
            >>> visits.neighbours([0], k=2)
            [[1, 2]]
        """
        own_H = [int(item) for item in (history if own is None else own)]
        first = 0 if last is None else max(0, len(history) - last)
        return [
            self._near(int(history[place]), seen=history[: place + 1], own=own_H, k=k)
            for place in range(first, len(history))
        ]

    def _near(self, item: int, *, seen: Sequence[int], own: Sequence[int], k: int) -> list[int]:
        row = slice(self.starts_N1[item], self.starts_N1[item + 1])
        mine = self._own_pairs(item, own)
        before = set(seen)
        found: list[tuple[float, int]] = []
        # Python, since few of these short rows' items need a second look.
        for other, score in zip(
            self.items_P[row].tolist(), self._scores_P[row].tolist(), strict=True
        ):
            if other in before:
                continue
            if other in mine:
                events = float(self.events_N[other])
                count = score * math.sqrt(events + 1) - mine[other]
                # What is left of a count that was all one's own is rounding.
                others = max(events - own.count(other), 0)
                score = count / math.sqrt(others + 1) if count > _ROUNDING else 0.0
            if score > 0:
                found.append((score, other))
        # The sort is stable and the rows are in order: of equal scores the lower index comes first.
        return [other for _, other in sorted(found, key=lambda pair: -pair[0])[:k]]

    def _own_pairs(self, item: int, own: Sequence[int]) -> dict[int, float]:
        """By item of a user's own sequence, what this user adds to C[item, …]."""
        mine = dict.fromkeys(own, 0.0)
        for place, event in enumerate(own):
            if event != item:
                continue
            for other in range(max(0, place - WINDOW), min(len(own), place + WINDOW + 1)):
                if other != place:
                    weight = 1.0 if other > place else BACKWARD
                    mine[own[other]] += weight / abs(other - place)
        return mine

    @cached_property
    def _scores_P(self) -> np.ndarray:
        return self.counts_P.astype(np.float64) / np.sqrt(self.events_N[self.items_P] + 1)

    def save(self, path: Path, *, item_ids: Sequence[str]) -> None:
        """Write Parquet, one row an item: its id, events, and rows and counts of its neighbours."""
        starts = pa.array(self.starts_N1, pa.int64())
        near = pa.LargeListArray.from_arrays(starts, pa.array(self.items_P, pa.int32()))
        counts = pa.LargeListArray.from_arrays(starts, pa.array(self.counts_P, pa.float32()))
        columns = {
            "item_id": pa.array(item_ids, pa.string()),
            "events": pa.array(self.events_N, pa.float32()),
            "near": near,
            "counts": counts,
        }
        write_table(path, pa.table(columns))

    @classmethod
    def load(cls, path: Path, *, item_ids: Sequence[str]) -> "CoVisits":
        """Read what `save` wrote, for a catalogue that may have gained and lost items since.

        Args:
            path: the file.
            item_ids: of the catalogue; new items have no neighbours, lost ones are none.

        Raises:
            ValueError: when it is not there, or damaged.
        """
        try:
            table = pq.read_table(path)
            columns = {name: table[name].combine_chunks() for name in table.column_names}
            sizes_R = np.diff(columns["near"].offsets.to_numpy())
            items_P, counts_P = (columns[name].flatten().to_numpy() for name in ("near", "counts"))
            events_R, known = columns["events"].to_numpy(), columns["item_id"].to_pylist()
        except (pa.ArrowException, OSError, AttributeError, KeyError) as error:
            raise ValueError(
                f"cannot read co-visits from {path} ({error}); run `whyrec index --force` again"
            ) from None
        place = {item_id: index for index, item_id in enumerate(item_ids)}
        index_R = np.array([place.get(item_id, -1) for item_id in known], dtype=np.int64)
        rows_P = np.repeat(index_R, sizes_R)
        kept_P = (rows_P >= 0) & (index_R[items_P] >= 0)
        order_P = np.flatnonzero(kept_P)[np.argsort(rows_P[kept_P], kind="stable")]
        events_N = np.zeros(len(item_ids), dtype=np.float32)
        events_N[index_R[index_R >= 0]] = events_R[index_R >= 0]
        sizes_N = np.bincount(rows_P[order_P], minlength=len(item_ids))
        return cls(
            np.concatenate([[0], np.cumsum(sizes_N)]).astype(np.int64),
            index_R[items_P[order_P]].astype(np.int32),
            counts_P[order_P].astype(np.float32),
            events_N,
        )


def event_counts(sequences: Sequence[np.ndarray], *, num_items: int) -> np.ndarray:
    """Events of each item, float64 [N]."""
    events = np.concatenate([np.empty(0, np.int32), *sequences])
    return np.bincount(events, minlength=num_items).astype(np.float64)


def pair_counts(
    sequences: Sequence[np.ndarray],
    *,
    num_items: int,
    window: int = WINDOW,
    backward: float = BACKWARD,
) -> sparse.csr_array:
    """C [N, N]: the summed weight of the times that j stood near i.

    Args:
        sequences: by user, item indices in time order.
        num_items: N.
        window: the greatest distance, in events, at which two items count as neighbours.
        backward: weight of "j stood before i" against "j stood after i".
    """
    events_E = np.concatenate([np.empty(0, np.int32), *sequences])
    users_E = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    shape = (num_items, num_items)
    total = sparse.csr_array(shape)
    for distance in range(1, window + 1):
        same_user = users_E[distance:] == users_E[:-distance]
        before, after = events_E[:-distance][same_user], events_E[distance:][same_user]
        weights = np.full(len(before), 1.0 / distance)
        forward_NN = sparse.csr_array((weights, (before, after)), shape=shape)
        total = total + forward_NN + backward * forward_NN.T
    return total.tocsr()
