"""TIGER learns a planted ring, and its loss and its lists are those of scoring item by item."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from conftest import LEVEL_SIZES, NUM_ITEMS
from whyrec.catalog.dataset import Dataset
from whyrec.evaluation import metrics, tiger
from whyrec.evaluation.fitting import window_batches
from whyrec.recipe import load_recipe

SMALL = tiger.TigerRecipe(
    dim=32, layers=1, heads=2, dropout=0.0, max_length=8, learning_rate=1e-2, batch_size=4,
    epochs=30, patience=30, beam_width=30,
)  # fmt: skip


@pytest.fixture(scope="module")
def random_model(prepared_run: Path) -> tiger.Tiger:
    """Random weights, large enough to tell items apart."""
    torch.manual_seed(1)
    dataset = Dataset.load(prepared_run / "dataset")
    model = tiger.untrained(prepared_run, dataset, SMALL, device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def scores(model: tiger.Tiger, codes: list[list[int]], history: list[int]) -> np.ndarray:
    """log p of every item's SID after a history, code by code over the legal ones, in a loop."""
    prompt = model.recommendation_prompt(history)
    found = []
    for sid in codes:
        tokens = model.vocabulary.encode(sid)
        total = 0.0
        for level, code in enumerate(sid):
            logits_V = model.llama(torch.tensor([[*prompt, *tokens[:level]]])).logits[0, -1]
            legal = sorted({other[level] for other in codes if other[:level] == sid[:level]})
            rows = [model.vocabulary.offsets[level] + other for other in legal]
            total += float(logits_V[rows].log_softmax(0)[legal.index(code)])
        found.append(total)
    return np.array(found)


def test_it_learns_a_ring(prepared_run: Path) -> None:
    trained = tiger.train(prepared_run, SMALL, device="cpu")
    assert trained.figures["kept/N@10"] > 0.8
    test = Dataset.load(prepared_run / "dataset").examples("test")
    (ranking,) = trained.model.rank(test.histories, width=10)
    found = metrics.ranking_metrics(ranking.items_EW, test.targets_E, cutoffs=(10,))
    assert found["N@10"].mean() > 0.8


def test_the_same_seed_gives_the_same_model(prepared_run: Path) -> None:
    recipe = tiger.TigerRecipe(**{**vars(SMALL), "epochs": 2, "dropout": 0.2})
    state = torch.get_rng_state()
    first, second = (tiger.train(prepared_run, recipe, device="cpu") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.figures == second.figures
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("exclude", [True, False])
def test_lists_equal_brute_force(random_model, extended, exclude: bool) -> None:
    histories = [np.array([3, 1, 4]), np.array([9]), np.arange(12)]
    (ranking,) = random_model.rank(histories, width=NUM_ITEMS, exclude_history=[exclude])
    codes = extended.codes_NL.tolist()
    for row, history in enumerate(histories):
        expected = scores(random_model, codes, history[-SMALL.max_length :].tolist())
        if exclude:
            expected[history] = -np.inf
        order = [n for n in np.argsort(-expected) if np.isfinite(expected[n])]
        assert ranking.items_EW[row][: len(order)].tolist() == order
        assert (ranking.items_EW[row][len(order) :] == -1).all()
        found = ranking.scores_EW[row][: len(order)]
        assert found == pytest.approx(expected[order], abs=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_equals_one_prefix_at_a_time(random_model, extended, smoothing) -> None:
    windows = [np.array([3, 1, 4, 1]), np.array([9, 2])]
    (batch,) = window_batches(windows, np.random.default_rng(0), max_length=8, batch_size=2)
    recipe = tiger.TigerRecipe(**{**vars(SMALL), "label_smoothing": smoothing})
    model, codes = random_model, extended.codes_NL.tolist()
    losses = []
    for window in windows:
        for place in range(1, len(window)):
            found = scores(model, codes, window[:place].tolist())
            if smoothing == 0.0:
                losses.append(-found[window[place]])
                continue
            total, prefix = 0.0, []
            for code in codes[window[place]]:  # p of a code: the mass of the items that have it
                fit = [n for n, sid in enumerate(codes) if sid[: len(prefix)] == prefix]
                mass = {c: 0.0 for c in sorted({codes[n][len(prefix)] for n in fit})}
                for n in fit:
                    mass[codes[n][len(prefix)]] += np.exp(found[n])
                nll = {c: -np.log(m / sum(mass.values())) for c, m in mass.items()}
                total += (1 - smoothing) * nll[code] + smoothing * np.mean(list(nll.values()))
                prefix.append(code)
            losses.append(total)
    before, model.recipe = model.recipe, recipe
    try:
        assert float(model.loss(batch).detach()) == pytest.approx(np.mean(losses), rel=1e-4)
    finally:
        model.recipe = before


def test_validation_equals_metrics_over_lists(random_model, prepared_run: Path) -> None:
    valid = Dataset.load(prepared_run / "dataset").examples("valid")
    figures = tiger.validate(random_model, valid)
    rankings = random_model.rank(valid.histories, width=30, exclude_history=[False, True])
    for name, ranking in zip(("kept", "excluded"), rankings, strict=True):
        found = metrics.ranking_metrics(ranking.items_EW, valid.targets_E)
        assert figures[f"{name}/R@10"] == found["R@10"].mean()
        assert figures[f"{name}/N@10"] == found["N@10"].mean()


def test_the_command_tunes_a_run_with_several_seeds(
    prepared_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = "{learning_rate: [1e-2], epochs: [1, 2], dim: [16], layers: [1], beam_width: [10]}"
    assert tiger.main([str(prepared_run), "--grid", grid, "--seed", "0", "--seed", "1"]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["dim"] == 16
    assert printed.err.count("over 2 seeds") == 2
    assert tiger.main([str(prepared_run), "--grid", "{beam: [10]}"]) == 2
    assert "did you mean 'beam_width'?" in capsys.readouterr().err


def test_what_cannot_be_trained_is_refused(prepared_run: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"dim": 20, "heads": 4}, "dim 20 must be a multiple of twice the heads 4"),
        ({"beam_width": 9}, "beam_width must be at least 10"),
    ):
        with pytest.raises(ValueError, match=message):
            tiger.train(prepared_run, tiger.TigerRecipe(**changes))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dataset").symlink_to(prepared_run / "dataset")
    with pytest.raises(ValueError, match="sids is missing or incomplete; run `whyrec index"):
        tiger.train(tmp_path / "run", SMALL)


@pytest.mark.parametrize("name", ["ml-100k", "beauty"])
def test_the_recipes_that_ship_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "recipes" / name / "tiger.yaml"
    recipe = load_recipe(tiger.TigerRecipe, path)
    assert recipe.dim % (2 * recipe.heads) == 0 and recipe.beam_width >= 10


def test_nodes_before_each_code_are_the_tries(random_model, extended) -> None:
    for item, level in itertools.product(range(NUM_ITEMS), range(len(LEVEL_SIZES))):
        node = extended.trie.walk(extended.codes_NL[item, :level])
        assert int(random_model.nodes_NL[item, level]) == int(node)
