"""Tuning: every combination, every seed, ordered by the mean on validation."""

from torch import nn

from whyrec.evaluation.fitting import FitRecipe, Trained
from whyrec.evaluation.tuning import tune


def pretend(recipe: FitRecipe) -> Trained:
    """Better with a higher rate, and by chance with the seed."""
    reached = recipe.learning_rate + 0.3 * (recipe.seed == 1) * (recipe.batch_size == 1)
    figures = {"excluded/N@10": reached, "kept/N@10": -reached}
    return Trained(nn.Identity(), recipe, figures, recipe.seed + 1, 2.0)


def test_every_combination_is_tried_best_mean_first() -> None:
    grid = {"learning_rate": [0.1, 0.2], "batch_size": [1, 2]}
    tried = tune(pretend, grid, base=FitRecipe(epochs=7), seeds=[0, 1, 2])
    found = [(t.recipe.learning_rate, t.recipe.batch_size) for t in tried]
    # One lucky seed lifts a mean by .1: less than three such seeds would, as much as the rate.
    assert found[0] == (0.2, 1) and found[-1] == (0.1, 2)
    assert tried[0].figures["excluded/N@10"] == (0.2 + 0.5 + 0.2) / 3
    assert [one["excluded/N@10"] for one in tried[0].by_seed] == [0.2, 0.5, 0.2]
    assert tried[0].epochs == [1, 2, 3] and tried[0].seconds == 6.0
    assert all(t.recipe.epochs == 7 and t.recipe.seed == 0 for t in tried)


def test_without_seeds_the_base_gives_it_and_kept_histories_may_decide() -> None:
    base = FitRecipe(seed=5, exclude_history=False)
    tried = tune(pretend, {"learning_rate": [0.1, 0.2]}, base=base)
    assert [t.recipe.learning_rate for t in tried] == [0.1, 0.2]
    assert tried[0].recipe.seed == 5


def test_each_setting_is_told_as_it_comes(capsys) -> None:
    tune(pretend, {"learning_rate": [0.1]}, base=FitRecipe(batch_size=1), seeds=[0, 1])
    line = capsys.readouterr().err.strip()
    assert line.startswith("{'learning_rate': 0.1}: excluded/N@10 0.2500 kept/N@10 -0.2500")
    assert line.endswith("(N@10 ± 0.2121 over 2 seeds), epoch 1, 2, 4 s")
