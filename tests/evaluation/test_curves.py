"""Numbers as they are plotted: logs of trainers, rows with intervals, gain against cost."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from whyrec.evaluation import plots
from whyrec.evaluation.curves import (
    Cost,
    Curve,
    Row,
    costs,
    learning_curves,
    newest_state,
    published_rows,
    ranking_rows,
    series_of,
)
from whyrec.evaluation.figures import COLOURS, svg

LOG = [
    {"loss": 3.0, "learning_rate": 1e-3, "epoch": 0.1, "step": 1},
    {"loss": 2.5, "epoch": 0.2, "step": 2},
    {"eval_N@10": 0.1, "eval_R@10": 0.2, "epoch": 0.2, "step": 2},
    {"loss": 2.4, "epoch": 0.2, "step": 2},  # resumed
    {"train_runtime": 5.0, "note": "text", "step": 2},
]


def entry(**figures: float) -> dict:
    return {"name": "n", "figures": {key.replace("__", "/"): v for key, v in figures.items()}}


def test_a_log_by_figure() -> None:
    found = series_of(LOG)
    assert found["loss"] == [(1, 3.0), (2, 2.4)] and found["eval_N@10"] == [(2, 0.1)]
    assert "note" not in found and "step" not in found and "epoch" not in found


def test_finished_running_and_missing_trainings(tmp_path: Path) -> None:
    stage = tmp_path / "model" / "aligned"
    stage.mkdir(parents=True)
    summary = {"log": LOG, "best_checkpoint_step": 2}
    (stage / "stage.json").write_text(json.dumps({"summary": summary}))
    for step in (5, 20, 10):
        folder = tmp_path / "model" / ".activated.partial" / ".steps" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        state = {"global_step": step, "max_steps": 40, "log_history": [{"loss": 1.0, "step": step}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder.parent / "checkpoint-30").mkdir()
    (folder.parent / "checkpoint-30" / "trainer_state.json").write_text('{"global_st')  # killed
    curves, missing = learning_curves(tmp_path)
    assert [(c.stage, c.finished, c.best_step) for c in curves] == [
        ("aligned", True, 2),
        ("activated", False, None),
    ]
    assert curves[1].series == {"loss": [(20, 1.0)]}
    assert "20 of 40 steps" in missing[0] and "no enhanced model" in missing[1]
    assert newest_state(tmp_path / "nowhere") is None
    (stage / "stage.json").write_text("{}")
    assert "kept no log" in learning_curves(tmp_path)[1][0]


def test_rows_are_means_over_seeds_best_first() -> None:
    records = [
        entry(
            **{
                "whyrec/test/excluded/N@10": 0.10 + seed,
                "whyrec/test/excluded/N@10/low": 0.08,
                "whyrec/test/excluded/N@10/high": 0.12 + seed,
                "popularity/test/excluded/N@10": 0.05,
                "gain_over/popularity/test/excluded/N@10": 0.05,  # no model of its own
                "whyrec/valid/excluded/N@10": 0.9,
            }
        )
        for seed in (0.0, 0.02)
    ]
    rows = ranking_rows(records, history="excluded", metric="N@10")
    assert [row.model for row in rows] == ["whyrec", "popularity"]
    assert rows[0].name == "WhyRec" and rows[0].value == pytest.approx(0.11)
    assert (rows[0].low, rows[0].high) == (pytest.approx(0.08), pytest.approx(0.13))
    assert rows[0].values == pytest.approx((0.10, 0.12)) and rows[1].low is None
    assert ranking_rows(records, history="kept", metric="N@10") == []
    printed = {"rows": [{"model": "A", "figures": {"R@10": 0.1}}, {"model": "B", "figures": {}}]}
    assert [row.name for row in published_rows(printed, "R@10")] == ["A"]


def test_what_thinking_costs_and_gains() -> None:
    figures = {"cost/think/tokens": 30.0, "cost/think/seconds": 2.0, "cost/no-think/seconds": 0.5}
    figures |= {f"think_gain/R@10{end}": v for end, v in (("", 0.1), ("/low", 0.0), ("/high", 0.2))}
    plain, thinking = costs([{"figures": figures}])
    assert plain == Cost("no thinking", 0.0, 0.5, {})
    assert thinking == Cost("thinking", 30.0, 2.0, {"R@10": (0.1, 0.0, 0.2)})
    figures |= {f"fused_gain/N@10{end}": 0.1 for end in ("", "/low", "/high")}
    mixed = costs([{"figures": figures}])[2]
    assert mixed == Cost("both mixed", 30.0, 2.5, {"N@10": (0.1, 0.1, 0.1)})
    (axes,) = plots.gain_plot([plain, thinking, mixed]).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "both mixed: 30 tokens, 2.5 s",
        "thinking: 30 tokens, 2 s",
        "no thinking: 0 tokens, 0.5 s",
    ]
    assert costs([{"figures": {"whyrec/test/kept/N@10": 0.1}}]) == []


def test_lines_hold_what_was_logged() -> None:
    figure = plots.learning_plot(Curve("aligned", series_of(LOG), 2, True))
    loss, valid = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 3.0], [2, 2.4]]
    assert [line.get_label() for line in valid.lines[:2]] == ["N@10", "R@10"]
    assert plots.learning_plot(Curve("aligned", {}, None, False)).axes  # nothing logged yet


def test_intervals_reach_from_end_to_end_with_the_best_on_top() -> None:
    rows = [Row("sasrec", "SASRec", 0.1, 0.08, 0.12, (0.1,)), Row("a", "A", 0.2, None, None, ())]
    (axes,) = plots.interval_plot(rows, metric="N@10").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SASRec", "A"]
    assert axes.lines[0].get_xdata().tolist() == [0.08, 0.12]
    assert plots.interval_plot([], metric="N@10").axes


def test_an_svg_asks_for_nothing_and_follows_the_page() -> None:
    rows = [Row("whyrec", "<b>Why</b> & $x^2$", 0.1, 0.08, 0.12, (0.1,))]
    text = svg(plots.interval_plot(rows, metric="N@10"), label='N@10 of "all"')
    assert text.startswith('<svg role="img" aria-label="N@10 of &quot;all&quot;"')
    assert "&lt;b&gt;Why&lt;/b&gt; &amp; $x^2$" in text  # text as it is: no markup, no formula
    assert f"var(--ours, {COLOURS['ours']})" in text
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', text)
    assert all((a or b).startswith(("#", "data:")) for a, b in links)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and all(i.startswith("n-10-of-all-") for i in ids)
    assert text == svg(plots.interval_plot(rows, metric="N@10"), label='N@10 of "all"')


def test_a_map_shows_a_sample_of_a_large_catalogue() -> None:
    rng = np.random.default_rng(0)
    codes_NL = rng.integers(0, 4, (4000, 3))
    figure = plots.map_plot(rng.normal(size=(4000, 2)), codes_NL, shares=(0.2, 0.1))
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 3
    assert len(shown[0].collections[0].get_offsets()) == 1500
    assert len(np.unique(shown[0].collections[0].get_facecolors(), axis=0)) == 4
