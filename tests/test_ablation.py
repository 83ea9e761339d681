"""The ablation's runner: rows with one thing changed, measured on validation, done once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "eval" / "ablation.py"


def ablate(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_rows_run_are_kept_and_not_done_again(run: Path, tmp_path: Path, backbone: Path) -> None:
    quick = {"backbone": str(backbone), "max_history": 8, "max_steps": 2, "batch_tokens": 512}
    quick |= {"replays": 0, "evaluations": 1, "valid_users": 4, "beam_width": 10, "lora_rank": 0}
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(quick))
    rows = {
        "Whole": {},
        "no captions, slower": {"align": {"captions": 0.0, "lr": 1e-4}},
        "beam 12": {"of": "Whole", "evaluate": {"beams": 12}},
    }
    table = tmp_path / "table.yaml"
    shared = {"lr": 1e-3, "max_history": 6}
    table.write_text(yaml.safe_dump({"recipe": "align.yaml", "align": shared, "rows": rows}))
    records = tmp_path / "records"
    done = ablate(table, "--run", run, "--json", records)
    assert done.returncode == 0, done.stderr
    assert sorted(path.stem for path in records.iterdir()) == [
        "beam-12",
        "no-captions-slower",
        "whole",
    ]
    made = run.with_name(f"{run.name}-ablation") / "no-captions-slower" / "model" / "aligned"
    config = json.loads((made / "stage.json").read_text())["config"]
    assert config["captions"] == 0.0 and config["lr"] == 1e-4 and config["max_steps"] == 2
    assert config["max_history"] == 6, "what all rows change alike"
    record = json.loads((records / "beam-12.json").read_text())
    assert "--beams=12" in record["command"]
    assert set(key.split("/")[1] for key in record["figures"] if "@" in key) == {"valid"}
    again = ablate(table, "--run", run, "--json", records, "--only", "Whole")
    log = (made.parents[2] / "whole" / "log.txt").read_text()
    assert again.returncode == 0 and "unchanged" in log


def test_a_table_that_cannot_be_is_refused(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    for rows, said in (
        ({"a": {"algin": {}}}, "'algin'"),
        ({"a": {"of": "b"}}, "no row"),
        ({"a": {}}, "has no row 'c'"),
    ):
        table.write_text(yaml.safe_dump({"recipe": "align.yaml", "rows": rows}))
        done = ablate(table, "--run", run, "--json", tmp_path / "r", "--only", "c")
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize("name", ["ablation.yaml", "variants.yaml"])
def test_the_tables_of_beauty_name_what_recipes_have(name: str) -> None:
    from whyrec.train.align_recipe import AlignRecipe

    table = yaml.safe_load((REPOSITORY / "recipes" / "beauty" / name).read_text())
    for row in [table, *table["rows"].values()]:
        assert set(row.get("align", {})) <= set(vars(AlignRecipe()))
