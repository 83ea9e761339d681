"""A training stage by itself, for `accelerate launch -m whyrec.train.STAGE`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from whyrec.recipe import T, load_recipe
from whyrec.train.trainer import say


def stage_command(stage: Callable[..., None], recipe_class: type[T], *, description: str) -> None:
    """Parse the command line, run the stage; exit with 2 after one sentence about what was wrong.

    Args:
        stage: called as `stage(run, recipe, force=…)`.
        recipe_class: of its recipe.
        description: the stage's module docstring, whose first paragraph `-h` shows.
    """
    name = stage.__name__
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder, e.g. runs/ml-100k")
    parser.add_argument("--recipe", type=Path, help=f"{name}.yaml; defaults without it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--force", action="store_true", help="run again even if nothing changed")
    options = parser.parse_args()
    try:
        recipe = load_recipe(recipe_class, options.recipe, options.set)
        stage(options.run, recipe, force=options.force)
    except (ValueError, OSError) as error:
        say(f"whyrec: {error}")
        sys.exit(2)
