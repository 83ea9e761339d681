"""Thinking and not thinking in `evaluate`: rows, gains and costs against plain counting."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import NUM_USERS
from whyrec import Recommender
from whyrec.decode.ranking import Ranking
from whyrec.decode.thought_ranking import fuse
from whyrec.evaluation.evaluate import evaluate
from whyrec.evaluation.metrics import ranking_metrics
from whyrec.evaluation.report import figures_table
from whyrec.evaluation.thinking import think_gains

THOUGHTS = {"samples": 2, "max_tokens": 5, "temperature": 1.0, "weight": 0.25}


@pytest.fixture(scope="module")
def finished(saved_model, prepared_run, tmp_path_factory) -> tuple[Path, Path]:
    """A run and a model of random weights that thinks."""
    run = Path(shutil.copytree(prepared_run, tmp_path_factory.mktemp("thinks") / "run"))
    model = Path(shutil.copytree(saved_model, run / "model" / "activated"))
    values = json.loads((model / "whyrec.json").read_text())
    (model / "whyrec.json").write_text(json.dumps(values | {"thoughts": THOUGHTS}))
    return run, model


def metric(ranking: Ranking, targets_E: np.ndarray, name: str) -> float:
    return float(ranking_metrics(ranking.items_EW, targets_E, cutoffs=(10,))[name].mean())


def test_rows_and_costs(finished, extended) -> None:
    run, model = finished
    figures = evaluate(model, run, split="test", beams=20, think="both")
    test = extended.dataset.examples("test")
    recommender = Recommender.from_pretrained(model)
    plain = recommender.rank(test.histories, width=20, exclude_history=[True, False])
    thinking = recommender.rank_thinking(
        test.histories, width=20, exclude_history=[True, False], keys=test.users_E.tolist()
    )
    for place, history in enumerate(("excluded", "kept")):
        pair = [thinking.rankings[place], plain[place]]
        rows = {
            "whyrec": plain[place],
            "whyrec-think": thinking.rankings[place],
            "whyrec-fused": fuse(pair, weights=[0.25, 0.75], width=20),
        }
        for name, ranking in rows.items():
            for key in ("R@10", "N@10"):
                expected = metric(ranking, test.targets_E, key)
                assert figures[f"{name}/test/{history}/{key}"] == pytest.approx(expected)
    lengths = [[len(ids) for ids in own] for own in thinking.thoughts]
    assert figures["cost/think/tokens"] == pytest.approx(np.sum(lengths) / NUM_USERS)
    assert figures["trace/median_tokens"] == np.median(lengths)
    assert figures["cost/think/seconds"] > 0 and figures["cost/no-think/seconds"] > 0
    base = figures["whyrec/test/excluded/R@10"]
    gain = figures["whyrec-think/test/excluded/R@10"] / base - 1
    assert figures["think_gain/R@10"] == pytest.approx(gain)
    assert figures["think_gain/R@10/low"] <= gain <= figures["think_gain/R@10/high"]
    assert "fused_gain/N@10" in figures
    assert "whyrec-fused" in figures_table(figures)


def test_one_mode_alone(finished) -> None:
    run, model = finished
    both = evaluate(model, run, split="test", beams=20, think="both")
    on = evaluate(model, run, split="test", beams=20, think="on")
    off = evaluate(model, run, split="test", beams=20)
    for one, names in ((on, {"whyrec-think"}), (off, {"whyrec"})):
        ranked = {key for key in one if "/test/" in key}
        assert {key.split("/")[0] for key in ranked} == names
        assert {key: both[key] for key in ranked} == {key: one[key] for key in ranked}
    assert "cost/think/tokens" in on and not any("gain" in key for key in on)
    few = evaluate(model, run, split="test", beams=20, think="on", thoughts=1, temperature=0.0)
    assert 0 < few["cost/think/tokens"] <= 5 < on["cost/think/tokens"]


def test_gains_are_paired_and_relative() -> None:
    targets_E = np.arange(4)
    hits = lambda found: Ranking(  # noqa: E731
        np.where(np.array(found)[:, None], targets_E[:, None], 9) + np.zeros((1, 10), int),
        np.zeros((4, 10)),
    )
    plain, better = hits([1, 1, 0, 0]), hits([1, 1, 1, 0])
    gains = think_gains(plain, {"think": better}, targets_E, tokens=10)
    assert gains["think_gain/R@10"] == pytest.approx(0.5)
    assert gains["think_gain/R@10/per_token"] == pytest.approx(0.05)
    assert think_gains(hits([0, 0, 0, 0]), {"think": better}, targets_E, tokens=10) == {}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"think": "on", "prior_weight": 0.5}, "use --think both"),
        ({"traces": True}, "there are no traces without thinking"),
        ({"think": "on", "thoughts": 0}, "at least one thought"),
    ],
)
def test_what_cannot_be(finished, settings, sentence) -> None:
    run, model = finished
    with pytest.raises(ValueError, match=sentence):
        evaluate(model, run, split="test", beams=20, **settings)


def test_an_aligned_model_cannot_think(prepared_run, saved_model) -> None:
    with pytest.raises(ValueError, match="has not learnt to think; train it with"):
        evaluate(saved_model, prepared_run, split="test", beams=20, think="both")


def test_traces_are_written(finished) -> None:
    run, model = finished
    figures = evaluate(model, run, split="test", beams=20, think="on", traces=True)
    rows = pq.read_table(run / "eval" / "traces.parquet").to_pylist()
    assert len(rows) == NUM_USERS and all(len(row["items"]) == 10 for row in rows)
    assert 0 <= figures["trace/facts_true"] <= 1 and "trace/kept/other_user" in figures
    assert figures["trace/distinct"] == len({row["trace"] for row in rows}) / NUM_USERS


def test_gains_over_another_model_are_paired_by_user(finished, saved_model, extended) -> None:
    run, model = finished
    figures = evaluate(model, run, split="test", beams=20, think="both", against=saved_model)
    # The other model has the same weights and does not think: its prompt holds no thought.
    test = extended.dataset.examples("test")
    (theirs,) = Recommender.from_pretrained(saved_model).rank(test.histories, width=20)
    for row in ("whyrec", "whyrec-think", "whyrec-fused"):
        before = metric(theirs, test.targets_E, "N@10")
        gain = figures[f"{row}/test/excluded/N@10"] / before - 1
        assert figures[f"against/{row}/N@10"] == pytest.approx(gain)
        low, high = (figures[f"against/{row}/N@10/{end}"] for end in ("low", "high"))
        assert low <= gain <= high
    itself = evaluate(model, run, split="test", beams=20, think="both", against=model)
    assert all(value == 0 for key, value in itself.items() if key.startswith("against/"))
