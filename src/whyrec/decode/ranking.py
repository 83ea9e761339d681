"""Rank items for many histories: batched prompts, one prefill, one beam for each exclusion rule."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from whyrec.decode.beam import BeamDecoder
from whyrec.prompting.encoder import PromptEncoder

# Prompt tokens of a batch: enough to fill the device, little enough for its memory; on a CPU so
# few that the layers' activations nearly stay in the cache.
_BATCH_TOKENS = {"cpu": 2_048, "cuda": 131_072}


@dataclass(frozen=True)
class Ranking:
    """Ranked items of E histories.

    Attributes:
        items_EW: item indices, best first, -1 where nothing is left.
        scores_EW: log-probabilities.
    """

    items_EW: np.ndarray
    scores_EW: np.ndarray


def rank_histories(
    decoder: BeamDecoder,
    encoder: PromptEncoder,
    histories: Sequence[np.ndarray],
    *,
    width: int,
    max_history: int,
    exclude_history: Sequence[bool] = (True,),
    progress: str = "",
) -> list[Ranking]:
    """Rank the catalogue for each history, once for each entry of `exclude_history`.

    Args:
        decoder: beam search of the model.
        encoder: makes the prompts.
        histories: item indices, oldest first; only the newest `max_history` are shown to the
            model, but all are excluded where that is asked for.
        width: beam width, and the length of a ranking.
        max_history: items of a history that the prompt holds at most.
        exclude_history: for each ranking, whether items of the history may come again.
        progress: a label for the progress bar; none is shown when it is empty.

    Returns:
        One `Ranking` for each entry of `exclude_history`, in the order of `histories`.
    """
    prompts = [encoder.recommendation_prompt(h[-max_history:].tolist()) for h in histories]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rankings = [
        Ranking(
            np.full((len(prompts), width), -1, dtype=np.int64),
            np.full((len(prompts), width), -np.inf, dtype=np.float32),
        )
        for _ in exclude_history
    ]
    bar = tqdm(
        total=len(prompts), desc=progress, unit="user", disable=not progress, file=sys.stderr
    )
    for batch in _batches(order, [len(p) for p in prompts], _BATCH_TOKENS[decoder.device.type]):
        prefilled = decoder.prefill(
            [prompts[i] for i in batch], width=width, searches=len(rankings)
        )
        for ranking, exclude in zip(rankings, exclude_history, strict=True):
            excluded = [histories[i].tolist() for i in batch] if exclude else None
            beams = decoder.search(prefilled, width=width, excluded=excluded)
            ranking.items_EW[batch] = beams.items_UW.cpu().numpy()
            ranking.scores_EW[batch] = beams.scores_UW.to(torch.float32).cpu().numpy()
        bar.update(len(batch))
    bar.close()
    return rankings


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut `order` (longest first) into batches of at most `budget` padded tokens."""
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
