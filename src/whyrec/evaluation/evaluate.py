"""`whyrec evaluate`: full ranking of the catalogue for a split, beside baselines of the same run.

Every user's target is ranked among all items, with the items of the history kept and with them
excluded; both are reported, each with a 95 % bootstrap interval. The baselines learn from the
run's training events and are kept in the run folder.

    whyrec evaluate runs/ml-100k/model/aligned --run runs/ml-100k
"""

import sys
from pathlib import Path

import numpy as np

from whyrec.catalog.dataset import Dataset, Examples
from whyrec.decode.recommender import Recommender
from whyrec.evaluation import baselines, sasrec
from whyrec.evaluation.metrics import ranking_figures
from whyrec.evaluation.results import record
from whyrec.recipe import recipe_config
from whyrec.stage import fingerprint, read_stage, run_stage

HISTORIES = {"excluded": True, "kept": False}
_SHOWN = ("R@5", "R@10", "N@5", "N@10", "MRR", "coverage", "gini", "legal")


def evaluate(
    model: Path,
    run: Path,
    *,
    split: str,
    beams: int,
    users: int = 0,
    sasrec_recipe: sasrec.SasrecRecipe | None = None,
    command: str = "",
    json_path: Path | None = None,
) -> dict[str, float]:
    """Measure a model folder on a run's split and write `run/eval/results.json`.

    Args:
        model: a model folder.
        run: the run folder with its data set.
        split: `valid` or `test`.
        beams: beam width, and how many items are ranked.
        users: a fixed random subset of so many users; 0 for all.
        sasrec_recipe: settings of SASRec; None leaves all baselines out.
        command: how this was called, for the record.
        json_path: where the record is written besides.

    Returns:
        All figures, as flat keys `MODEL/SPLIT/HISTORY/METRIC`.

    Raises:
        ValueError: when the model belongs to another catalogue, or the split holds nothing.
    """
    if beams < 10:
        raise ValueError(f"beams must be at least 10, for metrics at 10, not {beams}")
    read_stage(run / "dataset", made_by=f"whyrec prepare SOURCE --run {run}")
    dataset = Dataset.load(run / "dataset")
    examples = dataset.examples(split)  # type: ignore[arg-type]
    if not len(examples):
        raise ValueError(f"the {split} split of {run} holds no users; prepare a larger log")
    if 0 < users < len(examples):
        examples = examples.take(users, seed=0)
    recommender = Recommender.from_pretrained(model)
    if [i.item_id for i in recommender.items] != [i.item_id for i in dataset.items]:
        raise ValueError(
            f"{model} recommends {len(recommender.items)} items and {run} holds "
            f"{len(dataset.items)}: they are different catalogues; name the model's own run"
        )
    ranked: dict[str, np.ndarray] = {}
    rankings = recommender.rank(
        examples.histories,
        width=beams,
        exclude_history=list(HISTORIES.values()),
        progress=f"ranking for {split} users",
    )
    for history, ranking in zip(HISTORIES, rankings, strict=True):
        ranked[f"whyrec/{split}/{history}"] = ranking.items_EW
    if sasrec_recipe is not None:
        ranked |= rank_baselines(
            dataset, examples, run, split=split, users=users, recipe=sasrec_recipe
        )
    figures: dict[str, float] = {}
    for prefix in sorted(ranked):
        figures |= ranking_figures(
            ranked[prefix], examples.targets_E, num_items=len(dataset.items), prefix=prefix
        )
    (run / "eval").mkdir(exist_ok=True)
    for path in (run / "eval" / "results.json", json_path):
        if path is not None:
            record(
                path,
                name=f"{run.name} {split}",
                command=command,
                seed=_seed(model),
                figures=figures,
                data_sha256=fingerprint(run / "dataset"),
            )
    return figures


def rank_baselines(
    dataset: Dataset,
    examples: Examples,
    run: Path,
    *,
    split: str,
    users: int,
    recipe: sasrec.SasrecRecipe,
) -> dict[str, np.ndarray]:
    """Top 20 of popularity, co-visitation and SASRec by `MODEL/SPLIT/HISTORY`, kept in the run."""
    folder = run / "eval" / f"baselines-{split}"

    def build(partial: Path) -> dict:
        trained = sasrec.train(dataset, recipe)
        models = {
            "popularity": baselines.popularity(dataset),
            "co-visitation": baselines.co_visitation(dataset),
            "sasrec": trained.model.score,
        }
        ranked = {
            f"{name}/{split}/{history}": baselines.rank(
                score, examples, k=20, exclude_history=exclude
            )
            for name, score in models.items()
            for history, exclude in HISTORIES.items()
        }
        np.savez(partial / "ranked.npz", **ranked)  # type: ignore[arg-type]
        return {"sasrec_valid": trained.figures, "sasrec_epoch": trained.epoch}

    run_stage(
        folder,
        build,
        stage="baselines",
        config={"sasrec": recipe_config(recipe), "split": split, "users": users},
        inputs={"dataset": run / "dataset"},
    )
    with np.load(folder / "ranked.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def figures_table(figures: dict[str, float]) -> str:
    """The figures as aligned text, a row for each model and history; R@10 and N@10 with ends."""
    prefixes = sorted({tuple(key.split("/")[:3]) for key in figures}, key=_row_order)
    width = max(len(model) for model, _, _ in prefixes)
    lines = [f"{'':{width}}  history    " + "".join(f"{name:>10}" for name in _SHOWN)]
    for model, split, history in prefixes:
        values = [figures[f"{model}/{split}/{history}/{name}"] for name in _SHOWN]
        cells = "".join(f"{value:10.4f}" for value in values)
        lines.append(f"{model:{width}}  {history:9}  {cells}")
    lines.append("95 % intervals:")
    for model, split, history in prefixes:
        ends = "   ".join(
            f"{name} [{figures[f'{key}/low']:.4f}, {figures[f'{key}/high']:.4f}]"
            for name in ("R@10", "N@10")
            for key in [f"{model}/{split}/{history}/{name}"]
        )
        lines.append(f"{model:{width}}  {history:9}  {ends}")
    return "\n".join(lines)


def _row_order(prefix: tuple[str, ...]) -> tuple:
    """History excluded first, our model last in each block."""
    model, _, history = prefix
    return (history != "excluded", model == "whyrec", model)


def _seed(model: Path) -> int:
    """The training seed of a model folder that a run made; 0 for one that was moved."""
    try:
        record = read_stage(model, made_by="whyrec align")
    except ValueError:
        print(f"{model} has no stage.json; its seed is recorded as 0", file=sys.stderr)
        return 0
    return int(record["config"].get("seed", 0))
