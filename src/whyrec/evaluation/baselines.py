"""Baselines that learn by counting, and the one ranking loop that every baseline shares.

*Popularity* ranks items by their training events. *Co-visitation* counts which items are near each
other in a user's training sequence (window 5, weight 1/distance forward and half of it backward)
and scores a candidate by the last 10 history items, newest first with weights 1, 0.7, 0.49, …,
divided by the square root of the candidate's training events plus one; its tuned twin chooses these
weights and this power on the validation split. It is the item-to-item
table of classic shops (Linden, Smith & York 2003), and on Amazon reviews it reaches published
generative models. *Counts and words* adds the items whose titles and brands share words with those
of the history (`catalog/alike.py`), which counts of new items cannot know: no learning either, and
on Amazon Beauty above everything else that is not a language model.

A model is a function from a batch of histories to scores over the whole catalogue:

    ranked_EK = rank(co_visitation(dataset), dataset.examples("test"), exclude_history=True)
"""

import itertools
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import sparse
from tqdm import tqdm

from whyrec.catalog.alike import Alike, liked
from whyrec.catalog.covisits import BACKWARD, WINDOW, event_counts, pair_counts
from whyrec.catalog.dataset import Dataset, Examples
from whyrec.evaluation.metrics import ranking_metrics

# histories (int32 item indices, oldest first) → scores_BN over all items, higher is better
ScoreFn = Callable[[Sequence[np.ndarray]], np.ndarray]
_DECAYS, _DAMPINGS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (0.0, 0.25, 0.5)
_WORD_WEIGHTS = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
_TUNED_ON = 4000
_LAST = 10  # of the newest history items


def rank(
    score_fn: ScoreFn,
    examples: Examples,
    *,
    k: int = 20,
    exclude_history: bool,
    batch_size: int = 1024,
) -> np.ndarray:
    """Rank the whole catalogue for every example, a batch of users at a time.

    Args:
        score_fn: scores_BN for a batch of histories; they are compared in float32, and -inf marks
            an item that is never recommended.
        examples: what to predict.
        k: places per list.
        exclude_history: leave out the items that the user has had before the target.
        batch_size: users scored at once; memory holds `batch_size` x N scores.

    Returns:
        ranked_EK: int32 item indices, best first, ties by the lower index; -1 where fewer than k
        items can be recommended.
    """
    ranked = []
    starts = range(0, len(examples), batch_size)
    for start in tqdm(starts, desc="ranking", unit="batch", leave=False, disable=len(starts) < 4):
        histories = examples.histories[start : start + batch_size]
        scores_BN = np.array(score_fn(histories), dtype=np.float32)  # a copy: written to below
        if exclude_history:
            rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
            scores_BN[rows, np.concatenate(histories)] = -np.inf
        ranked.append(top_items(scores_BN, k=k))
    return np.concatenate(ranked) if ranked else np.empty((0, k), np.int32)


def top_items(scores_BN: np.ndarray, *, k: int) -> np.ndarray:
    """The k best items of each row, ties by the lower index, -1 in place of scores of -inf.

    A selection alone would break ties at random. So it only finds each row's k-th best score, and
    the items that reach it, few more than k, are sorted by score and index.

    Returns:
        int32 [B, k]
    """
    num_rows, num_items = scores_BN.shape
    kept = min(k, num_items)
    scores_BN = np.ascontiguousarray(scores_BN, dtype=np.float32)
    assert not np.isnan(scores_BN).any()
    kth_B1 = torch.from_numpy(scores_BN).topk(kept, dim=1).values[:, -1:].numpy()
    rows_P, items_P = np.nonzero(scores_BN >= kth_B1)  # row by row
    order_P = np.lexsort((items_P, -scores_BN[rows_P, items_P], rows_P))
    starts_B1 = np.searchsorted(rows_P, np.arange(num_rows))[:, None]
    items_BK = items_P[order_P[starts_B1 + np.arange(kept)]]
    items_BK[np.take_along_axis(scores_BN, items_BK, axis=1) == -np.inf] = -1
    padding = ((0, 0), (0, k - kept))
    return np.pad(items_BK, padding, constant_values=-1).astype(np.int32)


def popularity(dataset: Dataset) -> ScoreFn:
    """Score every item by its number of training events, whoever asks."""
    counts_N = event_counts(dataset.training_sequences(), num_items=len(dataset.items))

    def score(histories: Sequence[np.ndarray]) -> np.ndarray:
        return np.broadcast_to(counts_N, (len(histories), len(counts_N)))

    return score


def co_visitation(
    dataset: Dataset,
    *,
    window: int = WINDOW,
    backward: float = BACKWARD,
    decay: float = 0.7,
    damping: float = 0.5,
    last: int = _LAST,
) -> ScoreFn:
    """Score items by how often they stood near the history's last items in training sequences.

    Args:
        dataset: counts come from its training events only, whatever split is ranked.
        window: the greatest distance, in events, at which two items count as neighbours.
        backward: weight of "j stood before i" against "j stood after i".
        decay: weight of a history item against the next newer one.
        damping: power of a candidate's training events that its score is divided by.
        last: how many of the newest history items are looked at.
    """
    counted = _counted(dataset, window=window, backward=backward)
    return _by_company(*counted, decay=decay, damping=damping, last=last)


def _counted(
    dataset: Dataset, *, window: int = WINDOW, backward: float = BACKWARD
) -> tuple[np.ndarray, sparse.csr_array]:
    """Training events of each item [N], and how often items stood near each other [N, N]."""
    sequences, num_items = dataset.training_sequences(), len(dataset.items)
    counts_N = event_counts(sequences, num_items=num_items)
    return counts_N, pair_counts(sequences, num_items=num_items, window=window, backward=backward)


def _by_company(
    counts_N: np.ndarray,
    neighbours_NN: sparse.csr_array,
    *,
    decay: float,
    damping: float,
    last: int = _LAST,
) -> ScoreFn:
    damped_N = (counts_N + 1) ** -damping  # + 1: an item seen once or twice is no safe bet
    return _by_table((neighbours_NN @ sparse.diags_array(damped_N)).tocsr(), decay, last)


def _by_table(table_NN: sparse.csr_array, decay: float, last: int = _LAST) -> ScoreFn:
    """Σ decay ** (events since) · table[event, item] over the last events."""
    num_items = table_NN.shape[1]

    def score(histories: Sequence[np.ndarray]) -> np.ndarray:
        recent = [history[: -last - 1 : -1] for history in histories]  # newest first
        rows = np.repeat(np.arange(len(recent)), [len(items) for items in recent])
        weights = np.concatenate([decay ** np.arange(len(items)) for items in recent])
        shape = (len(recent), num_items)
        history_BN = sparse.csr_array((weights, (rows, np.concatenate(recent))), shape=shape)
        return (history_BN @ table_NN).toarray()

    return score


def tuned_co_visitation(dataset: Dataset, *, users: int = _TUNED_ON) -> ScoreFn:
    """Co-visitation with the decay and the damping of the best validation N@10, history excluded.

    Args:
        dataset: counts come from its training events.
        users: validation users that choose, a fixed random subset; 0 for all.
    """
    examples = dataset.examples("valid").at_most(users)
    counted = _counted(dataset)
    if not len(examples):
        return co_visitation(dataset)

    def counts(setting: tuple[float, float]) -> ScoreFn:
        return _by_company(*counted, decay=setting[0], damping=setting[1])

    settings = itertools.product(_DECAYS, _DAMPINGS)
    best = max(settings, key=lambda setting: _reached(counts(setting), examples))
    print(f"co-visitation, tuned: decay {best[0]}, damping {best[1]}", file=sys.stderr)
    return counts(best)


def common_words(dataset: Dataset, *, decay: float = 0.7, last: int = _LAST) -> ScoreFn:
    """Score items by the words that they share with the last ones, and by how liked they are.

    Args:
        dataset: events are counted in its training split.
        decay, last: as for `co_visitation`.
    """
    alike = Alike.measure(dataset.items)
    counts_N = event_counts(dataset.training_sequences(), num_items=len(dataset.items))
    rows_P, places_P = np.nonzero(alike.near_NK >= 0)
    near_P = alike.near_NK[rows_P, places_P]
    weights_P = liked(alike.cosines_NK[rows_P, places_P], counts_N[near_P])
    shape = (len(dataset.items), len(dataset.items))
    return _by_table(sparse.csr_array((weights_P, (rows_P, near_P)), shape=shape), decay, last)


def tuned_counts_and_words(dataset: Dataset, counts: ScoreFn, *, users: int = _TUNED_ON) -> ScoreFn:
    """counts + w · common words, with the w of the best validation N@10, history excluded.

    Args:
        dataset: as for `common_words`.
        counts: such as `tuned_co_visitation`.
        users: validation users that choose, a fixed random subset; 0 for all.
    """
    words = common_words(dataset)

    def added(weight: float) -> ScoreFn:
        return lambda histories: counts(histories) + weight * words(histories)

    examples = dataset.examples("valid").at_most(users)
    if not len(examples):
        return added(1.0)
    best = max(_WORD_WEIGHTS, key=lambda weight: _reached(added(weight), examples))
    print(f"counts and words, tuned: weight {best}", file=sys.stderr)
    return added(best)


def that_count(dataset: Dataset) -> dict[str, ScoreFn]:
    """All of the above by name: popularity, co-visitation, -tuned, and counts-and-words."""
    tuned = tuned_co_visitation(dataset)
    return {
        "popularity": popularity(dataset),
        "co-visitation": co_visitation(dataset),
        "co-visitation-tuned": tuned,
        "counts-and-words": tuned_counts_and_words(dataset, tuned),
    }


def _reached(score: ScoreFn, examples: Examples) -> float:
    ranked_EK = rank(score, examples, k=10, exclude_history=True)
    return float(ranking_metrics(ranked_EK, examples.targets_E, cutoffs=(10,))["N@10"].mean())
