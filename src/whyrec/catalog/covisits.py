"""Co-visitation: which items stand near each other in users' training sequences.

    C[i, j] = Σ over pairs of one user, at most `window` events apart,
              1/distance where j came after i, `backward`/distance where j came before i
    score(j | i) = C[i, j] / (events of j + 1) ** damping

the item-to-item table of classic shops (Linden, Smith & York 2003). It is a baseline by itself
(`evaluation/baselines.py`), and prompts may show its best items (`prompting/notes.py`).

A user must not be told what they did themselves: a pair that only this user made is what training
asks for. `CoVisits.neighbours` therefore takes the pairs of a user's own sequence out of the
counts, and the own events out of the popularity, before it looks.

Dimensions: N items, P pairs with a count, X of them in the rows of E events, U distinct items of
these, H events of a user.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from whyrec.catalog.dataset import write_table

WINDOW, BACKWARD = 5, 0.5
_KEPT = 128  # neighbours of an item that a file keeps, those with the highest counts
_ROUNDING = 1e-4


@dataclass(frozen=True)
class CoVisits:
    """Counts of one catalogue, row by row (CSR).

    Attributes:
        starts_N1: int64, where each item's row begins, and the end.
        items_P: int32, neighbours, of the highest count first within a row.
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
        order_P = np.lexsort((counts_NN.indices, -counts_NN.data, rows_P))
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
        damping: float = 0.5,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each event of a history the items that others chose near it, best first.

        Args:
            history: item indices, oldest first.
            k: neighbours of an event at most; an event itself and those before it are none.
            own: the user's training sequence, whose pairs are taken out of the counts; the history
                itself when None. Pairs that were never counted cost nothing: items of a history
                are no news to whoever asks, and nobody else's counts change.
            last: of how many of the newest events; None for all.
            damping: how far popular items are held back; 0 leaves the counts as they are.

        Returns:
            Items and scores for each of those events; fewer than k where few items were ever near,
            none for items that are newer than the counts.

        Example:
            >>> visits = CoVisits.count([np.array([0, 1]), np.array([0, 1, 2])], num_items=3)
            >>> [items.tolist() for items, _ in visits.neighbours([0], k=2)]
            [[1, 2]]
        """
        history_H = np.asarray(history, dtype=np.int64)
        own_H = history_H if own is None else np.asarray(own, dtype=np.int64)
        first = 0 if last is None else max(0, len(history_H) - last)
        items_U, scores_EU = self._near(history_H[first:], own_H, damping=damping)
        # An item of the history is none from its first event on.
        at_H, is_there_H = _places(items_U, history_H)
        for place in np.flatnonzero(is_there_H):
            scores_EU[max(place - first, 0) :, at_H[place]] = 0.0
        return [_best(items_U, scores_U, k) for scores_U in scores_EU]

    def _near(
        self, events_E: np.ndarray, own_H: np.ndarray, *, damping: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The items near any of some events, sorted [U], and their scores by event [E, U]."""
        begins_E, ends_E = self.starts_N1[events_E], self.starts_N1[events_E + 1]
        rows = [np.arange(a, b) for a, b in zip(begins_E.tolist(), ends_E.tolist(), strict=True)]
        row_X = np.concatenate([np.empty(0, np.int64), *rows])
        items_U, column_X = np.unique(self.items_P[row_X], return_inverse=True)
        event_X = np.repeat(np.arange(len(events_E)), ends_E - begins_E)
        counts_EU = np.zeros((len(events_E), len(items_U)))
        counts_EU[event_X, column_X] = self.counts_P[row_X]
        at_H, is_there_H = _places(items_U, own_H)
        mine_EH = (events_E[:, None] == own_H) @ _pair_weights(len(own_H))
        for place in np.flatnonzero(is_there_H):
            counts_EU[:, at_H[place]] -= mine_EH[:, place]
        # What is left of a count that was all one's own is rounding.
        counts_EU[counts_EU <= _ROUNDING] = 0.0
        if damping:
            others_U = self.events_N[items_U].astype(np.float64)
            np.subtract.at(others_U, at_H[is_there_H], 1)
            counts_EU /= (np.maximum(others_U, 0) + 1) ** damping
        return items_U, counts_EU

    def typical_best(self, *, damping: float = 0.5) -> float:
        """The median score of an item's best neighbour: what a strong tie is in this catalogue."""
        rows_N = np.flatnonzero(np.diff(self.starts_N1))
        scores_P = self.counts_P / (self.events_N[self.items_P].astype(np.float64) + 1) ** damping
        best = np.maximum.reduceat(scores_P, self.starts_N1[rows_N]) if len(rows_N) else [1.0]
        return float(np.median(best))

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


def _places(sorted_U: np.ndarray, wanted_H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in a sorted array some items are, and whether they are there at all."""
    at_H = np.searchsorted(sorted_U, wanted_H)
    at_H = np.minimum(at_H, max(len(sorted_U) - 1, 0))
    return at_H, sorted_U[at_H] == wanted_H if len(sorted_U) else np.zeros(len(at_H), bool)


@cache
def _pair_weights(length: int) -> np.ndarray:
    """What a sequence adds to the counts: float64 [H, H], from the row's event to the column's."""
    distance_HH = np.arange(length) - np.arange(length)[:, None]
    near_HH = (distance_HH != 0) & (abs(distance_HH) <= WINDOW)
    weights_HH = np.where(distance_HH > 0, 1.0, BACKWARD) / np.maximum(abs(distance_HH), 1)
    return np.where(near_HH, weights_HH, 0.0)


def _best(items_U: np.ndarray, scores_U: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k items of the highest scores above 0, of equal ones the lower index first."""
    floor = np.partition(scores_U, -k)[-k] if len(scores_U) > k else 0.0
    found = np.flatnonzero((scores_U >= floor) & (scores_U > 0))
    best = found[np.argsort(-scores_U[found], kind="stable")[:k]]
    return items_U[best], scores_U[best]


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
