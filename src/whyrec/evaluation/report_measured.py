"""Sections of a run's report on what was measured: results, thinking, traces, latency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whyrec.evaluation import plots
from whyrec.evaluation.curves import costs, published_rows, ranking_rows
from whyrec.evaluation.report_parts import Section, Table, interval, means, plot, signed
from whyrec.evaluation.tables import METRICS

_HISTORIES = {"excluded": "history excluded", "kept": "history kept"}
_TRACE_WORDS = {
    "trace/facts_true": "facts named that are true",
    "trace/facts_named": "facts named a trace",
    "trace/well_formed": "traces that are whole, and nothing else",
    "trace/possible": "traces whose announcement some item bears",
    "trace/median_tokens": "tokens of a trace, median",
    "trace/distinct": "distinct traces",
    "trace/distinct_1": "distinct words",
    "trace/distinct_2": "distinct pairs of words",
    "trace/swapped": "users whose category could be swapped",
    "trace/decoder_follows": "swapped category: users whose list follows",
    "trace/new_category/before": "swapped category: its share of the list before",
    "trace/new_category/after": "swapped category: its share of the list after",
}


def results_section(records: Sequence[Mapping], published: Mapping | None, run: Path) -> Section:
    """Our figures with intervals, the baselines', and what was published."""
    section = Section("results", "Results")
    if not records:
        section.missing.append(
            f"no results; `whyrec evaluate MODEL --run {run}` measures them, with baselines"
        )
        _published(section, published)
        return section
    for history, title in _HISTORIES.items():
        found = {
            metric: ranking_rows(records, history=history, metric=metric) for metric in METRICS
        }
        if not found["N@10"]:
            section.missing.append(f"no ranking of the test split with {title}")
            continue
        printed = published_rows(published, "N@10") if published and history == "excluded" else []
        section.plots.append(
            plot(
                plots.interval_plot(found["N@10"], metric="N@10", published=printed),
                f"N@10, {title}, with 95 % intervals"
                + ("; hollow: as published, other protocols may differ" if printed else ""),
            )
        )
        by_model = {m: {row.model: row for row in rows} for m, rows in found.items()}
        section.tables.append(
            Table(
                f"Test, {title}: figure [95 % interval]"
                + (f", means over {len(records)} records" if len(records) > 1 else ""),
                ["model", *METRICS],
                [
                    [row.name, *(interval(by_model[metric].get(row.model)) for metric in METRICS)]
                    for row in found["N@10"]
                ],
            )
        )
    _gains(section, records)
    _published(section, published)
    ranked = ranking_rows(records, history="excluded", metric="N@10")
    if all(row.model.startswith("whyrec") for row in ranked):
        section.missing.append("no baselines; evaluate without --no-baselines")
    return section


def _published(section: Section, published: Mapping | None) -> None:
    if published is None:
        section.missing.append(
            "no published figures to stand beside; name their file with --published"
        )
    else:
        section.tables.append(
            Table(
                f"As published: {published['dataset']}, {published['protocol']}",
                ["model", "source", *METRICS],
                [
                    [row["model"], _source(row), *(row["figures"].get(m) for m in METRICS)]
                    for row in published["rows"]
                ],
            )
        )


def _source(row: Mapping) -> str:
    second_hand = "" if row.get("read_at_source", True) else "second hand"
    return "; ".join(part for part in (row["source"], row.get("note", ""), second_hand) if part)


def _gains(section: Section, records: Sequence[Mapping]) -> None:
    rows = []
    for history in _HISTORIES:
        for row in ranking_rows(records, history=history, metric="N@10"):
            keys = [f"gain_over/{row.model}/test/{history}/{m}" for m in ("R@10", "N@10")]
            cells = [signed(records, key) for key in keys]
            if any(cells):
                rows.append([f"{row.name}, {_HISTORIES[history]}", *cells])
    if rows:
        header = ["WhyRec minus", "R@10", "N@10"]
        section.tables.append(
            Table("Gain, paired by user: difference [95 % interval]", header, rows)
        )


def thinking_section(records: Sequence[Mapping]) -> Section:
    """Thinking's gain and cost."""
    section = Section("thinking", "Thinking: gain and cost")
    found = costs(records)
    if not found:
        section.missing.append(
            "no figures with thinking; `whyrec evaluate MODEL --think both` measures them, for a "
            "model that `whyrec activate` made"
        )
        return section
    if any(cost.gains for cost in found):
        section.plots.append(
            plot(
                plots.gain_plot(found),
                "Relative gain over not thinking against what it costs a user",
            )
        )
    else:
        section.missing.append("no gain: thinking was measured alone; use --think both")
    rows = []
    for cost in found:
        gains = [cost.gains.get(metric) for metric in ("R@10", "N@10")]
        told = [f"{g[0]:+.1%} [{g[1]:+.1%}, {g[2]:+.1%}]" if g else None for g in gains]
        rows.append([cost.name, cost.tokens, cost.seconds, *told])
    section.tables.append(
        Table(
            "Cost a user, and gain over not thinking at equal inputs, paired [95 % interval]",
            ["", "thought tokens", "seconds", "R@10", "N@10"],
            rows,
        )
    )
    return section


def faithfulness_section(records: Sequence[Mapping]) -> Section:
    """Whether traces are true, and whether items follow them."""
    section = Section("faithfulness", "Are the traces true, and do the items follow?")
    values = means(records, "trace/")
    if "trace/facts_true" not in values:
        section.missing.append(
            "traces were not checked; `whyrec evaluate MODEL --think both --traces` does it"
        )
        return section
    rows: list[list[Any]] = [
        [words, values[key]] for key, words in _TRACE_WORDS.items() if key in values
    ]
    section.tables.append(Table("Of all test users", ["", "value"], rows))
    kinds = [k for k in values if k.startswith("trace/agreement/") and not k.endswith("/others")]
    if kinds:
        section.tables.append(
            Table(
                "Share of the recommended items that bear what the trace announced",
                ["announced", "own list", "another user's list"],
                [[k.split("/")[2], values[k], values.get(f"{k}/others")] for k in kinds],
            )
        )
    others = [key.split("/")[2] for key in values if key.startswith("trace/kept/")]
    if others:
        section.tables.append(
            Table(
                "The same beam behind another thought",
                ["thought", "share of the list that stays", "N@10"],
                [["its own", 1.0, values.get("trace/N@10/own")]]
                + [
                    [n.replace("_", " "), values[f"trace/kept/{n}"], values.get(f"trace/N@10/{n}")]
                    for n in others
                ],
            )
        )
    return section


def latency_section(records: Sequence[Mapping]) -> Section:
    """Seconds a user of the evaluation, and whatever a bench of serving recorded."""
    section = Section("latency", "Latency")
    told: list[list[Any]] = []
    for name, way in (("no thinking", "no-think"), ("thinking", "think")):
        for value in means(records, f"cost/{way}/seconds").values():
            told.append([f"evaluation, {name}, seconds a user", value])
    for prefix in ("serve/", "serve_cpu/", "beam_cpu/", "evaluate/"):
        told += [[key, value] for key, value in means(records, prefix).items()]
    if told:
        section.tables.append(Table("Measured", ["", "value"], told))
    else:
        section.missing.append("no seconds were recorded; `whyrec evaluate --think both` does")
    if not any(str(name).startswith("serve") for name, _ in told):
        section.missing.append(
            "no latency of serving; add its records with --results eval/results/serve"
        )
    return section
