"""`whyrec evaluate`: full ranking of the catalogue for a split, beside baselines of the same run.

Every user's target is ranked among all items, with the items of the history kept and with them
excluded; both are reported, each with a 95 % bootstrap interval, beside what our model gains over
each baseline. On demand: the same model thinking first (`evaluation/thinking.py`) and what its
traces are worth (`evaluation/traces.py`), counts and words mixed in, in rows of its own, and
how much plain language the model has kept.

    whyrec evaluate runs/ml-100k/model/aligned --run runs/ml-100k
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from whyrec.catalog.dataset import Dataset, Examples
from whyrec.decode.ranking import Ranking
from whyrec.decode.recommender import Recommender
from whyrec.evaluation import baselines, prior, sasrec, tiger
from whyrec.evaluation.captions import caption_figures
from whyrec.evaluation.comparison import (
    HISTORIES,
    asked_examples,
    gain_figures,
    measured,
    rank_baselines,
)
from whyrec.evaluation.language import language_figures
from whyrec.evaluation.results import record
from whyrec.evaluation.thinking import (
    cost_figures,
    fused_rankings,
    model_gains,
    rank_after_thinking,
    think_gains,
    thought_settings,
)
from whyrec.evaluation.traces import trace_figures
from whyrec.stage import fingerprint, read_stage


def evaluate(
    model: Path,
    run: Path,
    *,
    split: str,
    beams: int,
    users: int = 0,
    sasrec_recipe: sasrec.SasrecRecipe | None = None,
    tiger_recipe: tiger.TigerRecipe | None = None,
    prior_weight: float | Literal["auto"] | None = None,
    language: bool = False,
    think: Literal["on", "off", "both"] = "off",
    thoughts: int | None = None,
    temperature: float | None = None,
    traces: bool = False,
    against: Path | None = None,
    command: str = "",
    json_path: Path | None = None,
) -> dict[str, float]:
    """Measure a model folder on a run's split and write `run/eval/results.json`, part by part.

    Args:
        model: a model folder.
        run: the run folder with its data set.
        split: `valid` or `test`.
        beams: beam width, and how many items are ranked.
        users: a fixed random subset of so many users; 0 for all.
        sasrec_recipe: settings of SASRec; None leaves all baselines but TIGER out.
        tiger_recipe: settings of the TIGER-style baseline; None leaves it out.
        prior_weight: weight of counts and common words in rows `whyrec+counts-and-words`, `auto`
            to choose it on the validation split; None for no such rows.
        language: measure language kept and captions too.
        think: rank without thinking, with it, or both, and both mixed.
        thoughts: how many for each user; the model's own setting when None.
        temperature: of their sampling; the model's own setting when None.
        traces: measure the traces too and write `run/eval/traces.parquet`.
        against: another model of the run, such as that of an earlier stage, to be compared with
            by user; thinking with thinking, where it thinks.
        command: how this was called, for the record.
        json_path: where the record is written besides.

    Returns:
        All figures, as flat keys: `MODEL/SPLIT/HISTORY/METRIC`,
        `gain_over/BASELINE/SPLIT/HISTORY/METRIC` (whyrec minus baseline), `think_gain/METRIC`,
        `fused_gain/METRIC` and `against/ROW/METRIC` (shares, history excluded), `cost/...`,
        `trace/...`, `prior/weight`, `evaluate/seconds` (ranking without thinking, both ways),
        `language/...` and `caption/...`.

    Raises:
        ValueError: when the model belongs to another catalogue or cannot think, or the split holds
            nothing.
    """
    if beams < 10:
        raise ValueError(f"beams must be at least 10, for metrics at 10, not {beams}")
    if isinstance(prior_weight, int | float) and not 0 <= prior_weight <= 1:
        raise ValueError(f"the prior's weight must lie between 0 and 1, not {prior_weight}")
    if think == "on" and prior_weight is not None:
        raise ValueError("the prior is mixed with rankings without thinking; use --think both")
    if traces and think == "off":
        raise ValueError("there are no traces without thinking; use --think on or both")
    read_stage(run / "dataset", made_by=f"whyrec prepare SOURCE --run {run}")
    dataset = Dataset.load(run / "dataset")
    examples = asked_examples(dataset, run, split=split, users=users)
    recommender = Recommender.from_pretrained(model)
    _check_catalogue(recommender, dataset, model, run)
    other = None
    if against is not None:
        other = Recommender.from_pretrained(against)
        _check_catalogue(other, dataset, against, run)
    if think != "off":
        settings = thought_settings(recommender, samples=thoughts, temperature=temperature)
    seed = _seed(model)
    rows: dict[str, dict[str, Ranking]] = {}
    extra: dict[str, float] = {}
    start = time.perf_counter()
    if think != "on":
        rows["whyrec"] = _rank(recommender, examples, beams=beams, split=split)
        extra["evaluate/seconds"] = time.perf_counter() - start
    if think != "off":
        thinking = rank_after_thinking(
            recommender, examples, beams=beams, split=split, settings=settings
        )
        rows["whyrec-think"] = thinking.rankings
        extra |= cost_figures(thinking)
    if think == "both":
        rows["whyrec-fused"] = fused_rankings(rows["whyrec"], thinking, beams=beams)
        extra["cost/no-think/seconds"] = extra["evaluate/seconds"] / len(examples)
        extra |= think_gains(
            rows["whyrec"]["excluded"],
            {name: rows[f"whyrec-{name}"]["excluded"] for name in ("think", "fused")},
            examples.targets_E,
            tokens=extra["cost/think/tokens"],
        )
    ranked = {
        f"{name}/{split}/{history}": ranking.items_EW
        for name, by_history in rows.items()
        for history, ranking in by_history.items()
    }
    counted: dict[str, baselines.ScoreFn] = {}
    if prior_weight is not None or sasrec_recipe is not None:
        counted = baselines.that_count(dataset)
    if prior_weight is not None:
        tables = counted["counts-and-words"]
        if prior_weight == "auto":
            prior_weight = _chosen_weight(
                recommender, dataset, run, tables, beams=beams, users=users
            )
        extra["prior/weight"] = prior_weight
        for name, ranking in rows["whyrec"].items():
            mixture = prior.mix(ranking, tables, examples, exclude_history=HISTORIES[name])
            prefix = f"whyrec+counts-and-words/{split}/{name}"
            ranked[prefix] = mixture.ranked(prior_weight, k=beams)
    figures = extra

    def keep(more: Mapping[str, float]) -> None:
        """Write what is known so far: what comes next may take minutes, or be killed."""
        figures.update(more)
        for path in (run / "eval" / "results.json", json_path):
            if path is not None:
                record(
                    path,
                    name=f"{run.name} {split}",
                    command=command,
                    seed=seed,
                    figures=dict(sorted(figures.items())),
                    data_sha256=fingerprint(run / "dataset"),
                )

    keep(measured(ranked, dataset, examples))
    if other is not None:
        keep(_gains_over(other, examples, rows, beams=beams, split=split))
    if traces:
        keep(
            trace_figures(
                recommender,
                dataset,
                examples,
                thinking,
                beams=beams,
                template_folder=model / "prompts",
                path=run / "eval" / "traces.parquet",
            )
        )
    others = rank_baselines(
        dataset,
        examples,
        run,
        split=split,
        seed=seed,
        counted=counted if sasrec_recipe is not None else {},
        sasrec_recipe=sasrec_recipe,
        tiger_recipe=tiger_recipe,
    )
    gains = gain_figures(ranked | others, examples.targets_E) if think != "on" else {}
    keep(measured(others, dataset, examples) | gains)
    if language:
        backbone = recommender.settings.backbone
        llm, encoder = recommender.decoder.model, recommender.encoder
        keep(language_figures(llm, encoder, backbone=backbone))
        keep(caption_figures(llm, encoder, dataset, share=recommender.settings.withheld))
    return figures


def _check_catalogue(recommender: Recommender, dataset: Dataset, model: Path, run: Path) -> None:
    if [i.item_id for i in recommender.items] != [i.item_id for i in dataset.items]:
        raise ValueError(
            f"{model} recommends {len(recommender.items)} items and {run} holds "
            f"{len(dataset.items)}: they are different catalogues; name the model's own run"
        )


def _rank(
    recommender: Recommender, examples: Examples, *, beams: int, split: str
) -> dict[str, Ranking]:
    rankings = recommender.rank(
        examples.histories,
        width=beams,
        exclude_history=list(HISTORIES.values()),
        progress=f"ranking for {split} users",
    )
    return dict(zip(HISTORIES, rankings, strict=True))


def _gains_over(
    other: Recommender,
    examples: Examples,
    rows: Mapping[str, Mapping[str, Ranking]],
    *,
    beams: int,
    split: str,
) -> dict[str, float]:
    """Gains of our rows over those of another model, which thinks as it has learnt to, or not."""
    theirs: dict[str, Ranking] = {}
    thinks = other.settings.thoughts is not None and "whyrec-think" in rows
    if "whyrec" in rows or not thinks:
        plain = _rank(other, examples, beams=beams, split=split)
        theirs["whyrec"] = plain["excluded"]
    if thinks:
        thinking = rank_after_thinking(
            other, examples, beams=beams, split=split, settings=other.thoughts
        )
        theirs["whyrec-think"] = thinking.rankings["excluded"]
        if "whyrec-fused" in rows:
            fused = fused_rankings(plain, thinking, beams=beams)
            theirs["whyrec-fused"] = fused["excluded"]
    ours = {name: by_history["excluded"] for name, by_history in rows.items()}
    return model_gains(ours, theirs, examples.targets_E)


def _chosen_weight(
    recommender: Recommender,
    dataset: Dataset,
    run: Path,
    counts: baselines.ScoreFn,
    *,
    beams: int,
    users: int,
) -> float:
    """The prior's weight with the best validation N@10, history excluded; it is printed."""
    valid = asked_examples(dataset, run, split="valid", users=users)
    ranking = _rank(recommender, valid, beams=beams, split="valid")["excluded"]
    mixture = prior.mix(ranking, counts, valid, exclude_history=True)
    weight = prior.best_prior_weight(mixture, valid.targets_E)
    print(f"evaluate: weight of the prior, chosen on validation: {weight}", file=sys.stderr)
    return weight


def _seed(model: Path) -> int:
    """The training seed of a model folder that a run made; 0 for one that was moved."""
    try:
        record = read_stage(model, made_by="whyrec align")
    except ValueError:
        print(f"{model} has no stage.json; its seed is recorded as 0", file=sys.stderr)
        return 0
    return int(record["config"].get("seed", 0))
