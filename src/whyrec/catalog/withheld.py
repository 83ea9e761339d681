"""Items whose text alignment never shows, so that captions of them can be tested honestly."""

import zlib
from collections.abc import Sequence

import numpy as np

from whyrec.catalog.dataset import Item


def withheld(items: Sequence[Item], *, share: float) -> np.ndarray:
    """Which items are withheld: bool [N], a fixed choice by item id, whatever the catalogue.

    Their SIDs stand in histories as all others do; what they are called is never told.

    Args:
        items: the catalogue.
        share: of the items, about.

    >>> withheld([Item(str(i)) for i in range(8)], share=0.5).astype(int).tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]
    """
    draws_N = np.array([zlib.crc32(item.item_id.encode()) for item in items], dtype=np.uint64)
    return draws_N < share * 2**32
