"""`whyrec report`: one page that tells a whole run, and the same as Markdown for a model card.

    whyrec report --run runs/ml-100k                    # writes runs/ml-100k/eval/report.{html,md}
    whyrec report --run runs/beauty --results eval/results/beauty --published \\
        eval/published/beauty.json

Data card, SIDs, training curves, results with intervals beside baselines and published figures,
thinking's gain and cost, faithfulness, good and bad traces, latency, and how all of it was made.
What a run does not have yet is named with the command that makes it, and the rest is shown. The
page asks for nothing outside of itself and follows the reader's light or dark setting.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whyrec.catalog.dataset import Dataset
from whyrec.evaluation.curves import TRAINED
from whyrec.evaluation.gallery import gallery
from whyrec.evaluation.pages import DARK, LIGHT, page
from whyrec.evaluation.report_made import data_section, sid_section, training_section
from whyrec.evaluation.report_measured import (
    faithfulness_section,
    latency_section,
    results_section,
    thinking_section,
)
from whyrec.evaluation.report_parts import Section, Table, read_json
from whyrec.evaluation.results import read_results
from whyrec.evaluation.trace_view import TraceReader
from whyrec.stage import fingerprint, write_text

_STAGES = {
    "dataset": "whyrec prepare",
    "sids": "whyrec index",
    **{f"model/{stage}": command for stage, command in TRAINED.items()},
}


def report(
    run: Path,
    *,
    results: Sequence[Path] = (),
    published: Path | None = None,
    output: Path | None = None,
) -> list[Path]:
    """Write `report.html` and `report.md`, atomically.

    Args:
        run: a run folder, at least with a data set.
        results: folders of records, such as `eval/results/beauty` with one a seed; the run's own
            `eval/results.json` when there are none.
        published: a file of `eval/published`; `eval/published/RUN.json` when None, if it is there.
        output: the folder to write into; `run/eval` when None.

    Returns:
        The two files.

    Raises:
        ValueError: when the folder is no run, or a record is damaged.
    """
    if not any((run / stage / "stage.json").exists() for stage in _STAGES):
        raise ValueError(
            f"{run} is no run folder: no stage is finished there; name one such as runs/NAME, or "
            f"begin with `whyrec prepare SOURCE --run {run}`"
        )
    records = records_of(run, results)
    published = published or Path("eval") / "published" / f"{run.resolve().name}.json"
    printed = read_json(published)
    sections = [
        data_section(run),
        sid_section(run),
        training_section(run),
        results_section(records, printed, run),
        thinking_section(records),
        faithfulness_section(records),
        _gallery_section(run),
        latency_section(records),
        _made_section(run, records),
    ]
    values: dict[str, Any] = {
        "name": run.resolve().name,
        "stages": _stage_table(run),
        "sections": sections,
        "model": _model(run),
    }
    folder = output or run / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        folder / "report.html": page("report.html.j2", **values, light=LIGHT, dark=DARK),
        folder / "report.md": page("report.md.j2", **values),
    }
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def records_of(run: Path, folders: Sequence[Path] = ()) -> list[dict]:
    """What was measured: the records in the folders; without any, the run's own.

    Raises:
        ValueError: for a folder without records, or a damaged one.
    """
    found: list[dict] = []
    for folder in folders:
        records = read_results(folder)
        if not records:
            raise ValueError(f"{folder} holds no records; name one such as eval/results/NAME")
        found += records
    if not folders and (own := read_json(run / "eval" / "results.json")) is not None:
        if "figures" not in own:
            raise ValueError(f"{run / 'eval' / 'results.json'} holds no figures; evaluate again")
        found.append(own)
    return found


def _model(run: Path) -> str:
    """The stage of the newest model; "" for none."""
    made = [stage for stage in TRAINED if (run / "model" / stage / "stage.json").exists()]
    return made[-1] if made else ""


def _stage_table(run: Path) -> Table:
    rows: list[list[Any]] = []
    for stage, command in _STAGES.items():
        made = read_json(run / stage / "stage.json")
        if made is None:
            rows.append([stage, "not made", None, f"{command} …"])
        else:
            rows.append([stage, _when(made["started"]), made["seconds"], made["command"]])
    return Table("Stages", ["stage", "started", "seconds", "command"], rows)


def _gallery_section(run: Path) -> Section:
    section = Section("gallery", "Good and bad traces")
    if not (run / "dataset" / "items.parquet").exists():
        section.missing.append("no data set, without which traces cannot be read")
        return section
    path = run / "eval" / "traces.parquet"
    if not path.exists():
        section.traces, section.missing = gallery(path, None, None)  # type: ignore[arg-type]
        return section
    dataset = Dataset.load(run / "dataset")
    prompts = run / "model" / _model(run) / "prompts"
    reader = TraceReader(dataset.items, template_folder=prompts)
    section.traces, section.missing = gallery(path, reader, dataset)
    section.text.append(
        "Each fact is looked for among the history that the prompt showed; what is announced, in "
        "the catalogue. The best and the worst are shown, and which these are is decided by the "
        "table of all traces alone."
    )
    return section


def _made_section(run: Path, records: Sequence[Mapping]) -> Section:
    section = Section("made", "How it was measured")
    if not records:
        section.missing.append("nothing was measured yet")
        return section
    data = fingerprint(run / "dataset") if (run / "dataset").is_dir() else ""
    newest = max(
        (made["started"] for s in TRAINED if (made := read_json(run / "model" / s / "stage.json"))),
        default="",
    )
    rows = []
    for entry in records:
        rows.append(
            [
                entry["name"],
                str(entry["seed"]),
                entry["device"],
                entry["commit"][:12],
                _when(entry["date"]),
                entry["command"],
            ]
        )
        if entry.get("data_sha256") and entry["data_sha256"] != data:
            section.missing.append(f"{entry['name']!r} was measured on another data set than this")
        if newest and entry["date"] < newest:
            section.missing.append(
                f"{entry['name']!r} was measured before the newest model of this run was made"
            )
    section.tables.append(
        Table("Records", ["name", "seed", "device", "commit", "date", "command"], rows)
    )
    versions = records[-1].get("versions", {})
    section.text.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return section


def _when(date: str) -> str:
    return date[:16].replace("T", "\N{NO-BREAK SPACE}").replace("-", "\N{NON-BREAKING HYPHEN}")
