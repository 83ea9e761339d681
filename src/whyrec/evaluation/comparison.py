"""Baselines beside our model: trained once a run and seed, ranked for the same users, compared.

Popularity and co-visitation are counted anew each time. SASRec and TIGER are trained on the run's
training events, with the seed of the model that they stand beside, so that several seeds of ours
are several seeds of theirs; their weights are kept in `run/eval/NAME-seed-N`.

    ranked = rank_baselines(dataset, examples, run, split="test", seed=0, counted={},
                            sasrec_recipe=recipe, tiger_recipe=None)
    ranked["sasrec/test/excluded"]      # int [E, 20]
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from whyrec.catalog.dataset import Dataset, Examples
from whyrec.evaluation import baselines, sasrec, tiger
from whyrec.evaluation.fitting import M, R, Trained
from whyrec.evaluation.metrics import bootstrap_interval, ranking_figures, ranking_metrics
from whyrec.recipe import recipe_config
from whyrec.stage import run_stage

HISTORIES = {"excluded": True, "kept": False}
_PLACES = 20  # of a baseline's list


def rank_baselines(
    dataset: Dataset,
    examples: Examples,
    run: Path,
    *,
    split: str,
    seed: int,
    counted: Mapping[str, baselines.ScoreFn],
    sasrec_recipe: sasrec.SasrecRecipe | None,
    tiger_recipe: tiger.TigerRecipe | None,
) -> dict[str, np.ndarray]:
    """Top 20 of every baseline, by `MODEL/SPLIT/HISTORY`.

    Args:
        dataset: what the baselines learn from.
        examples: whom to rank for.
        run: the run folder.
        split: of the examples, for the names.
        seed: of what is trained, in place of the recipes'.
        counted: of `baselines.that_count`; none leaves them out.
        sasrec_recipe: None leaves SASRec out.
        tiger_recipe: None leaves TIGER out.
    """

    def by_scores(score: baselines.ScoreFn) -> dict[str, np.ndarray]:
        return {
            name: baselines.rank(score, examples, k=_PLACES, exclude_history=exclude)
            for name, exclude in HISTORIES.items()
        }

    def by_beams(model: tiger.Tiger) -> dict[str, np.ndarray]:
        rankings = model.rank(
            examples.histories,
            width=max(_PLACES, model.recipe.beam_width),
            exclude_history=list(HISTORIES.values()),
            progress="ranking with TIGER",
        )
        lists = [ranking.items_EW[:, :_PLACES] for ranking in rankings]
        return dict(zip(HISTORIES, lists, strict=True))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {name: by_scores(score) for name, score in counted.items()}
    if sasrec_recipe is not None:
        scorer = _kept(
            run,
            "sasrec",
            dataclasses.replace(sasrec_recipe, seed=seed),
            train=lambda recipe: sasrec.train(dataset, recipe, device=device),
            untrained=lambda recipe: sasrec.Sasrec(len(dataset.items), recipe).to(device),
            inputs=("dataset",),
        )
        found["sasrec"] = by_scores(scorer.score)
    if tiger_recipe is not None:
        generator = _kept(
            run,
            "tiger",
            dataclasses.replace(tiger_recipe, seed=seed),
            train=lambda recipe: tiger.train(run, recipe, device=device),
            untrained=lambda recipe: tiger.untrained(run, dataset, recipe, device=device),
            inputs=("dataset", "sids"),
        )
        found["tiger"] = by_beams(generator)
    return {
        f"{name}/{split}/{history}": items_EK
        for name, lists in found.items()
        for history, items_EK in lists.items()
    }


def asked_examples(dataset: Dataset, run: Path, *, split: str, users: int) -> Examples:
    """The examples of a split, or a fixed random subset of so many.

    Raises:
        ValueError: when the split holds nobody.
    """
    examples = dataset.examples(split)  # type: ignore[arg-type]
    if not len(examples):
        raise ValueError(f"the {split} split of {run} holds no users; prepare a larger log")
    return examples.at_most(users)


def measured(
    lists: Mapping[str, np.ndarray], dataset: Dataset, examples: Examples
) -> dict[str, float]:
    """All figures of ranked lists, by `MODEL/SPLIT/HISTORY/METRIC`; see `ranking_figures`."""
    found: dict[str, float] = {}
    for prefix, ranked_EK in lists.items():
        excluded = HISTORIES[prefix.split("/")[2]]
        had = [len(np.unique(items)) if excluded else 0 for items in examples.histories]
        found |= ranking_figures(
            ranked_EK,
            examples.targets_E,
            num_items=len(dataset.items),
            prefix=prefix,
            available_E=len(dataset.items) - np.array(had),
        )
    return found


def _kept(
    run: Path,
    name: str,
    recipe: R,
    *,
    train: Callable[[R], Trained[M, R]],
    untrained: Callable[[R], M],
    inputs: tuple[str, ...],
) -> M:
    """The trained model; from the run folder when the same training has been done before."""
    folder = run / "eval" / f"{name}-seed-{recipe.seed}"

    def build(partial: Path) -> dict:
        trained = train(recipe)
        torch.save(trained.model.state_dict(), partial / "weights.pt")
        seconds = round(trained.seconds, 1)
        return {"valid": trained.figures, "epoch": trained.epoch, "train_seconds": seconds}

    run_stage(
        folder,
        build,
        stage=name,
        config=recipe_config(recipe),
        inputs={part: run / part for part in inputs},
    )
    model = untrained(recipe)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True, map_location="cpu"))
    return model.eval()


def gain_figures(ranked: Mapping[str, np.ndarray], targets_E: np.ndarray) -> dict[str, float]:
    """R@10 and N@10 of whyrec minus those of each baseline, with paired 95 % intervals.

    The users' differences are resampled, so that both models are always compared on the same
    users.

    Args:
        ranked: items by `MODEL/SPLIT/HISTORY`.
        targets_E: the item to be found.

    Returns:
        `gain_over/MODEL/SPLIT/HISTORY/METRIC`, with `/low` and `/high`; differences, not shares.
    """
    figures: dict[str, float] = {}
    for prefix, items_EK in ranked.items():
        model, where = prefix.split("/", 1)
        if model.startswith("whyrec"):
            continue
        ours = ranking_metrics(ranked[f"whyrec/{where}"], targets_E, cutoffs=(10,))
        theirs = ranking_metrics(items_EK, targets_E, cutoffs=(10,))
        for metric in ("R@10", "N@10"):
            gain_E = ours[metric] - theirs[metric]
            low, high = bootstrap_interval(gain_E)
            key = f"gain_over/{prefix}/{metric}"
            figures |= {key: float(gain_E.mean()), f"{key}/low": low, f"{key}/high": high}
    return figures
