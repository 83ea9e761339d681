"""A stage is done once, whole or not at all, whatever stops it."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from whyrec import stage as stage_module
from whyrec.stage import fingerprint, read_stage, run_stage, versions, write_json


@pytest.fixture
def source(tmp_path) -> Path:
    file = tmp_path / "input.txt"
    file.write_text("one")
    return file


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "run" / "sids"


class Build:
    """Writes a file, and counts how often it was asked to."""

    def __init__(self, content: str = "data", fail: Exception | None = None) -> None:
        self.content, self.fail = content, fail
        self.folders: list[Path] = []

    def __call__(self, folder: Path) -> dict:
        self.folders.append(folder)
        self.found = sorted(path.name for path in folder.iterdir())
        (folder / "out.txt").write_text(self.content)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "deep.txt").write_text("deep")
        (folder / ".scratch").write_text("scratch")
        if self.fail:
            raise self.fail
        return {"rows": 3}


def go(output: Path, source: Path, build: Build, **settings) -> bool:
    config = settings.pop("config", {"k": 1})
    return run_stage(
        output, build, stage="index", config=config, inputs={"log": source}, **settings
    )


def beside(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def test_a_finished_stage_tells_everything(output, source) -> None:
    build = Build()
    assert go(output, source, build)
    assert build.folders == [output.with_name(".sids.partial")]
    record = read_stage(output, made_by="whyrec index")
    assert record["stage"] == "index" and record["config"] == {"k": 1}
    assert record["inputs"] == {"log": fingerprint(source)}
    assert set(record["outputs"]) == {"out.txt", "sub/deep.txt"}
    assert record["summary"] == {"rows": 3}
    assert record["seconds"] >= 0 and record["started"] and record["command"]
    assert record["versions"] == versions() and "torch" in record["versions"]
    assert beside(output) == ["sids"]


def test_unchanged_returns_at_once(output, source, capsys) -> None:
    assert go(output, source, Build())
    again = Build("other")
    assert not go(output, source, again)
    assert again.folders == [] and (output / "out.txt").read_text() == "data"
    assert "index: unchanged" in capsys.readouterr().err


def test_a_config_of_tuples_equals_its_json(output, source) -> None:
    assert go(output, source, Build(), config={"sizes": (4, 4)})
    assert not go(output, source, Build(), config={"sizes": [4, 4]})


@pytest.mark.parametrize("change", ["config", "input", "force", "name"])
def test_a_change_runs_it_again(output, source, change: str) -> None:
    assert go(output, source, Build("old"))
    settings: dict = {}
    if change == "config":
        settings["config"] = {"k": 2}
    elif change == "input":
        source.write_text("two")
    elif change == "force":
        settings["force"] = True
    else:
        source = source.rename(source.with_name("elsewhere.txt"))
        assert not go(output, source, Build())  # the content counts, not the path
        return
    (output / "stale.txt").touch()
    assert go(output, source, Build("new"), **settings)
    assert (output / "out.txt").read_text() == "new"
    assert not (output / "stale.txt").exists() and beside(output) == ["sids"]


def test_a_stage_folder_as_input_counts_by_what_it_holds(tmp_path, output, source) -> None:
    go(output, source, Build())
    before = fingerprint(output)
    later = tmp_path / "run" / "model"
    assert go(later, output, Build())
    go(output, source, Build(), force=True)  # made again, with the same result
    assert fingerprint(output) == before
    assert not go(later, output, Build())
    go(output, source, Build("other"), force=True)
    assert fingerprint(output) != before
    assert go(later, output, Build())


def test_a_plain_folder_counts_by_names_and_contents(tmp_path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = fingerprint(folder)
    (folder / "a").rename(folder / "b")
    second = fingerprint(folder)
    (folder / "b").write_text("2")
    assert len({first, second, fingerprint(folder)}) == 3


def test_a_missing_input_is_one_sentence(output, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"index needs log at .*nothing.*; make it first"):
        go(output, tmp_path / "nothing", Build())
    assert not output.parent.exists()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_build_that_raises_leaves_the_old_output(output, source, error) -> None:
    go(output, source, Build("old"))
    before = fingerprint(output)
    with pytest.raises(type(error)):
        go(output, source, Build("new", fail=error), force=True)
    assert (output / "out.txt").read_text() == "old" and fingerprint(output) == before
    assert not go(output, source, Build())  # it is still up to date
    fresh = Build("new")
    assert go(output, source, fresh, force=True)
    assert fresh.found == ["stage.json"]  # nothing of the failed build was there
    assert beside(output) == ["sids"]


def test_a_first_build_that_raises_leaves_no_output(output, source) -> None:
    with pytest.raises(RuntimeError):
        go(output, source, Build(fail=RuntimeError()))
    assert not output.exists()
    with pytest.raises(ValueError, match="is missing or incomplete; run `whyrec index` first"):
        read_stage(output, made_by="whyrec index")


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_output(output, source, monkeypatch) -> None:
    go(output, source, Build("old"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="No space left"):
            go(output, source, Build("new"), config={"k": 2})
    # ... and when only the last write fails, that of stage.json
    with monkeypatch.context() as patch:
        calls = []

        def write(path, data):
            calls.append(path)
            return full_disk() if len(calls) == 2 else write_json(path, data)

        patch.setattr(stage_module, "write_json", write)
        with pytest.raises(OSError, match="No space left"):
            go(output, source, Build("new"), config={"k": 2})
    assert (output / "out.txt").read_text() == "old"
    assert read_stage(output, made_by="x")["config"] == {"k": 1}
    assert go(output, source, Build("new"), config={"k": 2})
    assert (output / "out.txt").read_text() == "new" and beside(output) == ["sids"]


def test_write_json_is_atomic(tmp_path, monkeypatch) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"ü": 1})
    assert json.loads(file.read_text("utf-8")) == {"ü": 1} and "ü" in file.read_text("utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError):
            write_json(file, {"b": 2})
    assert json.loads(file.read_text("utf-8")) == {"ü": 1}


def test_keep_partial_resumes_what_is_the_same(output, source) -> None:
    with pytest.raises(RuntimeError):
        go(output, source, Build(fail=RuntimeError()), keep_partial=True)
    resumed = Build()
    assert go(output, source, resumed, keep_partial=True)
    assert "out.txt" in resumed.found and ".scratch" in resumed.found
    assert beside(output) == ["sids"]


@pytest.mark.parametrize("change", ["config", "input", "force", "keep_partial"])
def test_keep_partial_drops_what_is_not(output, source, change: str) -> None:
    with pytest.raises(RuntimeError):
        go(output, source, Build(fail=RuntimeError()), keep_partial=True)
    settings: dict = {"keep_partial": True}
    if change == "config":
        settings["config"] = {"k": 2}
    elif change == "input":
        source.write_text("two")
    else:
        settings[change] = change == "force"
    fresh = Build()
    assert go(output, source, fresh, **settings)
    assert fresh.found == ["stage.json"]


SLOW = """
import sys, time
from pathlib import Path
from whyrec.stage import run_stage

def build(folder):
    (folder / "checkpoint").write_text("half")
    print("built", flush=True)
    time.sleep(60)

run_stage(Path(sys.argv[1]), build, stage="index", config={"k": int(sys.argv[3])},
          inputs={"log": Path(sys.argv[2])}, keep_partial=True)
"""


def test_a_killed_process_leaves_the_old_output_and_its_checkpoint(output, source) -> None:
    go(output, source, Build("old"))
    command = [sys.executable, "-c", SLOW, str(output), str(source), "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "built\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (output / "out.txt").read_text() == "old"
    assert read_stage(output, made_by="x")["config"] == {"k": 1}
    resumed = Build("new")
    assert go(output, source, resumed, config={"k": 2}, keep_partial=True)
    assert "checkpoint" in resumed.found and (output / "out.txt").read_text() == "new"
    assert beside(output) == ["sids"]


@pytest.mark.parametrize("moment", [1, 2])
def test_killed_between_the_renames_loses_nothing(output, source, monkeypatch, moment) -> None:
    """At every moment the old folder or the new one is there, whole, and the next run ends well."""
    go(output, source, Build("old"))
    replace, calls = os.replace, []

    def die(old, new):
        if Path(old).is_dir():
            calls.append(new)
            if len(calls) == moment:
                raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            go(output, source, Build("new"), config={"k": 2})
    folders = [p for p in output.parent.iterdir() if (p / "out.txt").exists()]
    assert any((p / "out.txt").read_text() == "old" for p in folders)
    assert go(output, source, Build("new"), config={"k": 2})
    assert (output / "out.txt").read_text() == "new" and beside(output) == ["sids"]


def test_killed_between_the_renames_the_old_output_is_still_up_to_date(
    output, source, monkeypatch, capsys
) -> None:
    """What was there before the kill is put back before anybody asks whether it has changed."""
    go(output, source, Build("old"))
    replace = os.replace

    def die(old, new):
        if Path(new) == output:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            go(output, source, Build("new"), config={"k": 2})
    assert not output.exists()
    again = Build("other")
    assert not go(output, source, again)
    assert again.folders == [] and "index: unchanged" in capsys.readouterr().err
    assert (output / "out.txt").read_text() == "old"


def test_of_two_processes_after_a_kill_neither_builds_alone(output, source) -> None:
    """Both wait until the old output is back: one alone would wait for the other for ever."""
    go(output, source, Build("old"))
    for _ in range(20):
        os.replace(output, output.with_name(".sids.old"))
        barrier = threading.Barrier(2)
        results: dict[bool, bool] = {}

        def one(main: bool, barrier=barrier, results=results) -> None:
            time.sleep(0.002 * main)
            results[main] = go(output, source, Build("new"), processes=Rank(barrier, main=main))

        threads = [threading.Thread(target=one, args=(main,)) for main in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert results == {True: False, False: False}
        assert (output / "out.txt").read_text() == "old"


def test_a_folder_without_stage_json_is_incomplete(output) -> None:
    output.mkdir(parents=True)
    for content in (None, "{", '{"stage": "index"}'):
        if content is not None:
            (output / "stage.json").write_text(content)
        with pytest.raises(ValueError, match="missing or incomplete"):
            read_stage(output, made_by="whyrec index")


class Rank:
    """One of two processes, as accelerate's `PartialState` is."""

    def __init__(self, barrier: threading.Barrier, *, main: bool) -> None:
        self.barrier, self.is_main_process = barrier, main

    def wait_for_everyone(self) -> None:
        self.barrier.wait(timeout=10)


def test_of_two_processes_both_build_and_one_renames(output, source) -> None:
    """The second may look at the output after the first has renamed it: still both return True."""
    barrier = threading.Barrier(2)
    results: dict[bool, bool] = {}
    shared = Build()

    def one(main: bool) -> None:
        def build(folder: Path) -> dict:
            if main:
                shared(folder)
            else:
                time.sleep(0.05)
            return {}

        results[main] = run_stage(
            output,
            build,
            stage="index",
            config={"k": 1},
            inputs={"log": source},
            processes=Rank(barrier, main=main),
        )

    for _ in range(2):  # the second time both say: unchanged
        results.clear()
        threads = [threading.Thread(target=one, args=(main,)) for main in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert set(results) == {True, False} and len(set(results.values())) == 1
    assert results[True] is False and beside(output) == ["sids"]
