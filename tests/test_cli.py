"""Every command as a user types it, on the example of the README with a tiny model."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from whyrec.catalog.dataset import Dataset
from whyrec.cli import main
from whyrec.sid.index import read_sids
from whyrec.sid.vocabulary import sid_text

REPOSITORY = Path(__file__).parents[1]
COMMANDS = ("prepare", "index", "align", "activate", "evaluate", "recommend", "add-items")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def whyrec(*arguments: object) -> Ran:
    """Call the command line from the top of the repository, as the README does."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(REPOSITORY),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


INDEX = ("--set", "level_sizes=[4, 4, 4]", "--set", "iterations=5")


def align_options(backbone: Path, folder: Path) -> tuple:
    recipe = folder / "align.yaml"
    recipe.write_text(
        f"backbone: {backbone}\nlora_rank: 2\nmax_history: 8\nbatch_tokens: 512\nreplays: 2\n"
        "replay_tokens: 2\nevaluations: 1\nvalid_users: 4\nbeam_width: 10\nepochs: 1\n"
    )
    return ("--recipe", recipe, "--set", "max_steps=2", "--set", "warmup_epochs=0")


class Line(NamedTuple):
    """The finished run, and what each stage printed."""

    run: Path
    model: Path
    options: tuple
    prepared: Ran
    indexed: Ran
    aligned: Ran


@pytest.fixture(scope="module")
def line(backbone, tmp_path_factory) -> Line:
    """prepare, index and align; not to be changed."""
    folder = tmp_path_factory.mktemp("line")
    run = folder / "example"
    options = align_options(backbone, folder)
    return Line(
        run,
        run / "model" / "aligned",
        options,
        whyrec("prepare", "data/example", "--run", run),
        whyrec("index", "--run", run, *INDEX),
        whyrec("align", "--run", run, *options),
    )


@pytest.fixture
def model(line: Line, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may change."""
    return Path(shutil.copytree(line.model, tmp_path / "model"))


def test_the_stages_run_and_tell_what_they_made(line) -> None:
    assert [line.prepared.code, line.indexed.code, line.aligned.code] == [0, 0, 0]
    card = json.loads((line.run / "dataset" / "card.json").read_text())
    assert f"prepare: {line.run / 'dataset'}\n" in line.prepared.out
    assert f"{card['after']['events']:,} events by {card['after']['users']} users" in (
        line.prepared.out
    )
    assert f"{card['splits']['test']} test" in line.prepared.out
    assert f"{card['after']['items']} items in 64 SIDs" in line.indexed.out
    assert "align, mix: " in line.aligned.err
    for part in ("dataset", "sids", "model/aligned"):
        assert "outputs" in json.loads((line.run / part / "stage.json").read_text())
    assert not list(line.run.rglob(".*"))


def test_the_second_time_nothing_is_done(line) -> None:
    for ran in (
        whyrec("prepare", "data/example", "--run", line.run),
        whyrec("index", "--run", line.run, *INDEX),
        whyrec("align", "--run", line.run, *line.options),
    ):
        assert ran.code == 0 and ran.out == ""
        assert re.fullmatch(r"(prepare|index|align): unchanged, \S+ is up to date\n", ran.err)


def test_force_does_it_again(line, tmp_path) -> None:
    run = tmp_path / "again"
    shutil.copytree(line.run / "dataset", run / "dataset")
    ran = whyrec("prepare", "data/example", "--run", run, "--force")
    assert ran.code == 0 and "unchanged" not in ran.err and "prepare: " in ran.out
    for name in ("items.parquet", "interactions.parquet", "splits.parquet"):
        again, first = run / "dataset" / name, line.run / "dataset" / name
        assert again.read_bytes() == first.read_bytes()


def test_options_of_prepare_reach_the_recipe(tmp_path) -> None:
    run = tmp_path / "run"
    options = ("--format", "csv", "--k-core", "3", "--split", "temporal", "--set", "min_rating=2")
    assert whyrec("prepare", "data/example", "--run", run, *options).code == 0
    config = json.loads((run / "dataset" / "stage.json").read_text())["config"]
    assert config["format"] == "csv" and config["k_core"] == 3
    assert config["split"] == "temporal" and config["min_rating"] == 2.0


def test_evaluate_prints_a_table_and_records_it(line, tmp_path) -> None:
    recipe = tmp_path / "sasrec.yaml"
    recipe.write_text("dim: 8\nlayers: 1\nheads: 1\nmax_length: 8\nepochs: 1\n")
    command = ("evaluate", line.model, "--run", line.run, "--sasrec", recipe, "--users", 12)
    ran = whyrec(*command, "--json", tmp_path / "deep" / "record.json")
    assert ran.code == 0
    record = json.loads((tmp_path / "deep" / "record.json").read_text())
    for name in ("whyrec", "popularity", "co-visitation", "sasrec"):
        for history in ("excluded", "kept"):
            figures = [record["figures"][f"{name}/test/{history}/{m}"] for m in ("R@10", "N@10")]
            row = next(r for r in ran.out.splitlines() if r.split()[:2] == [name, history])
            assert all(f"{figure:.4f}" in row for figure in figures)
    assert json.loads((line.run / "eval" / "results.json").read_text()) | {"date": ""} == (
        record | {"date": ""}
    )
    assert "ranking for test users" in ran.err  # the progress bar


def test_evaluate_with_tiger_and_a_prior(line, tmp_path) -> None:
    sasrec, tiger = tmp_path / "sasrec.yaml", tmp_path / "tiger.yaml"
    sasrec.write_text("dim: 8\nlayers: 1\nheads: 1\nmax_length: 8\nepochs: 1\n")
    tiger.write_text("dim: 8\nlayers: 1\nheads: 1\nmax_length: 8\nepochs: 1\nbeam_width: 10\n")
    command = ("evaluate", line.model, "--run", line.run, "--sasrec", sasrec, "--tiger", tiger)
    ran = whyrec(*command, "--prior", "auto")
    assert ran.code == 0 and "weight of the prior, chosen on validation: " in ran.err
    figures = json.loads((line.run / "eval" / "results.json").read_text())["figures"]
    for name in ("tiger", "whyrec+counts-and-words"):
        assert f"{figures[f'{name}/test/excluded/N@10']:.4f}" in ran.out
    assert f"{figures['gain_over/tiger/test/excluded/N@10']:+.4f}" in ran.out
    weight = figures["prior/weight"]
    assert f"\nprior/weight {weight:.4g}\n" in ran.out
    again = whyrec(*command, "--no-baselines", "--prior", weight)
    assert again.code == 0 and "tiger" not in again.out
    same = json.loads((line.run / "eval" / "results.json").read_text())["figures"]
    assert (
        same["whyrec+counts-and-words/test/kept/N@10"]
        == figures["whyrec+counts-and-words/test/kept/N@10"]
    )


def test_evaluate_language(line) -> None:
    command = ("evaluate", line.model, "--run", line.run, "--no-baselines", "--users", 4)
    ran = whyrec(*command, "--language")
    assert ran.code == 0
    for key in ("language/perplexity_ratio", "caption_all/category_accuracy"):
        assert re.search(rf"^{key} \d", ran.out, re.MULTILINE), key


def test_evaluate_without_baselines_on_valid(line) -> None:
    command = ("evaluate", line.model, "--run", line.run, "--split", "valid", "--no-baselines")
    ran = whyrec(*command, "--beams", 10)
    assert ran.code == 0 and "popularity" not in ran.out
    figures = json.loads((line.run / "eval" / "results.json").read_text())["figures"]
    assert {key.rsplit("/", 1)[0] for key in figures if key.count("/") == 3} == {
        "whyrec/valid/excluded",
        "whyrec/valid/kept",
    }


def test_activate_then_think(line, tmp_path) -> None:
    run = Path(shutil.copytree(line.run, tmp_path / "run"))
    recipe = tmp_path / "activate.yaml"
    recipe.write_text(
        "lora_rank: 2\nsteps_per_user: 1\nthought_tokens: 48\nthoughts: 2\nevaluations: 1\n"
        "valid_users: 4\nbeam_width: 10\nbatch_tokens: 512\n"
    )
    command = ("activate", "--run", run, "--recipe", recipe, "--set", "max_steps=1")
    ran = whyrec(*command)
    assert ran.code == 0 and "rationales kept" in ran.err
    assert "activate: unchanged" in whyrec(*command).err
    model = run / "model" / "activated"
    found = ("recommend", model, "--history", "loaf-01, mug-01", "-k", "3")
    thinking = json.loads(whyrec(*found, "--json").out)["history"]
    assert thinking["trace"] and len(thinking["items"]) == 3
    shown = whyrec(*found).out.splitlines()
    assert shown[4] == f"  thought: {' '.join(thinking['trace'].split())}"
    plain = whyrec(*found, "--think", "off")
    assert plain.code == 0 and "thought" not in plain.out
    evaluated = ("evaluate", model, "--run", run, "--no-baselines", "--users", 6)
    ran = whyrec(*evaluated, "--think", "both", "--thoughts", 1, "--temperature", 0, "--traces")
    assert ran.code == 0
    for key in ("cost/think/tokens", "trace/facts_true", "trace/kept/shuffled"):
        assert re.search(rf"^{key} \d", ran.out, re.MULTILINE), key
    assert (run / "eval" / "traces.parquet").exists()
    refused = whyrec("recommend", line.model, "--history", "loaf-01", "--think", "on")
    assert refused.code == 2 and "has not learnt to think" in refused.err


def test_recommend_after_a_history(line) -> None:
    ran = whyrec("recommend", line.model, "--history", "loaf-01, mug-01", "-k", "3")
    assert ran.code == 0
    lines = ran.out.strip().splitlines()
    assert lines[0] == "history, 2 items; the newest:" and lines[3] == "  recommended:"
    assert [text.strip() for text in lines[1:3]] == ["Loaf tin, 1 kg", "Stoneware mug, 350 ml"]
    assert [text.split(".")[0].strip() for text in lines[4:]] == ["1", "2", "3"]
    assert all(re.search(r"   -\d+\.\d\d$", text) for text in lines[4:])


def test_recommend_as_json(line) -> None:
    command = ("recommend", line.model, "--history", "loaf-01,mug-01", "-k", "4", "--json")
    ran = whyrec(*command)
    found = json.loads(ran.out)["history"]
    assert found["history"] == ["loaf-01", "mug-01"] and len(found["items"]) == 4
    dataset = Dataset.load(line.run / "dataset")
    ids = [item.item_id for item in dataset.items]
    codes_NL = read_sids(line.run / "sids" / "sids.parquet", ids).tolist()
    for entry in found["items"]:
        index = dataset.item(entry["item_id"])
        assert list(entry) == ["item_id", "title", "score", "sid"]
        assert entry["title"] == dataset.items[index].title
        assert entry["sid"] == sid_text(codes_NL[index])
        assert entry["item_id"] not in found["history"]
    scores = [entry["score"] for entry in found["items"]]
    assert scores == sorted(scores, reverse=True)
    assert whyrec(*command).out == ran.out


def test_recommend_for_two_users(line) -> None:
    users = ("--user", "customer-04", "--user", "customer-16", "--run", line.run)
    found = json.loads(whyrec("recommend", line.model, *users, "-k", "2", "--json").out)
    assert list(found) == ["user customer-04", "user customer-16"]
    dataset = Dataset.load(line.run / "dataset")
    for name, answer in found.items():
        sequence = dataset.sequences[dataset.user(name.removeprefix("user "))]
        assert answer["history"] == [dataset.items[i].item_id for i in sequence]
        assert len(answer["items"]) == 2
    shown = whyrec("recommend", line.model, *users, "-k", "2").out
    for answer in found.values():
        for entry in answer["items"]:
            assert f"{entry['title']}   {entry['score']:.2f}" in shown


def test_recommend_without_any_history(line) -> None:
    ran = whyrec("recommend", line.model, "--history", "", "-k", "2", "--json")
    assert ran.code == 0 and len(json.loads(ran.out)["history"]["items"]) == 2


def test_add_items_then_recommend_them(line, model, tmp_path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"item_id": "rye-01", "title": "Rye flour"}\n{"item_id": "rye-02"}\n')
    ran = whyrec("add-items", model, items)
    assert ran.code == 0 and ran.out == f"added 2 items to {model}\n"
    found = json.loads(whyrec("recommend", model, "--history", "rye-01", "-k", "50", "--json").out)
    ids = [entry["item_id"] for entry in found["history"]["items"]]
    assert "rye-02" in ids and len(ids) == len(Dataset.load(line.run / "dataset").items) + 1
    # An item without a title is shown by its id.
    assert "rye-02   " in whyrec("recommend", model, "--history", "rye-01", "-k", "50").out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "-h"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: whyrec {command}")
    assert "-h, --help" in text and len(text.split("\n\n")[1].split()) > 3  # says what it does


def test_help_names_every_command(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^    {command}\b", text, re.MULTILINE), command


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bake"],
        ["prepare"],
        ["index"],
        ["recommend", "model"],
        ["recommend", "model", "--user", "a", "--history", "b"],
        ["recommend", "model", "--history", "b", "-k", "ten"],
        ["evaluate", "model", "--run", "r", "--split", "train"],
        ["evaluate", "model", "--run", "r", "--prior", "much"],
    ],
)
def test_a_command_that_cannot_be_parsed_exits_2_with_its_usage(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: whyrec") and "whyrec" in err.splitlines()[-1]


def test_a_user_without_a_run(line) -> None:
    ran = whyrec("recommend", line.model, "--user", "customer-04")
    assert ran == Ran(2, "", "whyrec: --user needs --run, the run folder that knows the user\n")


def test_interrupting_is_no_traceback(monkeypatch, capsys, tmp_path) -> None:
    import whyrec.catalog.prepare as prepare_module

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "prepare", interrupted)
    assert main(["prepare", "data/example", "--run", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("whyrec: interrupted")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path) -> None:
    import whyrec.catalog.prepare as prepare_module

    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(prepare_module, "prepare", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["prepare", "data/example", "--run", str(tmp_path)])


def test_as_a_process(tmp_path) -> None:
    """What a shell sees: the exit status, one line on stderr, nothing on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "whyrec.cli", "prepare", "nowhere", "--run", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "whyrec: there is no file or folder nowhere; download or unpack the data first\n"
    )
    assert not (tmp_path / "run").exists()
