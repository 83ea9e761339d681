"""A prior of counts and common words, mixed into the LLM's list: a separately reported option.

The two tables know things that the model does not (`eval/LOG.md`). For each user

    p(item) = (1 - w) · p_LLM(item) + w · p_tables(item)

over the union of the beam's items and the best items by the tables. p_LLM is the beam's own
probability, 0 for an item outside of it; p_tables is their score divided by its sum over all items
that may come. The weight w is chosen on the validation split. The pure LLM's figures stay the
headline: rows with the prior are called `whyrec+counts-and-words`. Records of before November 27,
2026 have rows `whyrec+prior`, which mix in co-visitation counts alone.

    mixture = mix(ranking, score_fn, examples, exclude_history=True)
    ranked_EW = mixture.ranked(weight, k=20)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whyrec.catalog.dataset import Examples
from whyrec.decode.ranking import Ranking
from whyrec.evaluation.baselines import ScoreFn, top_items
from whyrec.evaluation.metrics import ranking_metrics

WEIGHTS = tuple(round(0.05 * step, 2) for step in range(20))  # below 1, which is no LLM at all


@dataclass(frozen=True)
class Mixture:
    """The items that either model proposes, with the probabilities that each gives them.

    Attributes:
        items_EC: item indices, -1 where there is none; the C of a row are distinct.
        model_EC: the LLM's probabilities.
        counts_EC: the prior's.
    """

    items_EC: np.ndarray
    model_EC: np.ndarray
    counts_EC: np.ndarray

    def ranked(self, weight: float, *, k: int) -> np.ndarray:
        """The k most probable items under the mixture: int32 [E, k], ties by the lower index, -1
        where fewer have any probability."""
        mixed_EC = (1 - weight) * self.model_EC + weight * self.counts_EC
        order_EK = np.lexsort((self.items_EC, -mixed_EC), axis=1)[:, :k]
        items_EK = np.take_along_axis(self.items_EC, order_EK, axis=1)
        items_EK[np.take_along_axis(mixed_EC, order_EK, axis=1) <= 0] = -1
        missing = k - items_EK.shape[1]
        return np.pad(items_EK, ((0, 0), (0, max(missing, 0))), constant_values=-1).astype(np.int32)


def mix(
    ranking: Ranking,
    score_fn: ScoreFn,
    examples: Examples,
    *,
    exclude_history: bool,
    batch_size: int = 1024,
) -> Mixture:
    """Lay the LLM's lists and the prior's side by side.

    Args:
        ranking: the beam's items and log-probabilities, history excluded or not as below.
        score_fn: the prior's scores, not negative.
        examples: whose lists these are.
        exclude_history: whether items of the history may come.
        batch_size: users scored at once.
    """
    width = ranking.items_EW.shape[1]
    items, model, counts = [], [], []
    for start in range(0, len(examples), batch_size):
        histories = examples.histories[start : start + batch_size]
        rows_B1 = np.arange(len(histories))[:, None]
        prior_BN = np.array(score_fn(histories), dtype=np.float64)  # a copy: written to below
        if exclude_history:
            rows = np.repeat(rows_B1[:, 0], [len(history) for history in histories])
            prior_BN[rows, np.concatenate(histories)] = 0.0
        prior_BN /= np.maximum(prior_BN.sum(axis=1, keepdims=True), 1e-30)
        beam_BW = ranking.items_EW[start : start + batch_size]
        # a beam that could not be filled has empty places: their probability is 0
        model_BW = np.where(beam_BW >= 0, np.exp(ranking.scores_EW[start : start + batch_size]), 0)
        counts_BW = np.where(beam_BW >= 0, prior_BN[rows_B1, beam_BW], 0)
        in_beam_BN = np.zeros(prior_BN.shape, dtype=bool)
        in_beam_BN[np.nonzero(beam_BW >= 0)[0], beam_BW[beam_BW >= 0]] = True
        others_BW = top_items(np.where(prior_BN > 0, prior_BN, -np.inf).astype(np.float32), k=width)
        others_BW[in_beam_BN[rows_B1, others_BW] & (others_BW >= 0)] = -1
        others_counts_BW = np.where(others_BW >= 0, prior_BN[rows_B1, others_BW], 0)
        items.append(np.concatenate([beam_BW, others_BW], axis=1))
        model.append(np.concatenate([model_BW, np.zeros_like(model_BW)], axis=1))
        counts.append(np.concatenate([counts_BW, others_counts_BW], axis=1))
    return Mixture(np.concatenate(items), np.concatenate(model), np.concatenate(counts))


def best_prior_weight(
    mixture: Mixture, targets_E: np.ndarray, *, weights: Sequence[float] = WEIGHTS
) -> float:
    """The weight with the best mean N@10 on validation examples; of equal ones the smallest."""

    def reached(weight: float) -> float:
        ranked_EK = mixture.ranked(weight, k=10)
        return float(ranking_metrics(ranked_EK, targets_E, cutoffs=(10,))["N@10"].mean())

    return max(sorted(weights), key=reached)
