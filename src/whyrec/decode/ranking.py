"""Rank items for many histories: batched prompts, one prefill, one beam for each exclusion rule."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from whyrec.decode.beam import BeamDecoder, Beams
from whyrec.prompting.encoder import PromptEncoder
from whyrec.workers import in_processes

# Prompt tokens of a batch: enough to fill the device, little enough for its memory; on a CPU so
# few that the layers' activations nearly stay in the cache.
_BATCH_TOKENS = {"cpu": 2_048, "cuda": 65_536}


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
    return rank_prompts(
        decoder,
        written(histories, encoder.recommendation_prompt, max_history=max_history),
        histories,
        width=width,
        exclude_history=exclude_history,
        progress=progress,
    )


def rank_prompts(
    decoder: BeamDecoder,
    prompts: Sequence[Sequence[int]],
    histories: Sequence[np.ndarray],
    *,
    width: int,
    exclude_history: Sequence[bool] = (True,),
    progress: str = "",
) -> list[Ranking]:
    """Rank the catalogue after each prompt, as `rank_histories` does after its own.

    Args:
        decoder: beam search of the model.
        prompts: token ids, each ending in `<|sid_begin|>`.
        histories: what is excluded where that is asked for.
        width, exclude_history, progress: as for `rank_histories`.
    """
    rankings = [no_ranking(len(prompts), width=width) for _ in exclude_history]
    bar = tqdm(
        total=len(prompts), desc=progress, unit="user", disable=not progress, file=sys.stderr
    )
    # A GPU is asked nothing before all is done, so that it never waits for the host: the next
    # batch is made while it works. The beams' tokens that this computes in vain are few.
    compact = decoder.device.type == "cpu"
    found: list[tuple[Ranking, list[int], Beams]] = []
    for batch in batches([len(p) for p in prompts], device=decoder.device.type):
        prefilled = decoder.prefill(
            [prompts[i] for i in batch], width=width, searches=len(rankings) if compact else 1
        )
        for ranking, exclude in zip(rankings, exclude_history, strict=True):
            excluded = [histories[i].tolist() for i in batch] if exclude else None
            beams = decoder.search(prefilled, width=width, excluded=excluded, compact=compact)
            found.append((ranking, batch, beams))
        bar.update(len(batch))
    for ranking, batch, beams in found:
        ranking.items_EW[batch] = beams.items_UW.cpu().numpy()
        ranking.scores_EW[batch] = beams.scores_UW.to(torch.float32).cpu().numpy()
    bar.close()
    return rankings


def written(
    histories: Sequence[np.ndarray], write: Callable[[list[int]], list[int]], *, max_history: int
) -> list[list[int]]:
    """The prompts of some histories.

    A prompt with notes takes a third of a millisecond of Python, more than a GPU needs to read it,
    so that several processes write them.

    Args:
        histories: item indices, oldest first.
        write: makes a prompt of one, e.g. `encoder.thinking_prompt`.
        max_history: items of a history that a prompt holds at most.
    """
    return in_processes(lambda n: write(histories[n][-max_history:].tolist()), len(histories))


def no_ranking(num_histories: int, *, width: int) -> Ranking:
    """Rankings that hold nothing yet."""
    return Ranking(
        np.full((num_histories, width), -1, dtype=np.int64),
        np.full((num_histories, width), -np.inf, dtype=np.float32),
    )


def batches(lengths: Sequence[int], *, device: str) -> list[list[int]]:
    """Places of `lengths`, longest first, in batches that a kind of device can take.

    Args:
        lengths: tokens of each row, padded to the longest of its batch.
        device: `cpu` or `cuda`.
    """
    budget, found = _BATCH_TOKENS[device], list[list[int]]()
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if found and lengths[found[-1][0]] * (len(found[-1]) + 1) <= budget:
            found[-1].append(index)
        else:
            found.append([index])
    return found
