"""Tuning of the small neural baselines on the validation split: a grid, with one seed or several.

    python -m whyrec.evaluation.sasrec runs/beauty --recipe recipes/beauty/sasrec.yaml \\
        --grid "{dropout: [0.2, 0.5], dim: [64, 128]}" --seed 0 --seed 1

What each setting reached goes to stderr as it comes; the best recipe, as YAML, to stdout.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import numpy as np
import yaml
from tqdm import tqdm

from whyrec.evaluation.fitting import R, Trained
from whyrec.recipe import load_recipe


@dataclass(frozen=True)
class Tried(Generic[R]):
    """One setting of a grid.

    Attributes:
        recipe: the setting, with the first seed.
        figures: validation figures, the mean over the seeds.
        by_seed: the same for each seed alone.
        epochs: the best epoch of each seed.
        seconds: of all its trainings.
    """

    recipe: R
    figures: dict[str, float]
    by_seed: list[dict[str, float]]
    epochs: list[int]
    seconds: float


def tune(
    train: Callable[[R], Trained],
    grid: Mapping[str, Sequence[Any]],
    *,
    base: R,
    seeds: Sequence[int] = (),
) -> list[Tried[R]]:
    """Train every combination of the grid with every seed.

    Args:
        train: from a recipe to a trained model.
        grid: recipe field → values to try.
        base: the other fields.
        seeds: the base's own seed when there are none.

    Returns:
        All settings, the best mean validation N@10 first.

    Example:
        >>> train_one = partial(sasrec.train, dataset)  # doctest: +SKIP
        >>> tune(train_one, {"dim": [64, 128]}, base=SasrecRecipe(), seeds=[0, 1])  # doctest: +SKIP
    """
    tried = []
    for values in itertools.product(*grid.values()):
        changes: dict[str, Any] = dict(zip(grid, values, strict=True))
        recipe = dataclasses.replace(base, **changes)
        runs = [train(dataclasses.replace(recipe, seed=seed)) for seed in seeds or [recipe.seed]]
        by_seed = [run.figures for run in runs]
        setting = Tried(
            runs[0].recipe,
            {key: float(np.mean([one[key] for one in by_seed])) for key in by_seed[0]},
            by_seed,
            [run.epoch for run in runs],
            sum(run.seconds for run in runs),
        )
        tried.append(setting)
        tqdm.write(_line(changes, setting), file=sys.stderr)
    return sorted(tried, key=lambda setting: -setting.figures[setting.recipe.chosen_by])


def _line(changes: Mapping[str, Any], setting: Tried) -> str:
    reached = " ".join(f"{key} {value:.4f}" for key, value in setting.figures.items())
    if len(setting.by_seed) > 1:
        spread = np.std([one[setting.recipe.chosen_by] for one in setting.by_seed], ddof=1)
        reached += f" (N@10 ± {spread:.4f} over {len(setting.by_seed)} seeds)"
    epochs = ", ".join(map(str, setting.epochs))
    return f"{dict(changes)}: {reached}, epoch {epochs}, {setting.seconds:.0f} s"


def tuning_command(
    name: str,
    recipe_class: type[R],
    load: Callable[[Path], Callable[..., Trained]],
    arguments: Sequence[str] | None = None,
) -> int:
    """`python -m whyrec.evaluation.NAME RUN --grid ...`; the exit status.

    Args:
        name: of the baseline's module.
        recipe_class: its recipe.
        load: reads the run folder and gives a function `recipe, max_seconds=… → Trained`.
        arguments: the command line's own when None.
    """
    parser = argparse.ArgumentParser(prog=f"python -m whyrec.evaluation.{name}")
    parser.add_argument("run", type=Path, help="runs/NAME, with what the baseline learns from")
    parser.add_argument("--recipe", type=Path, help="the settings that the grid does not vary")
    parser.add_argument("--grid", required=True, help="YAML: {setting: [value, ...], ...}")
    parser.add_argument(
        "--seed", type=int, action="append", default=[], help="may be given again, for a mean"
    )
    parser.add_argument("--max-seconds", type=float, help="a limit for each training")
    options = parser.parse_args(arguments)
    try:
        grid = yaml.safe_load(options.grid)
        if not isinstance(grid, dict) or not all(isinstance(v, list) for v in grid.values()):
            raise ValueError("--grid must look like {dropout: [0.2, 0.5], dim: [64]}")
        for key, tried in grid.items():  # as a recipe would read them, unknown settings refused
            read = [load_recipe(recipe_class, options.recipe, [f"{key}={v}"]) for v in tried]
            grid[key] = [getattr(recipe, key) for recipe in read]
        base = load_recipe(recipe_class, options.recipe)
        train = load(options.run)
        best = tune(
            lambda recipe: train(recipe, max_seconds=options.max_seconds),
            grid,
            base=base,
            seeds=options.seed,
        )[0]
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"whyrec: {error}", file=sys.stderr)
        return 2
    print(yaml.safe_dump(dataclasses.asdict(best.recipe), sort_keys=False), end="")
    return 0
