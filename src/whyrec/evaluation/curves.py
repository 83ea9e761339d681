"""Recorded numbers as they are plotted: learning curves, rows with intervals, gain against cost.

Learning curves come from what trainers leave behind: the log in a finished stage's `stage.json`, or
the `trainer_state.json` of the newest checkpoint of one that is still running. Everything else
comes from records (`evaluation/results.py`), over whose seeds means are taken.

    curves, missing = learning_curves(Path("runs/ml-100k"))
    rows = ranking_rows(records, history="excluded", metric="N@10")
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whyrec.evaluation.tables import MODEL_NAMES

Series = list[tuple[int, float]]  # step and value
TRAINED = {"aligned": "whyrec align", "activated": "whyrec activate", "enhanced": "whyrec enhance"}


@dataclass(frozen=True)
class Curve:
    """The log of one training.

    Attributes:
        stage: aligned, activated or enhanced.
        series: figure as the trainer names it (`loss`, `eval_N@10`, …) → steps and values.
        best_step: of the checkpoint that was kept; None where none was chosen.
        finished: whether the stage is.
    """

    stage: str
    series: dict[str, Series]
    best_step: int | None
    finished: bool


@dataclass(frozen=True)
class Row:
    """A figure with its interval, for one model.

    Attributes:
        model: its key in the records.
        name: as tables show it.
        value: mean over the records.
        low, high: ends of the 95 % interval, means over the records; None where not recorded.
        values: one a record.
    """

    model: str
    name: str
    value: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Cost:
    """What a way of ranking costs a user, and what it gains over not thinking.

    Attributes:
        name: no thinking, thinking, or both mixed.
        tokens, seconds: a user; None where not recorded.
        gains: metric → relative gain with its ends; empty for the base.
    """

    name: str
    tokens: float | None
    seconds: float | None
    gains: dict[str, tuple[float, float, float]]


def learning_curves(run: Path) -> tuple[list[Curve], list[str]]:
    """The trainings of a run folder, and what is missing, in sentences."""
    curves, missing = [], []
    for stage, command in TRAINED.items():
        folder = run / "model" / stage
        if (folder / "stage.json").exists():
            summary = _read(folder / "stage.json").get("summary") or {}
            if summary.get("log"):
                curves.append(
                    Curve(
                        stage, series_of(summary["log"]), summary.get("best_checkpoint_step"), True
                    )
                )
            else:
                missing.append(f"the stage {stage} kept no log of its training")
            continue
        state = newest_state(folder.with_name(f".{stage}.partial"))
        if state is not None:
            log = state.get("log_history", [])
            curves.append(Curve(stage, series_of(log), state.get("best_global_step"), False))
            missing.append(
                f"{stage} is not finished: {state.get('global_step', 0):,} of "
                f"{state.get('max_steps', 0):,} steps; run `{command}` again to go on"
            )
        else:
            missing.append(f"no {stage} model; `{command} --run {run}` makes it")
    return curves, missing


def newest_state(folder: Path) -> dict | None:
    """The `trainer_state.json` below a folder that has come furthest; None where there is none."""
    states = [_read(path) for path in folder.glob("**/trainer_state.json")]
    return max(states, key=lambda state: state.get("global_step", 0), default=None) or None


def series_of(log: Sequence[Mapping]) -> dict[str, Series]:
    """A trainer's log by figure; where a step was logged twice, after a resume, the last counts."""
    found: dict[str, dict[int, float]] = {}
    for entry in log:
        for key, value in entry.items():
            if key not in ("step", "epoch") and isinstance(value, int | float):
                found.setdefault(key, {})[int(entry.get("step", 0))] = float(value)
    return {key: sorted(points.items()) for key, points in found.items()}


def ranking_rows(
    records: Sequence[Mapping], *, history: str, metric: str, split: str = "test"
) -> list[Row]:
    """A metric of every model that the records hold, the best first."""
    suffix = f"/{split}/{history}/{metric}"
    models = {
        key.removesuffix(suffix)
        for entry in records
        for key in entry["figures"]
        if key.endswith(suffix) and "/" not in key.removesuffix(suffix)
    }
    rows = [
        Row(
            model,
            MODEL_NAMES.get(model, model),
            float(np.mean(_values(records, model + suffix))),
            _mean(records, f"{model}{suffix}/low"),
            _mean(records, f"{model}{suffix}/high"),
            tuple(_values(records, model + suffix)),
        )
        for model in models
    ]
    return sorted(rows, key=lambda row: (-row.value, row.name))


def published_rows(published: Mapping, metric: str) -> list[Row]:
    """A metric of the rows of `eval/published/NAME.json`; rows without it are left out."""
    rows = [
        Row("published", row["model"], row["figures"][metric], None, None, ())
        for row in published["rows"]
        if metric in row["figures"]
    ]
    return sorted(rows, key=lambda row: (-row.value, row.name))


def costs(records: Sequence[Mapping]) -> list[Cost]:
    """Thinking's gain and cost; empty where no record has any."""
    tokens, seconds = _mean(records, "cost/think/tokens"), _mean(records, "cost/think/seconds")
    if tokens is None and seconds is None:
        return []
    base = _mean(records, "cost/no-think/seconds")
    both = None if seconds is None or base is None else seconds + base
    found = [
        Cost("no thinking", 0.0, base, {}),
        Cost("thinking", tokens, seconds, _gains(records, "think")),
    ]
    fused = _gains(records, "fused")
    return [*found, Cost("both mixed", tokens, both, fused)] if fused else found


def _gains(records: Sequence[Mapping], name: str) -> dict[str, tuple[float, float, float]]:
    found = {}
    for metric in ("R@10", "N@10"):
        ends = [_mean(records, f"{name}_gain/{metric}{end}") for end in ("", "/low", "/high")]
        if None not in ends:
            found[metric] = (ends[0], ends[1], ends[2])
    return found  # type: ignore[return-value]


def _values(records: Sequence[Mapping], key: str) -> list[float]:
    return [float(entry["figures"][key]) for entry in records if key in entry["figures"]]


def _mean(records: Sequence[Mapping], key: str) -> float | None:
    values = _values(records, key)
    return float(np.mean(values)) if values else None


def _read(path: Path) -> dict:
    """A JSON file; {} for one that a killed run left broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
