"""Which items are alike by the words of their titles and brands.

    cosine(i, j) = tfidf(i) · tfidf(j)          over words, weights 1 + log tf, each of length 1
    score(j | i) = cosine(i, j)² · (events of j + 1) ** popularity

(Salton & Buckley 1988). Counts (`catalog/covisits.py`) say nothing of an item that few have chosen
yet; its words do: the same brand, the same series, the refill of what somebody has.

Dimensions: N items, K nearest, H events of a user.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm import tqdm

from whyrec.catalog.dataset import Item, write_table

POPULARITY = 0.25
_KEPT = 32  # nearest of an item that are kept
_BLOCK = 512  # items compared with all others at once
# Scripts that put no space between words: each sign is one.
_SIGNS = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[^\W_{_SIGNS}]+|[{_SIGNS}]")


@dataclass(frozen=True)
class Alike:
    """The nearest items of each.

    Attributes:
        near_NK: int32, best first; -1 where there are fewer.
        cosines_NK: float32; 0 where there is none.
    """

    near_NK: np.ndarray
    cosines_NK: np.ndarray

    @classmethod
    def measure(cls, items: Sequence[Item], *, kept: int = _KEPT) -> "Alike":
        """Compare all items with all others; those without words are like none.

        Args:
            items: N items.
            kept: K at most.
        """
        kept = min(kept, max(len(items) - 1, 0))
        near_NK = np.full((len(items), kept), -1, dtype=np.int32)
        cosines_NK = np.zeros((len(items), kept), dtype=np.float32)
        alike, weights_NV = cls(near_NK, cosines_NK), word_weights(items)
        starts = range(0, len(items), _BLOCK)
        for start in tqdm(
            starts, desc="alike", unit="block", leave=False, disable=len(starts) < 100
        ):
            alike._compare(weights_NV, np.arange(start, min(start + _BLOCK, len(items))))
        return alike

    def joined(self, items: Sequence[Item], *, new: Sequence[int]) -> "Alike":
        """The same with some items measured anew against all, and put where they belong.

        What was measured of the others among themselves stays, though a few words have become a
        little more common. It costs what the new items cost.

        Args:
            items: the catalogue, in the order of the rows.
            new: rows of items that are new, or have other words now.
        """
        if not self.near_NK.shape[1]:
            return self
        near_NK, cosines_NK = self.near_NK.copy(), self.cosines_NK.copy()
        stale_NK = np.isin(near_NK, new)
        near_NK[stale_NK], cosines_NK[stale_NK] = -1, 0.0
        weights_NV = word_weights(items)
        for start in range(0, len(new), _BLOCK):
            rows_B = np.asarray(new[start : start + _BLOCK])
            pairs = Alike(near_NK, cosines_NK)._compare(weights_NV, rows_B).tocoo()
            old_P = ~np.isin(pairs.col, new)
            others_P, cosines_P = pairs.col[old_P].tolist(), pairs.data[old_P].tolist()
            items_P = rows_B[pairs.row[old_P]].tolist()
            for item, other, cosine in zip(items_P, others_P, cosines_P, strict=True):
                worst = int(cosines_NK[other].argmin())
                if cosine > cosines_NK[other, worst]:
                    near_NK[other, worst], cosines_NK[other, worst] = item, cosine
        order_NK = np.lexsort((near_NK, -cosines_NK), axis=1)
        return Alike(
            np.take_along_axis(near_NK, order_NK, axis=1),
            np.take_along_axis(cosines_NK, order_NK, axis=1),
        )

    def _compare(self, weights_NV: sparse.csr_matrix, items_B: np.ndarray) -> sparse.csr_matrix:
        """Write the nearest of some items into their rows; their cosines with all items [B, N]."""
        found_BN = (weights_NV[items_B] @ weights_NV.T).tocsr()
        kept = self.near_NK.shape[1]
        for row, item in enumerate(items_B.tolist()):
            best, cosines = _nearest(found_BN, row, item=item, kept=kept)
            self.near_NK[item], self.cosines_NK[item] = -1, 0.0
            self.near_NK[item, : len(best)], self.cosines_NK[item, : len(best)] = best, cosines
        return found_BN

    def beside(
        self,
        history: Sequence[int],
        *,
        k: int,
        events_N: np.ndarray,
        own: Sequence[int] | np.ndarray | None = None,
        last: int | None = None,
        popularity: float = POPULARITY,
    ) -> list[np.ndarray]:
        """For each event of a history the items that are most like it and liked, best first.

        Args:
            history: item indices, oldest first; an event and those before it are none of its own.
            k: items of an event at most.
            events_N: training events of each item.
            own: the user's training sequence, whose events do not count; the history itself when
                None.
            last: of how many of the newest events; None for all.
            popularity: power of an item's events; 0 leaves the cosines alone.

        Returns:
            For each of those events its items, fewer than k where few share any word with it, none
            for an event that is newer than the measurement.

        Example:
            >>> shampoo, refill, comb = (Item(t, t) for t in ("blue shampoo", "shampoo", "comb"))
            >>> Alike.measure([shampoo, refill, comb]).beside([0, 2], k=2, events_N=np.zeros(3))
            [array([1], dtype=int32), array([], dtype=int32)]
        """
        history_H = np.asarray(history, dtype=np.int64)
        first = 0 if last is None else max(0, len(history_H) - last)
        places_E = np.arange(first, len(history_H))
        known_E = history_H[places_E] < len(self.near_NK)
        rows_E = np.where(known_E, history_H[places_E], 0)
        if not len(self.near_NK) or not len(rows_E):
            return [np.empty(0, np.int32)] * len(rows_E)
        near_EK = np.where(known_E[:, None], self.near_NK[rows_E], -1)
        had_EKH = near_EK[..., None] == history_H
        before_EH = np.arange(len(history_H)) <= places_E[:, None]
        barred_EK = (near_EK < 0) | (had_EKH & before_EH[:, None]).any(-1)
        is_own = had_EKH if own is None else near_EK[..., None] == np.asarray(own)
        others_EK = np.maximum(events_N[near_EK] - is_own.sum(-1), 0)
        scores_EK = liked(self.cosines_NK[rows_E], others_EK, popularity=popularity)
        scores_EK[barred_EK] = -1.0
        order_EK = np.argsort(-scores_EK, axis=1, kind="stable")[:, :k]
        counts_E = np.minimum(k, (~barred_EK).sum(1))
        best_EK = np.take_along_axis(near_EK, order_EK, axis=1)
        return [best_K[:count] for best_K, count in zip(best_EK, counts_E, strict=True)]

    def save(self, path: Path, *, item_ids: Sequence[str]) -> None:
        """Write Parquet, one row an item: its id, and rows and cosines of its nearest."""
        columns = {
            "item_id": pa.array(item_ids, pa.string()),
            "near": pa.array(self.near_NK.tolist(), pa.list_(pa.int32())),
            "cosines": pa.array(self.cosines_NK.tolist(), pa.list_(pa.float32())),
        }
        write_table(path, pa.table(columns))

    @classmethod
    def load(cls, path: Path, *, item_ids: Sequence[str]) -> "Alike":
        """Read what `save` wrote, for a catalogue that may have gained and lost items since.

        Args:
            path: the file.
            item_ids: of the catalogue; new items are like none, lost ones are nobody's.

        Raises:
            ValueError: when it is not there, or damaged.
        """
        try:
            table = pq.read_table(path)
            known = table["item_id"].to_pylist()
            near_RK = np.array(table["near"].to_pylist(), dtype=np.int64).reshape(len(known), -1)
            cosines_RK = np.array(table["cosines"].to_pylist(), np.float32).reshape(near_RK.shape)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"cannot read which items are alike from {path} ({error}); copy the model folder "
                "again, or train it again"
            ) from None
        place = {item_id: index for index, item_id in enumerate(item_ids)}
        index_R = np.array([place.get(item_id, -1) for item_id in known], dtype=np.int64)
        near_NK = np.full((len(item_ids), near_RK.shape[1]), -1, dtype=np.int32)
        cosines_NK = np.zeros(near_NK.shape, dtype=np.float32)
        here_R = index_R >= 0
        # -1, which is no item, finds the -1 behind the last one.
        near_NK[index_R[here_R]] = np.append(index_R, -1)[near_RK[here_R]]
        cosines_NK[index_R[here_R]] = cosines_RK[here_R]
        return cls(near_NK, np.where(near_NK >= 0, cosines_NK, 0))


def liked(cosines: np.ndarray, events: np.ndarray, *, popularity: float = POPULARITY) -> np.ndarray:
    """The score of the head of this file, float64, for arrays of one shape."""
    return cosines.astype(np.float64) ** 2 * (events + 1) ** popularity


def word_weights(items: Sequence[Item]) -> sparse.csr_matrix:
    """TF-IDF of the words of titles and brands: float32 [N, V], rows of length 1, or 0 if empty."""
    words = [_WORD.findall(f"{item.brand} {item.title}".lower()) for item in items]
    if not any(words):
        return sparse.csr_matrix((len(items), 1), dtype=np.float32)
    vectorizer = TfidfVectorizer(analyzer=list, sublinear_tf=True, dtype=np.float32)
    return vectorizer.fit_transform(words).tocsr()


def _nearest(
    found_BN: sparse.csr_matrix, row: int, *, item: int, kept: int
) -> tuple[np.ndarray, np.ndarray]:
    """The items of the highest cosines in a row, of equal ones the lower index first."""
    begin, end = found_BN.indptr[row], found_BN.indptr[row + 1]
    others, cosines = found_BN.indices[begin:end], found_BN.data[begin:end]
    order = np.lexsort((others, -cosines))[: kept + 1]
    order = order[others[order] != item][:kept]
    return others[order], cosines[order]
