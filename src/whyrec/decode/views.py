"""Several views of a history, a ranking of each, mixed: an ensemble of one model.

    p(item | history) ≈ Σ p(item | view) / V

The first view is the history itself. The others leave events out and jitter their order, as
alignment does (`catalog/augment.py`), each a history that its user might have had. What depends on
one event or on an exact order counts for less, what all of them say for more (test-time
augmentation; Krizhevsky et al. 2012). A view costs what a ranking costs.
"""

from collections.abc import Sequence

import numpy as np

from whyrec.catalog.augment import altered
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.ranking import Ranking, rank_prompts, written
from whyrec.decode.thought_ranking import fuse
from whyrec.prompting.encoder import PromptEncoder

_DROPPED, _JITTER = 0.3, 2.0  # as in recipes/beauty/align.yaml


def rank_views(
    decoder: BeamDecoder,
    encoder: PromptEncoder,
    histories: Sequence[np.ndarray],
    *,
    views: int,
    width: int,
    max_history: int,
    exclude_history: Sequence[bool] = (True,),
    progress: str = "",
) -> list[Ranking]:
    """Rank the catalogue for each history as `rank_histories` does, over several views of it.

    Args:
        decoder: beam search of the model.
        encoder: makes the prompts.
        histories: item indices, oldest first; whole ones are excluded where that is asked for.
        views: V; 1 is the history alone.
        width, max_history, exclude_history, progress: as for `rank_histories`.
    """
    by_view = [
        rank_prompts(
            decoder,
            written(
                view_of(histories, view), encoder.recommendation_prompt, max_history=max_history
            ),
            histories,
            width=width,
            exclude_history=exclude_history,
            progress=progress,
        )
        for view in range(views)
    ]
    if views == 1:
        return by_view[0]
    return [
        fuse(rankings, weights=[1] * views, width=width) for rankings in zip(*by_view, strict=True)
    ]


def view_of(histories: Sequence[np.ndarray], view: int) -> list[np.ndarray]:
    """The same view of each history, never empty where it is not; view 0 is the history."""
    if view == 0:
        return list(histories)
    return [
        altered(
            history, np.random.default_rng((view, place)), drop=_DROPPED, jitter=_JITTER, least=1
        )
        for place, history in enumerate(histories)
    ]
