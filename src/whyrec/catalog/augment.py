"""A history as it might have been: some events left out, the others a little out of order.

Alignment shows no history twice the same (`train/mix.py`).
"""

import numpy as np


def altered(
    events: np.ndarray, rng: np.random.Generator, *, drop: float, jitter: float, least: int
) -> np.ndarray:
    """Some events, in nearly their order.

    Args:
        events: item indices, oldest first.
        rng: of the draws.
        drop: share of the events that is left out.
        jitter: how many places events may change against each other, at most; how much is drawn.
        least: where fewer would be left, the newest so many are kept instead.
    """
    kept = np.flatnonzero(rng.random(len(events)) >= drop)
    events = events[kept] if len(kept) >= least else events[-least:]
    places = np.arange(len(events)) + rng.random() * jitter * rng.random(len(events))
    return events[np.argsort(places, kind="stable")]
