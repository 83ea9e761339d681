"""SASRec learns what can be learnt, looks only back, and is the same for the same seed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from conftest import NUM_ITEMS
from whyrec.catalog.dataset import Dataset, Item
from whyrec.evaluation import baselines, metrics, sasrec
from whyrec.evaluation.fitting import window_batches
from whyrec.recipe import load_recipe

SMALL = sasrec.SasrecRecipe(
    dim=16, layers=1, heads=2, dropout=0.0, max_length=8, learning_rate=1e-2, batch_size=16,
    epochs=8, patience=8,
)  # fmt: skip


def test_it_learns_transitions_that_popularity_cannot(walks: Dataset) -> None:
    trained = sasrec.train(walks, SMALL, device="cpu")
    test = walks.examples("test")
    found = {}
    for name, score in (("sasrec", trained.model.score), ("pop", baselines.popularity(walks))):
        ranked_EK = baselines.rank(score, test, exclude_history=False)
        found[name] = metrics.ranking_metrics(ranked_EK, test.targets_E)["N@10"].mean()
    assert found["sasrec"] > 0.9 and found["pop"] < 0.5
    assert trained.epoch <= SMALL.epochs


def test_the_same_seed_gives_the_same_model_and_leaves_torch_alone(walks: Dataset) -> None:
    recipe = sasrec.SasrecRecipe(**{**vars(SMALL), "epochs": 2, "dropout": 0.2})
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (sasrec.train(walks, recipe, device="cpu") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    history = [walks.sequences[0]]
    assert np.array_equal(first.model.score(history), second.model.score(history))
    assert first.figures == second.figures


def test_states_look_only_back_so_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = sasrec.Sasrec(NUM_ITEMS, SMALL).eval()
    histories = [np.array([1, 2, 3]), np.array([4]), np.arange(20)]
    together = model.score(histories)
    alone = np.concatenate([model.score([history]) for history in histories])
    assert together == pytest.approx(alone, abs=1e-5)
    newest = model.score([np.arange(20)[-SMALL.max_length :]])
    assert newest == pytest.approx(together[2:], abs=1e-5)


def test_validation_by_ranks_equals_metrics_over_lists(walks: Dataset) -> None:
    torch.manual_seed(0)
    model = sasrec.Sasrec(NUM_ITEMS, SMALL).eval()
    valid = walks.examples("valid")
    figures = sasrec.validate(model, valid, batch_size=7)
    for name in ("kept", "excluded"):
        ranked_EK = baselines.rank(model.score, valid, exclude_history=name == "excluded")
        found = metrics.ranking_metrics(ranked_EK, valid.targets_E)
        assert figures[f"{name}/R@10"] == pytest.approx(found["R@10"].mean())
        assert figures[f"{name}/N@10"] == pytest.approx(found["N@10"].mean())


def test_loss_equals_one_position_at_a_time() -> None:
    torch.manual_seed(0)
    model = sasrec.Sasrec(NUM_ITEMS, SMALL).eval()
    windows = [np.array([3, 1, 4, 1, 5]), np.array([9, 2])]
    (batch,) = window_batches(windows, np.random.default_rng(0), max_length=8, batch_size=2)
    losses = []
    for window in windows:
        for place in range(1, len(window)):
            scores = model.score([window[:place]])[0].astype(np.float64)
            losses.append(np.log(np.exp(scores).sum()) - scores[window[place]])
    assert float(sasrec._loss(model, batch, label_smoothing=0.0)) == pytest.approx(
        np.mean(losses), rel=1e-4
    )


def test_the_command_tunes_a_run_and_prints_a_recipe(
    walks: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sasrec.Dataset, "load", lambda folder: walks)
    grid = "{learning_rate: [1e-2], epochs: [1, 2], dim: [16], layers: [1]}"
    assert sasrec.main(["runs/x", "--grid", grid, "--seed", "3", "--seed", "4"]) == 0
    printed = capsys.readouterr()
    recipe = yaml.safe_load(printed.out)
    assert (recipe["learning_rate"], recipe["dim"], recipe["seed"]) == (0.01, 16, 3)
    assert len(re.findall(r"\{[^{]*'epochs': [12].*over 2 seeds.*, \d+ s\n", printed.err)) == 2
    assert sasrec.main(["runs/x", "--grid", "{drop_out: [0.1]}"]) == 2
    assert "did you mean 'dropout'?" in capsys.readouterr().err
    assert sasrec.main(["runs/x", "--grid", "dropout"]) == 2


def test_what_cannot_be_trained_is_refused(walks: Dataset) -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        sasrec.train(walks, sasrec.SasrecRecipe(dim=10, heads=3))
    lonely = Dataset([Item("a")], ["u"], [np.zeros(1, np.int32)], [np.zeros(1, np.int8)])
    with pytest.raises(ValueError, match="two training events"):
        sasrec.train(lonely, SMALL)


@pytest.mark.parametrize("name", ["ml-100k", "beauty"])
def test_the_recipes_that_ship_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "recipes" / name / "sasrec.yaml"
    recipe = load_recipe(sasrec.SasrecRecipe, path)
    assert recipe.dim % recipe.heads == 0
