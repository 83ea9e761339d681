"""Does thinking pay: the same model with and without it, at equal inputs, and at what cost.

Rows `whyrec` (the thought closed at once), `whyrec-think` and `whyrec-fused` (both mixed), with the
relative gains of the latter two over the first, paired by user, and tokens and seconds a user.

    thinking = rank_after_thinking(recommender, examples, beams=20, split="test", settings=settings)
    fused = fused_rankings(plain, thinking, beams=20)
    figures = cost_figures(thinking)
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from whyrec.catalog.dataset import Examples
from whyrec.decode.ranking import Ranking
from whyrec.decode.recommender import Recommender
from whyrec.decode.think import ThoughtSettings
from whyrec.decode.thought_ranking import fuse
from whyrec.evaluation.comparison import HISTORIES
from whyrec.evaluation.metrics import paired_gain_interval, ranking_metrics


@dataclass(frozen=True)
class Thinking:
    """Rankings after thinking.

    Attributes:
        rankings: by history, `excluded` and `kept`.
        thoughts: by user, the token ids of each thought.
        settings: how they were sampled.
        seconds: a user.
    """

    rankings: dict[str, Ranking]
    thoughts: list[list[list[int]]]
    settings: ThoughtSettings
    seconds: float


def thought_settings(
    recommender: Recommender, *, samples: int | None, temperature: float | None
) -> ThoughtSettings:
    """How to think: as the model says, but for what is given.

    Raises:
        ValueError: when the model has not learnt to think, or a setting cannot be.
    """
    settings = recommender.thoughts
    if samples is not None:
        settings = replace(settings, samples=samples)
    if temperature is not None:
        settings = replace(settings, temperature=temperature)
    if settings.samples < 1 or settings.temperature < 0:
        raise ValueError("there must be at least one thought, and temperature not below 0")
    return settings


def rank_after_thinking(
    recommender: Recommender,
    examples: Examples,
    *,
    beams: int,
    split: str,
    settings: ThoughtSettings,
) -> Thinking:
    """Think for every example, then rank the catalogue."""
    start = time.perf_counter()
    ranked = recommender.rank_thinking(
        examples.histories,
        width=beams,
        settings=settings,
        exclude_history=list(HISTORIES.values()),
        keys=examples.users_E.tolist(),
        progress=f"thinking for {split} users",
    )
    seconds = (time.perf_counter() - start) / len(examples)
    rankings = dict(zip(HISTORIES, ranked.rankings, strict=True))
    return Thinking(rankings, ranked.thoughts, settings, seconds)


def fused_rankings(
    plain: Mapping[str, Ranking], thinking: Thinking, *, beams: int
) -> dict[str, Ranking]:
    """Thinking and not thinking mixed, by history."""
    weights = [thinking.settings.weight, 1 - thinking.settings.weight]
    return {
        name: fuse([thinking.rankings[name], ranking], weights=weights, width=beams)
        for name, ranking in plain.items()
    }


def cost_figures(thinking: Thinking) -> dict[str, float]:
    """`cost/think/tokens` and `/seconds` a user, and `trace/median_tokens` of a thought."""
    lengths_EG = np.array([[len(ids) for ids in own] for own in thinking.thoughts])
    return {
        "cost/think/tokens": float(lengths_EG.sum(1).mean()),
        "cost/think/seconds": thinking.seconds,
        "trace/median_tokens": float(np.median(lengths_EG)),
    }


def think_gains(
    plain: Ranking, others: Mapping[str, Ranking], targets_E: np.ndarray, *, tokens: float
) -> dict[str, float]:
    """Relative gains over not thinking, paired by user, with 95 % intervals.

    Args:
        plain: the ranking without thinking, history excluded.
        others: by name, such as `think`, rankings of the same users.
        targets_E: the items to be found.
        tokens: that thinking costs a user.

    Returns:
        `NAME_gain/R@10` and `/N@10` with `/low` and `/high`, and `/per_token`; none where not
        thinking never hits.
    """
    figures: dict[str, float] = {}
    base = ranking_metrics(plain.items_EW, targets_E, cutoffs=(10,))
    for name, ranking in others.items():
        found = ranking_metrics(ranking.items_EW, targets_E, cutoffs=(10,))
        for metric in ("R@10", "N@10"):
            key = f"{name}_gain/{metric}"
            gain = _relative_gain(key, found[metric], base[metric])
            figures |= gain
            if gain:
                figures[f"{key}/per_token"] = gain[key] / max(tokens, 1.0)
    return figures


def model_gains(
    ours: Mapping[str, Ranking], theirs: Mapping[str, Ranking], targets_E: np.ndarray
) -> dict[str, float]:
    """Relative gains of a model over another one, paired by user, with 95 % intervals.

    Args:
        ours: by row (`whyrec`, `whyrec-think`, …), rankings with the history excluded.
        theirs: the other model's; a row that it has not, because it does not think, is compared
            with its `whyrec`.
        targets_E: the items to be found.

    Returns:
        `against/ROW/METRIC` at 5 and 10, each with `/low` and `/high`; none where the other model
        never hits.
    """
    figures: dict[str, float] = {}
    for row, ranking in ours.items():
        other = theirs[row if row in theirs else "whyrec"]
        base = ranking_metrics(other.items_EW, targets_E, cutoffs=(5, 10))
        found = ranking_metrics(ranking.items_EW, targets_E, cutoffs=(5, 10))
        for metric in ("R@5", "R@10", "N@5", "N@10"):
            figures |= _relative_gain(f"against/{row}/{metric}", found[metric], base[metric])
    return figures


def _relative_gain(key: str, ours_E: np.ndarray, theirs_E: np.ndarray) -> dict[str, float]:
    """A gain and its interval; nothing where theirs never hits."""
    if not theirs_E.any():
        return {}
    gain = paired_gain_interval(ours_E, theirs_E)
    return {
        key: gain.relative,
        f"{key}/low": gain.relative_low,
        f"{key}/high": gain.relative_high,
    }
