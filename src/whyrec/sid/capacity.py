"""Put items into cells that hold only so many: the nearest stay, others move to where room is."""

import numpy as np


def rank_in_cell(cell_n: np.ndarray, distance_n: np.ndarray) -> np.ndarray:
    """Rank of every item within its cell, the nearest first; ties go by item order."""
    order = np.lexsort((distance_n, cell_n))  # stable, so equal distances keep their order
    in_order = cell_n[order]
    first = np.ones(len(cell_n), dtype=bool)
    first[1:] = in_order[1:] != in_order[:-1]
    position = np.arange(len(cell_n))
    start = np.maximum.accumulate(np.where(first, position, 0))
    rank_n = np.empty(len(cell_n), dtype=np.int64)
    rank_n[order] = position - start
    return rank_n


def place(distance_nK: np.ndarray, free_K: np.ndarray) -> np.ndarray:
    """One cell for each of n items: the nearest that is still free, in rounds.

    In a round every unplaced item asks for the nearest cell that has room, and a cell takes those
    nearest to it. A round that leaves items over has filled a cell, so there are at most K rounds.

    Args:
        distance_nK: of n items to K cells.
        free_K: how many items each cell can take; they sum to n at least.

    Returns:
        Cell of each item, int64 [n].
    """
    assert free_K.sum() >= len(distance_nK), "more items than free places"
    free_K = free_K.astype(np.int64)
    cell_n = np.full(len(distance_nK), -1, dtype=np.int64)
    pending = np.arange(len(distance_nK))
    open_nK = np.where(free_K > 0, distance_nK, np.inf)  # a copy
    while pending.size:
        wish = open_nK.argmin(axis=1)
        taken = rank_in_cell(wish, open_nK[np.arange(len(wish)), wish]) < free_K[wish]
        cell_n[pending[taken]] = wish[taken]
        free_K = free_K - np.bincount(wish[taken], minlength=len(free_K))
        pending, open_nK = pending[~taken], open_nK[~taken]
        open_nK[:, free_K == 0] = np.inf
    return cell_n
