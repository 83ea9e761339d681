"""One beam search as the engine is asked for it, and what it is checked against.

Every number is checked here, in the API server: one that is out of range would be a device-side
assertion, which kills a CUDA worker and with it everybody's requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MAX_WIDTH = 512


@dataclass(frozen=True)
class BeamRequest:
    """One beam search.

    Attributes:
        prompt_ids: token ids, ending in `<|sid_begin|>`.
        width: beam width, at least `k`.
        k: how many items are wanted.
        excluded: item indices that must not come.
        allowed: item indices, of which all others must not come; None allows all.
        prefixes: beginnings of SIDs, as codes, to stay inside; None allows all.
        catalogue: the version that the item indices belong to; None is the newest.
    """

    prompt_ids: list[int]
    width: int
    k: int
    excluded: list[int] = field(default_factory=list)
    allowed: list[int] | None = None
    prefixes: list[list[int]] | None = None
    catalogue: int | None = None


@dataclass(frozen=True)
class CatalogueInfo:
    """What requests are checked against.

    Attributes:
        version: of the catalogue.
        num_items: items that a beam can return.
        level_sizes: codes of each level.
        vocab_size: token ids are below it.
        max_prompt: tokens that a prompt may have.
    """

    version: int
    num_items: int
    level_sizes: list[int]
    vocab_size: int
    max_prompt: int


def check_beam(request: BeamRequest, info: CatalogueInfo) -> None:
    """ValueError for a request that the worker must not see.

    Args:
        request: what was asked for.
        info: of its version of the catalogue.
    """
    if not 1 <= request.width <= MAX_WIDTH:
        raise ValueError(f"the beam width must lie in 1 .. {MAX_WIDTH}, not {request.width}")
    if not 1 <= request.k <= request.width:
        raise ValueError(f"k must lie in 1 .. {request.width}, the beam width, not {request.k}")
    if not 1 <= len(request.prompt_ids) <= info.max_prompt:
        raise ValueError(
            f"the prompt has {len(request.prompt_ids)} tokens; this server takes 1 to "
            f"{info.max_prompt}"
        )
    check_ids("prompt", request.prompt_ids, stop=info.vocab_size)
    check_ids("excluded", request.excluded, stop=info.num_items)
    check_ids("allowed", request.allowed or [], stop=info.num_items)
    prefixes = request.prefixes or []
    if any(len(prefix) > len(info.level_sizes) for prefix in prefixes):
        raise ValueError(f"a SID has {len(info.level_sizes)} codes, a prefix no more")
    for level, size in enumerate(info.level_sizes):
        codes = [prefix[level] for prefix in prefixes if len(prefix) > level]
        check_ids("prefixes", codes, stop=size)


def check_ids(name: str, ids: Sequence[int], *, stop: int) -> None:
    """ValueError for a number outside 0 .. stop - 1."""
    if not ids:
        return
    numbers = np.asarray(ids)
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise ValueError(f"{name} must be a list of whole numbers")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= stop:
        raise ValueError(f"{name} holds {low if low < 0 else high}, outside 0 .. {stop - 1}")
