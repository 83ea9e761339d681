"""The pruned context of a target: the history items that say most about it.

OneRec-Think (arXiv 2510.11639, §3.2): of all that a user did, the k items closest to the target by
cosine of item vectors, in order of time. A rationale is written from these, and trained after the
raw history.

    vectors_ND = read_vectors(run / "sids" / "embeddings.safetensors")
    prune(history, target, vectors_ND=vectors_ND)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open


def read_vectors(path: Path) -> np.ndarray:
    """Item vectors [N, D] that `whyrec index` wrote, float32, each of length 1 (or 0).

    Raises:
        ValueError: when the file is missing or is not one that `whyrec index` wrote.
    """
    try:
        with safe_open(path, framework="np") as file:
            vectors_ND = file.get_tensor("vectors_ND").astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} holds no item vectors ({error}); run `whyrec index` for this run first"
        ) from None
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-9)


def prune(history: Sequence[int], target: int, *, vectors_ND: np.ndarray, k: int = 10) -> list[int]:
    """The k history items most like the target, oldest first; newer ones where two are equal.

    Args:
        history: item indices, oldest first.
        target: item index.
        vectors_ND: of length 1, as `read_vectors` gives them.
        k: how many at most.
    """
    items_H = np.asarray(history, dtype=np.int64)
    # Once an item: the same product may round differently in another row.
    unique, place_H = np.unique(items_H, return_inverse=True)
    cosines_H = (vectors_ND[unique] @ vectors_ND[target])[place_H]
    newest_first_H = np.arange(len(items_H))[::-1]
    order_H = newest_first_H[np.argsort(-cosines_H[::-1], kind="stable")]
    return items_H[np.sort(order_H[:k])].tolist()
