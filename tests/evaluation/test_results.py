"""Records hold exactly the promised fields, and only finite figures."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from whyrec.evaluation import results


def test_a_record_holds_exactly_the_promised_fields(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.json"
    figures = {"sasrec/test/kept/R@10": np.float32(0.25), "users": np.int64(3)}
    results.record(path, name="demo", command="whyrec evaluate", seed=7, figures=figures)
    entry = json.loads(path.read_text(encoding="utf-8"))
    assert list(entry) == [
        *("name", "command", "commit", "date", "device", "seed", "versions"),
        *("data_sha256", "figures"),
    ]
    assert entry["figures"] == {"sasrec/test/kept/R@10": 0.25, "users": 3}
    assert (entry["seed"], entry["data_sha256"]) == (7, "")
    assert entry["date"][:2] == "20" and "whyrec" in entry["versions"]
    assert "core" in entry["device"] or "NVIDIA" in entry["device"]
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"'a/b' is (nan|inf)"):
        results.record(tmp_path / "r.json", name="", command="", seed=0, figures={"a/b": value})
    assert not list(tmp_path.iterdir())


def test_only_the_folder_itself_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "old/c.json"):
        results.record(tmp_path / name, name=name, command="", seed=0, figures={})
    assert [entry["name"] for entry in results.read_results(tmp_path)] == ["a.json", "b.json"]
    assert results.read_results(tmp_path / "none") == []


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("{}", "lacks name")])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json.*{message}|bad\.json {message}"):
        results.read_results(tmp_path)


def test_commit_says_whether_the_tree_has_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src" / "results.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(results, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results._commit() == "unknown"

    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = results._commit()
    assert len(clean) == 40
    (tmp_path / "eval" / "results").mkdir(parents=True)
    (tmp_path / "eval" / "results" / "r.json").write_text("{}")
    assert results._commit() == clean  # what a run records is no change to what it ran
    source.write_text("changed")
    assert results._commit() == f"{clean}-dirty"
