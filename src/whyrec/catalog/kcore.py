"""The k-core of a log: the largest part in which every user and every item has k events."""

import numpy as np


def k_core(users_E: np.ndarray, items_E: np.ndarray, *, k: int) -> np.ndarray:
    """Which events belong to the k-core, as a bool mask [E].

    Users and items with fewer than `k` events are dropped in turn until none is left; the result
    does not depend on the order. Repeated events count each time. `k` of 0 or 1 keeps everything.

    Example:
        >>> k_core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2]), k=2)
        array([ True,  True,  True,  True, False])
    """
    if k < 0:
        raise ValueError(f"k_core must be 0 (off) or more, not {k}")
    keep_E = np.ones(len(users_E), bool)
    if k <= 1:
        return keep_E
    while True:
        kept = np.flatnonzero(keep_E)
        users, items = users_E[kept], items_E[kept]
        stays = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if stays.all():
            return keep_E
        keep_E[kept[~stays]] = False
