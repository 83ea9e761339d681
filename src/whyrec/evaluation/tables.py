"""Markdown tables out of recorded results, and the README that shows them.

A folder `eval/results/FOLDER` with ranking figures becomes a table of the test split, history
excluded and kept. Any other folder becomes a list of its figures. Several records in the folder
itself, one a seed, give mean ± standard deviation over the seeds; without the latter where all
seeds agree, as those of a count do.

    python -m whyrec.evaluation.tables README.md            # fill in every marked table
    python -m whyrec.evaluation.tables README.md --check    # exit 1 when one is out of date

A marked table stands between `<!-- table:FOLDER -->` and `<!-- /table -->`; `FOLDER/NAME.json` is
one record of a folder whose records are not seeds of one run. Behind the name may stand, with
blanks between them:

* figure keys, `<!-- table:beam beam_cpu/1/ours_s -->`: those alone, in that order;
* `published:NAME`, `<!-- table:beauty published:beauty -->`: the rows of
  `eval/published/NAME.json` below ours, in the same ranking table;
* `each`, `<!-- table:beauty/ablation each -->`: the records are no seeds of one run but one row
  each, such as an ablation's: our model on validation, history excluded, the best first.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from whyrec.evaluation.results import read_results
from whyrec.stage import write_text

METRICS = ("R@5", "R@10", "N@5", "N@10")
MODEL_NAMES = {  # in the order of the rows; other models come last under their own names
    "popularity": "Popularity",
    "co-visitation": "Co-visitation counts",
    "co-visitation-tuned": "Co-visitation counts, tuned",
    "counts-and-words": "Counts and common words, tuned",
    "sasrec": "SASRec, full softmax",
    "tiger": "TIGER, our training",
    "aligned": "WhyRec, aligned",
    "activated": "WhyRec, activated",
    "whyrec": "WhyRec",
    "whyrec+prior": "WhyRec with a co-visitation prior",
    "whyrec+counts-and-words": "WhyRec, counts and words mixed in",
    "whyrec-think": "WhyRec, thinking",
    "whyrec-fused": "WhyRec, fused",
    "whyrec-ahead": "WhyRec, thought ahead",
}
_MARKED = re.compile(
    r"(<!-- table:([\w./-]+)((?: [\w./@+:-]+)*) -->\n)(.*?)(<!-- /table -->)", re.DOTALL
)

Cells = list[tuple[float, str]]  # value and text; nan for an empty cell


def render(records: Sequence[Mapping], published: Mapping | None = None) -> str:
    """The table of one folder's records.

    Args:
        records: what `read_results` gives: one record a run.
        published: a file of `eval/published`, for ranking tables.

    Returns:
        Markdown that ends in a newline.

    Raises:
        ValueError: when there are published rows and no ranking figures to stand beside.
    """
    values = collect(records)
    parts = []
    for history, title in (("excluded", "history excluded"), ("kept", "history kept")):
        rows = _measured_rows(values, history)
        if rows:
            parts.append((title, rows))
    if not parts:
        if published is not None:
            raise ValueError(
                "published rows stand beside ranking figures of the test split, and "
                f"{records[0]['name']} has none; take `published:` out of the marker"
            )
        table = _figure_list(values)
    else:
        if published is not None:
            rows = [(_published_name(row), _published_cells(row)) for row in published["rows"]]
            parts.append(("as published", rows))
        table = _ranking_table(parts)
    return f"{table}\n{_provenance(records)}\n"


def render_each(records: Sequence[Mapping]) -> str:
    """A table with one row a record: validation figures, and language kept where it is known.

    Raises:
        ValueError: when a record has no validation figures of our model.
    """
    keys = [f"whyrec/valid/excluded/{metric}" for metric in METRICS]
    ratio = "language/perplexity_ratio"
    for entry in records:
        if missing := [key for key in keys if key not in entry["figures"]]:
            raise ValueError(f"no figure {missing[0]!r} in {entry['name']}; `each` needs it")
    lines = [f"| | {' | '.join(METRICS)} | Perplexity |", "|---|" + "---:|" * (len(METRICS) + 1)]
    for entry in sorted(records, key=lambda entry: -entry["figures"][keys[-1]]):
        figures = entry["figures"]
        cells = [_cell([figures[key]])[1] for key in keys]
        cells.append(f"× {figures[ratio]:.2f}" if ratio in figures else "–")
        name = entry["name"].removesuffix(" valid").replace("-", " ")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nValidation, history excluded; {_seeds_and_devices(records)}.\n"


def fill(text: str, *, results: Path, published: Path) -> str:
    """The text with every marked table rendered anew.

    Raises:
        ValueError: for a marker without an end, a folder without results, or published rows that
            are not there or have no table to stand in.
    """
    starts, ends = text.count("<!-- table:"), text.count("<!-- /table -->")
    if starts != ends or starts != len(_MARKED.findall(text)):
        raise ValueError(
            "every <!-- table:FOLDER --> line needs a <!-- /table --> line after it; "
            f"found {starts} and {ends}"
        )

    def replacement(match: re.Match[str]) -> str:
        folder = match[2]
        records = read_results(results / folder)
        if not records:
            raise ValueError(f"{results / folder} holds no results; measure them first")
        words = match[3].split()
        if "each" in words:
            return f"{match[1]}{render_each(records)}{match[5]}"
        keys, rows = _options(words, published)
        table = render([_only(entry, keys) for entry in records], rows)
        return f"{match[1]}{table}{match[5]}"

    return _MARKED.sub(replacement, text)


def _options(words: Sequence[str], published: Path) -> tuple[list[str], dict | None]:
    """The figure keys that a marker names, and the published rows that it asks for."""
    names = [word.removeprefix("published:") for word in words if word.startswith("published:")]
    keys = [word for word in words if not word.startswith("published:")]
    if not names:
        return keys, None
    path = published / f"{names[-1]}.json"
    if not path.is_file():
        raise ValueError(f"there are no published figures at {path}; write them there or unmark it")
    return keys, json.loads(path.read_text(encoding="utf-8"))


def _only(entry: Mapping, keys: Sequence[str]) -> Mapping:
    """The record with those figures alone, in that order; without keys all of them, sorted."""
    figures = entry["figures"]
    missing = [key for key in keys if key not in figures]
    if missing:
        raise ValueError(f"no figure {missing[0]!r} in {entry['name']}; measure it or unmark it")
    return {**entry, "figures": {key: figures[key] for key in keys or sorted(figures)}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill in or check the tables of a Markdown file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m whyrec.evaluation.tables")
    parser.add_argument("file", type=Path, help="Markdown file with marked tables")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when stale")
    parser.add_argument("--results", type=Path, help="default: eval/results beside the file")
    parser.add_argument("--published", type=Path, help="default: eval/published beside the file")
    options = parser.parse_args(arguments)
    home = options.file.resolve().parent
    try:
        old = options.file.read_text(encoding="utf-8")
        new = fill(
            old,
            results=options.results or home / "eval" / "results",
            published=options.published or home / "eval" / "published",
        )
    except (ValueError, OSError) as error:
        print(f"whyrec: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if options.check:
        command = f"python -m whyrec.evaluation.tables {options.file}"
        print(f"whyrec: {options.file} has stale tables; run `{command}`", file=sys.stderr)
        return 1
    write_text(options.file, new)
    return 0


def collect(records: Sequence[Mapping]) -> dict[str, list[float]]:
    """Figure key → its value in every record that has it."""
    values: dict[str, list[float]] = {}
    for entry in records:
        for key, value in entry["figures"].items():
            values.setdefault(key, []).append(float(value))
    return values


def _measured_rows(values: Mapping[str, list[float]], history: str) -> list[tuple[str, Cells]]:
    suffix = f"/test/{history}/"
    wanted = {f"/test/{history}/{metric}" for metric in METRICS}
    found = {key.split("/")[0] for key in values if f"/{key.partition('/')[2]}" in wanted}
    order = [*(model for model in MODEL_NAMES if model in found), *sorted(found - set(MODEL_NAMES))]
    return [
        (MODEL_NAMES.get(model, model), [_cell(values.get(f"{model}{suffix}{m}")) for m in METRICS])
        for model in order
    ]


def _cell(values: list[float] | None) -> tuple[float, str]:
    if not values:
        return float("nan"), "–"
    mean = float(np.mean(values))
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(set(values)) > 1 else ""
    return mean, short(f"{mean:.4f}{spread}")


def short(text: str) -> str:
    """.0567 for 0.0567: the field's tables leave the zero out."""
    return re.sub(r"\b0\.", ".", text)


def _published_name(row: Mapping) -> str:
    remarks = [row["source"], row.get("note", "")]
    if not row.get("read_at_source", True):
        remarks.append("second hand")
    return f"{row['model']} ({'; '.join(remark for remark in remarks if remark)})"


def _published_cells(row: Mapping) -> Cells:
    return [_cell([row["figures"][m]] if m in row["figures"] else None) for m in METRICS]


def _ranking_table(parts: Sequence[tuple[str, list[tuple[str, Cells]]]]) -> str:
    """One table; the best value of a column is bold within each part."""
    lines = [f"| Model | | {' | '.join(METRICS)} |", "|---|---|" + "---:|" * len(METRICS)]
    for title, rows in parts:
        best = [_best([cells[column][0] for _, cells in rows]) for column in range(len(METRICS))]
        for name, cells in rows:
            texts = [
                f"**{text}**" if value == top else text
                for (value, text), top in zip(cells, best, strict=True)
            ]
            lines.append(f"| {name} | {title} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _best(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return max(known, default=float("nan"))


def _figure_list(values: Mapping[str, list[float]]) -> str:
    lines = ["| Figure | Value |", "|---|---:|"]
    for key in values:
        if key.rsplit("/", 1)[-1] in ("low", "high"):
            continue
        found = values[key]
        spread = f" ± {np.std(found, ddof=1):.3g}" if len(set(found)) > 1 else ""
        lines.append(f"| `{key}` | {_number(float(np.mean(found)))}{spread} |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _provenance(records: Sequence[Mapping]) -> str:
    """One line: by which commands, on which device, which seeds."""
    commands = list(dict.fromkeys(entry["command"] for entry in records if entry["command"]))
    by = f"Measured by {', '.join(f'`{command}`' for command in commands)}; " if commands else ""
    return f"{by}{_seeds_and_devices(records)}."


def _seeds_and_devices(records: Sequence[Mapping]) -> str:
    devices = dict.fromkeys(entry["device"] for entry in records)
    seeds = sorted({entry["seed"] for entry in records})
    word = "seed" if len(seeds) == 1 else "seeds"
    return f"{word} {', '.join(map(str, seeds))}; {', '.join(devices)}"


if __name__ == "__main__":
    sys.exit(main())
