"""Every item one SID and every SID one item, always, with geometry down to the last level.

TIGER (arXiv 2305.05065) numbers the items that share L - 1 codes 0, 1, 2, …: the last code then
means nothing. Here the last level is a codebook like the others, and SIDs are made unique by
walking the levels from the top with capacities. A prefix of d codes has room for
K_d · … · K_{L-1} items. Where a code's subtree is full, the items nearest to the code stay and the
others spill to the next nearest code with room. At the last level the room is one item; each group
of items that collide there gets its codes by the assignment of least total distance (Kuhn 1955).
Only overfull cells take the slow path; without a collision the SIDs are those of `encode`.

    codes_NL = assign_unique(vectors_ND, quantizer)
    more_ML = assign_new(new_vectors_MD, codes_NL, quantizer)   # codes_NL stay what they are
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from whyrec.sid.capacity import place, rank_in_cell
from whyrec.sid.kmeans import nearest_codes, squared_distances
from whyrec.sid.quantizers import Quantizer

LastLevel = Literal["nearest", "index"]
_CHUNK_ELEMENTS = 1 << 24  # of a distance matrix: 64 MiB
EXACT_GROUP = 2_000  # larger groups of colliding items are resolved greedily


def assign_unique(
    vectors_ND: Tensor, quantizer: Quantizer, *, last_level: LastLevel = "nearest"
) -> Tensor:
    """Unique SIDs for a whole catalogue: codes_NL int64 on the CPU.

    Args:
        vectors_ND: item vectors.
        quantizer: fitted.
        last_level: "nearest" as above, or "index" for TIGER's numbering in item order.

    Raises:
        ValueError: when there are more items than SIDs.
    """
    num_levels = len(quantizer.level_sizes)
    nothing_taken = np.zeros((0, num_levels), dtype=np.int64)
    return _walk(vectors_ND, quantizer, nothing_taken, balance=True, last_level=last_level)


def assign_new(
    new_vectors_MD: Tensor,
    taken_codes_NL: Tensor,
    quantizer: Quantizer,
    *,
    last_level: LastLevel = "nearest",
) -> Tensor:
    """SIDs for new items, by the same rule, out of those not yet taken: codes_ML int64.

    With `last_level="index"` a new item gets the lowest free number of its group.

    Raises:
        ValueError: when the new items do not fit beside the old ones.
    """
    taken = taken_codes_NL.cpu().numpy().astype(np.int64)
    return _walk(new_vectors_MD, quantizer, taken, balance=False, last_level=last_level)


def check_room(num_items: int, level_sizes: Sequence[int]) -> None:
    """Raise ValueError when there are more items than SIDs."""
    room = math.prod(level_sizes)
    if num_items > room:
        raise ValueError(
            f"{num_items:,} items do not fit into the {room:,} SIDs of level_sizes "
            f"{list(level_sizes)}; add a level or make the levels larger"
        )


def _walk(
    vectors_ND: Tensor,
    quantizer: Quantizer,
    taken_ML: np.ndarray,
    *,
    balance: bool,
    last_level: LastLevel,
) -> Tensor:
    sizes = quantizer.level_sizes
    check_room(len(vectors_ND) + len(taken_ML), sizes)
    residual_ND = quantizer.latents(vectors_ND)
    codes_NL = np.zeros((len(vectors_ND), len(sizes)), dtype=np.int64)
    # prefixes as small whole numbers, the same for new and for taken items
    parent_N = np.zeros(len(vectors_ND), dtype=np.int64)
    taken_parent_M = np.zeros(len(taken_ML), dtype=np.int64)
    for level, size in enumerate(sizes):
        if not len(vectors_ND):
            break
        codebook_KD = quantizer.codebooks[level].to(residual_ND.device)
        last = level == len(sizes) - 1
        if last and last_level == "index":
            # all codes at one distance: places are given in item order, lowest number first
            codebook_KD = torch.zeros_like(codebook_KD)
        if balance and not (last and last_level == "index"):
            wish_N = quantizer.choose(residual_ND, level=level)
        else:
            wish_N, _ = nearest_codes(residual_ND, codebook_KD)
        code_N = _fit_into_cells(
            residual_ND,
            codebook_KD,
            wish_N.cpu().numpy(),
            parent_N,
            taken_parent_M * size + taken_ML[:, level],
            capacity=math.prod(sizes[level + 1 :]),
            indexed=last and last_level == "index",
        )
        codes_NL[:, level] = code_N
        residual_ND = residual_ND - codebook_KD[torch.from_numpy(code_N).to(residual_ND.device)]
        cells = np.concatenate(
            [parent_N * size + code_N, taken_parent_M * size + taken_ML[:, level]]
        )
        small = np.unique(cells, return_inverse=True)[1]
        parent_N, taken_parent_M = small[: len(code_N)], small[len(code_N) :]
    return torch.from_numpy(codes_NL)


def _fit_into_cells(
    residual_ND: Tensor,
    codebook_KD: Tensor,
    wish_N: np.ndarray,
    parent_N: np.ndarray,
    taken_cell_M: np.ndarray,
    *,
    capacity: int,
    indexed: bool,
) -> np.ndarray:
    """One level: the wished code wherever its cell (parent, code) has room for all who wish it."""
    size = len(codebook_KD)
    cell_N = parent_N * size + wish_N
    cells, cell_index_N, wishes = np.unique(cell_N, return_inverse=True, return_counts=True)
    taken_cell_M = np.sort(taken_cell_M)
    room = capacity - (
        np.searchsorted(taken_cell_M, cells, side="right") - np.searchsorted(taken_cell_M, cells)
    )
    overfull = wishes > room
    code_N = wish_N.copy()
    if not overfull.any():
        return code_N

    crowded = np.unique(cells[overfull] // size)
    rows = np.flatnonzero(np.isin(parent_N, crowded))
    rows = rows[np.argsort(parent_N[rows], kind="stable")]
    groups = np.split(rows, np.flatnonzero(np.diff(parent_N[rows])) + 1)
    room_by_item_N = room[cell_index_N]
    spans = np.array([[p * size, (p + 1) * size] for p in (parent_N[g[0]] for g in groups)])
    bounds = np.searchsorted(taken_cell_M, spans)
    progress = tqdm(total=len(groups), desc="collisions", unit="group", disable=len(groups) < 2_000)
    for g, (group, distance_nK) in enumerate(_distances(residual_ND, groups, codebook_KD)):
        first, last = bounds[g]
        taken_K = np.bincount(taken_cell_M[first:last] - spans[g, 0], minlength=size)
        if indexed:
            code_N[group] = np.flatnonzero(taken_K == 0)[: len(group)]
        elif capacity == 1 and len(group) <= EXACT_GROUP:
            free = np.flatnonzero(taken_K == 0)
            code_N[group] = free[linear_sum_assignment(distance_nK[:, free])[1]]
        else:
            wish_n = wish_N[group]
            distance_n = distance_nK[np.arange(len(group)), wish_n]
            stays = rank_in_cell(wish_n, distance_n) < room_by_item_N[group]
            free_K = capacity - taken_K - np.bincount(wish_n[stays], minlength=size)
            code_N[group[~stays]] = place(distance_nK[~stays], free_K)
        progress.update()
    progress.close()
    return code_N


def _distances(
    residual_ND: Tensor, groups: Sequence[np.ndarray], codebook_KD: Tensor
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each group of rows with its squared distances [n, K], computed for many groups at once."""
    most_rows = max(1, _CHUNK_ELEMENTS // len(codebook_KD))
    ends = np.cumsum([len(group) for group in groups])
    start = 0
    while start < len(groups):
        done = ends[start] - len(groups[start])
        stop = max(start + 1, int(np.searchsorted(ends, done + most_rows, side="right")))
        rows = torch.from_numpy(np.concatenate(groups[start:stop])).to(residual_ND.device)
        distance_BK = squared_distances(residual_ND[rows], codebook_KD).cpu().numpy()
        yield from zip(
            groups[start:stop],
            np.split(distance_BK, ends[start : stop - 1] - done),
            strict=True,
        )
        start = stop
