"""Rank items for many histories with thoughts, and mix rankings.

G thoughts are sampled for each history; the beam behind each gives a ranking, and the G rankings
are mixed: p(item | history) ≈ Σ p(item | history, thought) / G.

    ranked = rank_thinking(thinker, histories, settings=ThoughtSettings(4, 64, 1.0), width=20,
                           max_history=50)
    ranked.rankings[0].items_EW, ranked.texts(encoder)
    fused = fuse([ranked.rankings[0], no_think], weights=[0.5, 0.5], width=20)
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from whyrec.decode.beam import Beams
from whyrec.decode.ranking import Ranking, batches, no_ranking, written
from whyrec.decode.think import Thinker, ThoughtSettings
from whyrec.prompting.encoder import PromptEncoder


@dataclass(frozen=True)
class ThoughtRanking:
    """Ranked items of E histories, and the thoughts that led to them.

    Attributes:
        rankings: one for each exclusion rule.
        thoughts: by history, the token ids of its G thoughts, without brackets.
        closed_EG: whether the model closed the thought itself; else the budget did.
    """

    rankings: list[Ranking]
    thoughts: list[list[list[int]]]
    closed_EG: np.ndarray

    def texts(self, encoder: PromptEncoder) -> list[list[str]]:
        """The thoughts as text."""
        return [[encoder.tokenizer.decode(ids) for ids in own] for own in self.thoughts]


def rank_thinking(
    thinker: Thinker,
    histories: Sequence[np.ndarray],
    *,
    settings: ThoughtSettings,
    width: int,
    max_history: int,
    exclude_history: Sequence[bool] = (True,),
    seed: int = 0,
    keys: Sequence[int] | None = None,
    progress: str = "",
) -> ThoughtRanking:
    """Rank the catalogue for each history after thinking, as `rank_histories` does without.

    Args:
        thinker: samples the thoughts.
        histories: item indices, oldest first.
        settings: how to think.
        width, max_history, exclude_history, progress: as for `rank_histories`.
        seed: of the thoughts.
        keys: a number for each history that its thoughts depend on, such as the user's; its place
            when None.
    """
    keys = range(len(histories)) if keys is None else keys
    samples, decoder = settings.samples, thinker.decoder
    prompts = written(histories, thinker.encoder.thinking_prompt, max_history=max_history)
    rankings = [no_ranking(len(prompts), width=width) for _ in exclude_history]
    thoughts: list[list[list[int]]] = [[] for _ in prompts]
    closed_EG = np.zeros((len(prompts), samples), dtype=bool)
    bar = tqdm(
        total=len(prompts), desc=progress, unit="user", disable=not progress, file=sys.stderr
    )
    rows = [samples * (len(prompt) + settings.max_tokens) for prompt in prompts]
    for batch in batches(rows, device=decoder.device.type):
        drawn = thinker.think(
            [prompts[i] for i in batch],
            samples=samples,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=seed,
            keys=[int(keys[i]) for i in batch],
        )
        prefilled = thinker.answer(drawn, width=width, searches=len(rankings))
        for ranking, exclude in zip(rankings, exclude_history, strict=True):
            had = [histories[i].tolist() for i in batch for _ in range(samples)]
            beams = decoder.search(prefilled, width=width, excluded=had if exclude else None)
            mixed = fuse(by_thought(beams, samples=samples), weights=[1] * samples, width=width)
            ranking.items_EW[batch], ranking.scores_EW[batch] = mixed.items_EW, mixed.scores_EW
        for row, i in enumerate(batch):
            thoughts[i] = [drawn.thought(row, sample) for sample in range(samples)]
        closed_EG[batch] = drawn.closed_UG.cpu().numpy()
        bar.update(len(batch))
    bar.close()
    return ThoughtRanking(rankings, thoughts, closed_EG)


def by_thought(beams: Beams, *, samples: int) -> list[Ranking]:
    """The beams behind G thoughts of each user, as G rankings of all users."""
    items_RW = beams.items_UW.cpu().numpy()
    scores_RW = beams.scores_UW.float().cpu().numpy()
    return [Ranking(items_RW[g::samples], scores_RW[g::samples]) for g in range(samples)]


def speaks_most(rankings: Sequence[Ranking], mixed: Ranking) -> int:
    """Which of one history's rankings gives the first item of their mixture the most."""
    first = mixed.items_EW[0, 0]
    for_first = [
        np.where(ranking.items_EW[0] == first, ranking.scores_EW[0], -np.inf).max()
        for ranking in rankings
    ]
    return int(np.argmax(for_first))


def fuse(rankings: Sequence[Ranking], *, weights: Sequence[float], width: int) -> Ranking:
    """Mix rankings of the same histories: p(item) = Σ w · p(item | ranking).

    Thoughts of one history mix with equal weights; thinking and not thinking as validation says.
    An item that a ranking's beam did not reach has probability 0 there: no more than its last.

    Args:
        rankings: items and log-probabilities by beam; -1 is no item.
        weights: one a ranking, not negative; they are divided by their sum.
        width: of the result.
    """
    assert len(rankings) == len(weights) and min(weights) >= 0 and sum(weights) > 0
    used = [(r, w / sum(weights)) for r, w in zip(rankings, weights, strict=True) if w > 0]
    items_EX = np.concatenate([r.items_EW for r, _ in used], axis=1)
    scores = [r.scores_EW.astype(np.float64) + np.log(weight) for r, weight in used]
    scores_EX = np.where(items_EX < 0, -np.inf, np.concatenate(scores, axis=1))
    order_EX = items_EX.argsort(axis=1, kind="stable")
    items_EX = np.take_along_axis(items_EX, order_EX, axis=1)
    scores_EX = np.take_along_axis(scores_EX, order_EX, axis=1)
    # Equal items lie side by side: the log of each run's sum goes to its first place.
    first_EX = np.ones_like(items_EX, dtype=bool)
    first_EX[:, 1:] = items_EX[:, 1:] != items_EX[:, :-1]
    run_X = np.flatnonzero(first_EX)
    best = np.maximum.reduceat(scores_EX.ravel(), run_X)
    best = np.where(np.isfinite(best), best, 0.0)
    lengths = np.diff(run_X, append=scores_EX.size)
    masses = np.add.reduceat(np.exp(scores_EX.ravel() - np.repeat(best, lengths)), run_X)
    mixed_EX = np.full(items_EX.shape, -np.inf)
    with np.errstate(divide="ignore"):
        mixed_EX.ravel()[run_X] = np.log(masses) + best
    top_EW = (-mixed_EX).argsort(axis=1, kind="stable")[:, :width]
    ranked_EW = np.take_along_axis(mixed_EX, top_EW, axis=1)
    fused_EW = np.take_along_axis(items_EX, top_EW, axis=1)
    missing = ((0, 0), (0, width - top_EW.shape[1]))
    return Ranking(
        np.pad(np.where(np.isfinite(ranked_EW), fused_EW, -1), missing, constant_values=-1),
        np.pad(ranked_EW.astype(np.float32), missing, constant_values=-np.inf),
    )
