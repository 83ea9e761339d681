"""How a catalogue lies in its SIDs: balance of the codes, collisions of prefixes, a map.

for cell in shared_prefixes(catalogue):
    print(cell.depth, cell.sharing)
"""

from dataclasses import dataclass

import numpy as np

from whyrec.evaluation.codes import Catalogue
from whyrec.sid.report import code_entropy


@dataclass(frozen=True)
class Balance:
    """How evenly a level's codes are used.

    Attributes:
        level, size: which level, and how many codes it has.
        used: codes that at least one item has.
        entropy: of the codes' use / log(size); 1 where all are used alike.
        counts_K: items by code.
    """

    level: int
    size: int
    used: int
    entropy: float
    counts_K: np.ndarray


@dataclass(frozen=True)
class Cells:
    """Items that agree in their first codes: collisions, as long as codes are left.

    Attributes:
        depth: how many first codes.
        cells: distinct prefixes in use.
        sharing: share of the items that another item shares the prefix with.
        largest: prefix and items of the largest cell.
    """

    depth: int
    cells: int
    sharing: float
    largest: tuple[tuple[int, ...], list[int]]


def level_balance(catalogue: Catalogue) -> list[Balance]:
    """How evenly each level's codes are used."""
    found = []
    for level, size in enumerate(catalogue.level_sizes):
        counts_K = np.bincount(catalogue.codes_NL[:, level], minlength=size)
        entropy = code_entropy(catalogue.codes_NL[:, level], size)
        found.append(Balance(level, size, int((counts_K > 0).sum()), entropy, counts_K))
    return found


def shared_prefixes(catalogue: Catalogue) -> list[Cells]:
    """For each number of first codes, how many items cannot be told apart by them."""
    found = []
    for depth in range(1, catalogue.codes_NL.shape[1] + 1):
        prefixes, cell_N, size_C = np.unique(
            catalogue.codes_NL[:, :depth], axis=0, return_inverse=True, return_counts=True
        )
        largest = int(size_C.argmax())
        sharing = float(size_C[size_C > 1].sum() / len(cell_N))
        members = np.flatnonzero(cell_N.ravel() == largest).tolist()
        found.append(
            Cells(depth, len(size_C), sharing, (tuple(prefixes[largest].tolist()), members))
        )
    return found


def map_2d(vectors_ND: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Items in the plane of their vectors' two largest principal components.

    Returns:
        xy_N2, and the share of the variance along each axis. Signs are fixed: the largest entry of
        an axis is positive.
    """
    centred_ND = vectors_ND - vectors_ND.mean(0)
    covariance_DD = centred_ND.T.astype(np.float64) @ centred_ND
    values_D, axes_DD = np.linalg.eigh(covariance_DD)
    axes_D2 = axes_DD[:, ::-1][:, :2]
    axes_D2 = axes_D2 * np.sign(axes_D2[np.abs(axes_D2).argmax(0), [0, 1]])
    shares = values_D[::-1][:2] / max(values_D.sum(), 1e-12)
    return centred_ND @ axes_D2, (float(shares[0]), float(shares[1]))
