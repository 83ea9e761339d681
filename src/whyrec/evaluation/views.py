"""Rows of `whyrec evaluate --views`: a ranking over several views of each history."""

import time

from whyrec.catalog.dataset import Examples
from whyrec.decode.ranking import Ranking
from whyrec.decode.recommender import Recommender
from whyrec.evaluation.comparison import HISTORIES
from whyrec.evaluation.thinking import row_gains


def view_rows(
    recommender: Recommender,
    examples: Examples,
    plain: Ranking,
    *,
    views: int,
    beams: int,
    split: str,
) -> tuple[dict[str, Ranking], dict[str, float]]:
    """Rankings by history, `excluded` and `kept`, and what they gain and cost.

    Args:
        recommender: the model.
        examples: of a split.
        plain: its ranking of the histories alone, history excluded.
        views: of each history.
        beams: beam width, and how many items are ranked.
        split: for the progress bar.

    Returns:
        The rankings, and `views_gain/R@10` and `/N@10` over `plain` with `/low` and `/high`
        (shares, paired by user), and `cost/views/seconds` a user.
    """
    start = time.perf_counter()
    found = recommender.rank_views(
        examples.histories,
        views=views,
        width=beams,
        exclude_history=list(HISTORIES.values()),
        progress=f"ranking for {split} users",
    )
    seconds = (time.perf_counter() - start) / len(examples)
    rows = dict(zip(HISTORIES, found, strict=True))
    gains = row_gains(plain, {"views": rows["excluded"]}, examples.targets_E)
    return rows, gains | {"cost/views/seconds": seconds}
