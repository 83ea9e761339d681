"""Ranking metrics with bootstrap intervals, over the whole catalogue.

Every example has one target. With the target at rank r (1 = first) of its list,

    R@k = [r <= k]      N@k = [r <= k] / log2(r + 1)      MRR@k = [r <= k] / r

and 0 where the list lacks the target. The lists are rankings of *all* items: metrics over sampled
negatives do not order models as full ranking does (Krichene & Rendle, KDD 2020). Intervals are
95 % percentile bootstrap intervals over examples (Efron & Tibshirani 1993).

    figures = ranking_figures(ranked_EK, targets_E, num_items=12101, prefix="sasrec/test/excluded")
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

CUTOFFS = (5, 10, 20)
_ENDS = (2.5, 97.5)


class Gain(NamedTuple):
    """Model a over model b: mean(a) - mean(b), the same as a share of mean(b), and 95 % ends."""

    difference: float
    difference_low: float
    difference_high: float
    relative: float
    relative_low: float
    relative_high: float


def target_ranks(ranked_EK: np.ndarray, targets_E: np.ndarray) -> np.ndarray:
    """The 1-based rank of each example's target in its list, 0 where the list lacks it."""
    ranked_EK, targets_E = np.asarray(ranked_EK), np.asarray(targets_E)
    if ranked_EK.ndim != 2 or targets_E.shape != ranked_EK.shape[:1]:
        raise ValueError(
            f"one ranked list per target is needed, but the lists have shape {ranked_EK.shape} "
            f"and the targets {targets_E.shape}"
        )
    if len(targets_E) == 0:
        raise ValueError("there is no example to evaluate; choose a split that holds some")
    found_EK = ranked_EK == targets_E[:, None]
    return np.where(found_EK.any(axis=1), found_EK.argmax(axis=1) + 1, 0)


def ranking_metrics(
    ranked_EK: np.ndarray, targets_E: np.ndarray, *, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, np.ndarray]:
    """R@k, N@k and MRR@k of every example.

    Args:
        ranked_EK: item indices, best first; -1 where there is nothing.
        targets_E: the item index to be found.
        cutoffs: each at most K.

    Returns:
        name → float64 [E], e.g. `R@10`, `N@10`, `MRR@10`; `MRR` stands for the largest cutoff.

    Raises:
        ValueError: for no examples, lists that do not fit the targets, or a cutoff beyond K.

    Example:
        >>> metrics = ranking_metrics(np.array([[4, 7, 1]]), np.array([7]), cutoffs=(1, 3))
        >>> metrics["R@1"], metrics["R@3"], metrics["MRR"]
        (array([0.]), array([1.]), array([0.5]))
    """
    ranks_E = target_ranks(ranked_EK, targets_E)
    if max(cutoffs) > ranked_EK.shape[1]:
        raise ValueError(
            f"metrics at {max(cutoffs)} need lists of that length, not of {ranked_EK.shape[1]}; "
            "rank more items or lower the cutoffs"
        )
    safe_E = np.maximum(ranks_E, 1)
    metrics: dict[str, np.ndarray] = {}
    for k in sorted(cutoffs):
        hit_E = ((ranks_E > 0) & (ranks_E <= k)).astype(np.float64)
        metrics[f"R@{k}"] = hit_E
        metrics[f"N@{k}"] = hit_E / np.log2(safe_E + 1)
        metrics[f"MRR@{k}"] = hit_E / safe_E
    metrics["MRR"] = metrics[f"MRR@{max(cutoffs)}"]
    return metrics


def bootstrap_interval(
    values_E: np.ndarray, *, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean.

    Drawing E examples with replacement and counting how often each distinct value comes is a
    multinomial draw over the distinct values, of which rank metrics have at most K + 1.
    """
    values_V, counts_V = np.unique(np.asarray(values_E, dtype=np.float64), return_counts=True)
    draws_SV = _multinomial(counts_V, samples=samples, seed=seed)
    low, high = np.percentile(draws_SV @ values_V / counts_V.sum(), _ENDS)
    return float(low), float(high)


def paired_gain_interval(
    a_E: np.ndarray, b_E: np.ndarray, *, samples: int = 1000, seed: int = 0
) -> Gain:
    """How much better a is than b on the same examples, with paired 95 % intervals.

    Both models are resampled together, so that what is hard for both does not widen the interval.
    Resamples in which b never hits have no relative gain and are left out of its interval.

    Raises:
        ValueError: when the two differ in length, or b is zero everywhere.
    """
    a_E, b_E = np.asarray(a_E, dtype=np.float64), np.asarray(b_E, dtype=np.float64)
    if a_E.shape != b_E.shape:
        raise ValueError(
            f"a paired comparison needs the same examples for both models, "
            f"not {len(a_E)} and {len(b_E)}"
        )
    if not b_E.any():
        raise ValueError("there is no relative gain over a model that never hits")
    pairs_V2, counts_V = np.unique(np.stack([a_E, b_E], axis=1), axis=0, return_counts=True)
    draws_SV = _multinomial(counts_V, samples=samples, seed=seed)
    means_S2 = draws_SV @ pairs_V2 / counts_V.sum()
    difference_S = means_S2[:, 0] - means_S2[:, 1]
    defined_S = means_S2[:, 1] > 0
    relative_S = difference_S[defined_S] / means_S2[defined_S, 1]
    difference = float(a_E.mean() - b_E.mean())
    low, high = np.percentile(difference_S, _ENDS)
    relative_low, relative_high = np.percentile(relative_S, _ENDS)
    return Gain(
        difference=difference,
        difference_low=float(low),
        difference_high=float(high),
        relative=difference / float(b_E.mean()),
        relative_low=float(relative_low),
        relative_high=float(relative_high),
    )


def coverage(ranked_EK: np.ndarray, num_items: int, cutoff: int = 10) -> float:
    """The share of the catalogue that is recommended to someone within the first `cutoff`."""
    exposure_N = _exposure(ranked_EK, num_items, cutoff).sum(axis=0)
    return float(_coverage(exposure_N[None])[0])


def gini(ranked_EK: np.ndarray, num_items: int, cutoff: int = 10) -> float:
    """Gini coefficient of the items' exposure within the first `cutoff`, over the whole catalogue.

    0 = every item is shown equally often; near 1 = a few items are shown to everybody. Items that
    nobody sees count with exposure 0.
    """
    exposure_N = _exposure(ranked_EK, num_items, cutoff).sum(axis=0)
    return float(_gini(exposure_N[None])[0])


def legal_share(
    ranked_EK: np.ndarray, num_items: int, *, available_E: np.ndarray | None = None
) -> np.ndarray:
    """Per list, the share of its places that hold an item of the catalogue not named before.

    A place left empty (-1) is not legal, since the model owed an item there; but no more than
    the available items were owed.

    Args:
        ranked_EK: item indices, best first; -1 where there is nothing.
        num_items: size of the catalogue.
        available_E: how many items may be recommended to each user; the whole catalogue when None.

    Returns:
        float64 [E]; 1 where nothing was owed.
    """
    ranked_EK = np.asarray(ranked_EK)
    order_EK = np.argsort(ranked_EK, axis=1, kind="stable")
    sorted_EK = np.take_along_axis(ranked_EK, order_EK, axis=1)
    fresh_EK = np.ones(ranked_EK.shape, dtype=bool)
    fresh_EK[:, 1:] = sorted_EK[:, 1:] != sorted_EK[:, :-1]
    legal_E = (fresh_EK & (sorted_EK >= 0) & (sorted_EK < num_items)).sum(axis=1)
    empty_E = (ranked_EK == -1).sum(axis=1)
    available_E = np.full(len(ranked_EK), num_items) if available_E is None else available_E
    # places that hold something were filled; of the empty ones only those that could have been
    filled_E = ranked_EK.shape[1] - empty_E
    owed_E = np.maximum(filled_E, np.minimum(ranked_EK.shape[1], available_E))
    return np.where(owed_E > 0, legal_E / np.maximum(owed_E, 1), 1.0)


def ranking_figures(
    ranked_EK: np.ndarray,
    targets_E: np.ndarray,
    *,
    num_items: int,
    prefix: str,
    available_E: np.ndarray | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """All figures of one model on one split, as flat keys for `results.record`.

    Args:
        ranked_EK: item indices, best first; -1 where there is nothing.
        targets_E: the item index to be found.
        num_items: size of the whole catalogue.
        prefix: `MODEL/SPLIT/HISTORY`, e.g. `sasrec/test/excluded`.
        available_E: how many items may be recommended to each user; `num_items` when None.
        cutoffs: those beyond K are left out, since shorter lists cannot tell.
        samples: bootstrap samples.

    Returns:
        `PREFIX/METRIC`, `PREFIX/METRIC/low` and `PREFIX/METRIC/high` for R@k, N@k, MRR@k, MRR,
        coverage, gini (both at 10) and legal.

    Example:
        >>> figures = ranking_figures(ranked, targets, num_items=1682, prefix="sasrec/test/kept")
        >>> figures["sasrec/test/kept/R@10"], figures["sasrec/test/kept/R@10/low"]
    """
    possible = [k for k in cutoffs if k <= ranked_EK.shape[1]]
    if not possible:
        raise ValueError(
            f"lists of {ranked_EK.shape[1]} items are too short for metrics at {min(cutoffs)}; "
            "rank more items"
        )
    values = ranking_metrics(ranked_EK, targets_E, cutoffs=possible)
    values["legal"] = legal_share(ranked_EK, num_items, available_E=available_E)
    figures: dict[str, float] = {}
    for metric, values_E in values.items():
        low, high = bootstrap_interval(values_E, samples=samples, seed=seed)
        figures |= _with_ends(f"{prefix}/{metric}", float(values_E.mean()), low, high)
    figures |= _exposure_figures(ranked_EK, num_items, prefix=prefix, samples=samples, seed=seed)
    return figures


def _exposure_figures(
    ranked_EK: np.ndarray, num_items: int, *, prefix: str, samples: int, seed: int
) -> dict[str, float]:
    """Coverage and Gini with intervals.

    A resample holds fewer distinct users than the original, so these two figures are lower or
    higher in *every* resample. Hence the interval is the resamples' spread laid around the figure.
    """
    exposure_EN = _exposure(ranked_EK, num_items, 10)
    total_1N = np.asarray(exposure_EN.sum(axis=0)).reshape(1, -1)
    users = exposure_EN.shape[0]
    found: dict[str, list[np.ndarray]] = {"coverage": [], "gini": []}
    for start in range(0, samples, 100):  # a block of samples x items at a time in memory
        size = min(100, samples - start)
        draws_SE = _multinomial(np.ones(users, dtype=np.int64), samples=size, seed=[seed, start])
        exposure_SN = (exposure_EN.T @ draws_SE.T).T
        found["coverage"].append(_coverage(exposure_SN))
        found["gini"].append(_gini(exposure_SN))
    figures: dict[str, float] = {}
    for metric, function in (("coverage", _coverage), ("gini", _gini)):
        value, resampled_S = float(function(total_1N)[0]), np.concatenate(found[metric])
        ends = value + np.percentile(resampled_S, _ENDS) - resampled_S.mean()
        low, high = np.clip(ends, 0.0, 1.0)
        figures |= _with_ends(f"{prefix}/{metric}", value, float(low), float(high))
    return figures


def _with_ends(key: str, value: float, low: float, high: float) -> dict[str, float]:
    return {key: value, f"{key}/low": low, f"{key}/high": high}


def _multinomial(counts_V: np.ndarray, *, samples: int, seed: int | list[int]) -> np.ndarray:
    """How often each distinct value comes in a resample of all examples: int64 [S, V]."""
    total = int(counts_V.sum())
    if total == 0:
        raise ValueError("there is no example to resample; choose a split that holds some")
    return np.random.default_rng(seed).multinomial(total, counts_V / total, size=samples)


def _exposure(ranked_EK: np.ndarray, num_items: int, cutoff: int) -> sparse.csr_array:
    """How often each user's first `cutoff` places show each item; other ids are not counted."""
    shown_EC = np.asarray(ranked_EK)[:, :cutoff]
    legal_EC = (shown_EC >= 0) & (shown_EC < num_items)
    users_P = np.nonzero(legal_EC)[0]
    shape = (len(shown_EC), num_items)
    return sparse.csr_array((np.ones(len(users_P)), (users_P, shown_EC[legal_EC])), shape=shape)


def _coverage(exposure_SN: np.ndarray) -> np.ndarray:
    return (exposure_SN > 0).mean(axis=1)


def _gini(exposure_SN: np.ndarray) -> np.ndarray:
    sorted_SN = np.sort(exposure_SN, axis=1)
    n = sorted_SN.shape[1]
    weights_N = 2 * np.arange(1, n + 1) - n - 1
    total_S = sorted_SN.sum(axis=1)
    # nothing shown at all is equal for everybody
    return np.where(total_S > 0, sorted_SN @ weights_N / (n * np.maximum(total_S, 1e-12)), 0.0)
