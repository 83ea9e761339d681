"""An ablation table: align and rank one row after the other, each with one thing changed.

    python eval/ablation.py recipes/beauty/ablation.yaml --run runs/beauty \
        --json eval/results/beauty/ablation [--gpus 2] [--only NAME --only NAME]

A row of the table names what differs from the recipe, and nothing else:

    random weights: {align: {random_weights: true}}
    text SIDs:      {sids: runs/beauty-text/sids}       # another `whyrec index` of the data set
    beam 50:        {evaluate: {beams: 50}, of: whole}  # ranks with the model of the row `whole`

What all rows change alike stands above them, as `align:` of the table; a row may change it back.
Every row is a run folder of its own, `RUN-ablation/NAME`, made by `whyrec align` and measured by
`whyrec evaluate` on the validation split, which ablations are read on: the test split is for the
recipe. Rows that are done are not done again; a killed one goes on where it was. With several GPUs
as many rows run side by side, the next one on whichever is free.
"""

import argparse
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

KEYS = {"align", "evaluate", "sids", "of"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="the rows, e.g. recipes/beauty/ablation.yaml")
    parser.add_argument("--run", type=Path, required=True, help="prepared and indexed")
    parser.add_argument("--json", type=Path, required=True, help="folder of the records")
    parser.add_argument(
        "--gpus", type=int, default=1, help="rows at once, each on a GPU of its own"
    )
    parser.add_argument("--only", action="append", default=[], help="these rows alone")
    options = parser.parse_args()
    try:
        recipe, rows = read_table(options.table, only=options.only)
    except ValueError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    failed: list[str] = []
    # Rows that rank with another row's model come after all that train one.
    for borrowed in (False, True):
        waiting: queue.Queue[str] = queue.Queue()
        for name, row in rows.items():
            if ("of" in row) == borrowed:
                waiting.put(name)
        workers = [
            threading.Thread(target=_work, args=(waiting, gpu, options, recipe, rows, failed))
            for gpu in range(options.gpus)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if failed:
        print(f"ablation: failed, see their logs: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def read_table(path: Path, *, only: list[str]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The recipe that rows differ from, and the rows.

    Raises:
        ValueError: for a row that says something unknown, or rests on a row that is not there.
    """
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe, rows = path.parent / table["recipe"], table["rows"]
    shared = table.get("align", {})
    for name, row in rows.items():
        if unknown := set(row) - KEYS:
            raise ValueError(f"row {name!r} has {unknown.pop()!r}; known are {sorted(KEYS)}")
        if row.get("of", name) not in rows:
            raise ValueError(f"row {name!r} is of {row['of']!r}, which is no row")
    if missing := set(only) - set(rows):
        raise ValueError(f"{path} has no row {missing.pop()!r}; it has {', '.join(rows)}")
    return recipe, {
        name: row | {"align": shared | row.get("align", {})}
        for name, row in rows.items()
        if not only or name in only
    }


def _work(
    waiting: "queue.Queue[str]",
    gpu: int,
    options: argparse.Namespace,
    recipe: Path,
    rows: Mapping[str, dict[str, Any]],
    failed: list[str],
) -> None:
    """Take rows until there are none."""
    while True:
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            return
        for command in commands(name, rows[name], options.run, recipe, options.json):
            log = folder_of(options.run, name) / "log.txt"
            print(f"ablation: {name}: {shlex.join(command)}", flush=True)
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
            with log.open("ab") as file:
                done = subprocess.run(
                    [sys.executable, "-m", "whyrec.cli", *command[1:]],
                    stdout=file,
                    stderr=file,
                    env=environment,
                )
            if done.returncode:
                print(f"ablation: {name} has failed; its end says why: {log}", file=sys.stderr)
                failed.append(name)
                break
        else:
            path = options.json / f"{_slug(name)}.json"
            figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
            shown = " ".join(
                f"{metric} {figures[f'whyrec/valid/excluded/{metric}']:.4f}"
                for metric in ("R@5", "R@10", "N@5", "N@10")
            )
            print(f"ablation: {name}: {shown}", flush=True)


def commands(
    name: str, row: Mapping[str, Any], run: Path, recipe: Path, records: Path
) -> list[list[str]]:
    """What a row runs; its run folder is made, with links to the data set and the SIDs."""
    folder = folder_of(run, name)
    folder.mkdir(parents=True, exist_ok=True)
    for part, target in (
        ("dataset", run / "dataset"),
        ("sids", Path(row.get("sids", run / "sids"))),
    ):
        if not (folder / part).exists():
            (folder / part).symlink_to(target.resolve())
    made_in = folder_of(run, row["of"]) if "of" in row else folder
    changes = [f"--set={key}={json.dumps(value)}" for key, value in row.get("align", {}).items()]
    align = ["whyrec", "align", "--run", str(folder), "--recipe", str(recipe), *changes]
    ranked = row.get("evaluate", {})
    evaluate = ["whyrec", "evaluate", str(made_in / "model" / "aligned"), "--run", str(folder)]
    evaluate += [
        "--split",
        "valid",
        "--no-baselines",
        "--json",
        str(records / f"{_slug(name)}.json"),
    ]
    evaluate += [f"--{key}={value}" for key, value in ranked.items() if value is not True]
    evaluate += [f"--{key}" for key, value in ranked.items() if value is True]
    return [evaluate] if "of" in row else [align, evaluate]


def folder_of(run: Path, name: str) -> Path:
    """A row's run folder."""
    return run.with_name(f"{run.name}-ablation") / _slug(name)


def _slug(name: str) -> str:
    return "-".join(re.findall(r"\w+", name.lower().replace(",", "")))


if __name__ == "__main__":
    sys.exit(main())
