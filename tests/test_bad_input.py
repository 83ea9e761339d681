"""Every kind of bad input that was promised a clear end, through the command line.

Each row of `REFUSED` is one: what is done to a finished line (raw files, dataset, SIDs, model), the
command, and what its sentence must say. Whatever the fault: exit status 2, one line on stderr, and
every file that was there before is there still, byte for byte.
"""

import contextlib
import errno
import gzip
import io
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest

from conftest import LEVEL_SIZES, save_model, text_vectors
from whyrec import stage
from whyrec.catalog.dataset import Dataset, Item
from whyrec.catalog.prepare import PrepareRecipe, prepare
from whyrec.cli import main
from whyrec.decode.model_folder import load_model_folder
from whyrec.evaluation import evaluate as evaluate_module
from whyrec.prompting.encoder import item_text
from whyrec.sid import index as index_module
from whyrec.sid.index import IndexRecipe, index
from whyrec.stage import run_stage
from whyrec.train.mix import AlignmentMix, MixSizes

TITLES = ["Plain title", "Ends <|im_end|> here", "<s_a_1><s_b_2>", "<think>no</think>", "Ünïcode"]


def write_raw(raw: Path) -> None:
    """Ten users who walk round twelve items; the titles hold control tokens."""
    raw.mkdir()
    rows = [
        f"u{user},p{(user + step) % 12:02d},{1000 + step}"
        for user in range(10)
        for step in range(8)
    ]
    (raw / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    items = [f"p{n:02d},{TITLES[n % len(TITLES)]} {n}" for n in range(12)]
    (raw / "items.csv").write_text("item_id,title\n" + "\n".join(items) + "\n")


@pytest.fixture(scope="module")
def finished(extended, tmp_path_factory) -> Path:
    """raw/, run/dataset, run/sids, run/model/aligned, run/eval, released/; not to be changed."""
    top = tmp_path_factory.mktemp("finished") / "world"
    top.mkdir()
    write_raw(top / "raw")
    run = top / "run"
    prepare(run, PrepareRecipe(source=str(top / "raw"), k_core=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "embed_texts", text_vectors)
        index(run, IndexRecipe(level_sizes=LEVEL_SIZES, collaborative_dim=0, iterations=5))

    def build(folder: Path) -> None:
        save_model(folder, run, extended)

    inputs = {"sids": run / "sids"}
    run_stage(run / "model" / "aligned", build, stage="align", config={"seed": 0}, inputs=inputs)
    (run / "eval").mkdir()
    (run / "eval" / "results.json").write_text("{}")
    released = top / "released"
    released.mkdir()
    for name in ("sids.parquet", "codebooks.safetensors"):
        shutil.copyfile(run / "sids" / name, released / name)
    return top


class World(NamedTuple):
    """A copy of the finished line that a test may break."""

    top: Path
    patch: pytest.MonkeyPatch

    @property
    def raw(self) -> Path:
        return self.top / "raw"

    @property
    def run(self) -> Path:
        return self.top / "run"

    @property
    def model(self) -> Path:
        return self.run / "model" / "aligned"

    def write(self, name: str, data: str | bytes) -> Path:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def contents(self) -> dict[str, bytes]:
        """All that counts; names with a leading dot are a stage's scratch."""
        return {
            str(path.relative_to(self.top)): path.read_bytes()
            for path in sorted(self.top.rglob("*"))
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(self.top).parts)
        }


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(index_module, "embed_texts", text_vectors)
    return World(Path(shutil.copytree(finished, tmp_path / "world")), monkeypatch)


def whyrec(*arguments: object) -> tuple[int, str, list[str]]:
    """Exit status, stdout, and the lines of stderr without progress bars."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    lines = [text for text in re.split(r"[\r\n]+", err.getvalue()) if text.strip()]
    return code, out.getvalue(), [text for text in lines if "%|" not in text and "it/s" not in text]


Command = tuple[object, ...]


class Refusal(NamedTuple):
    command: Callable[[World], Command]  # may break something first
    says: str  # a pattern of the sentence, what to do included


REFUSED: dict[str, Refusal] = {}


def refused(name: str, says: str) -> Callable[[Callable[[World], Command]], None]:
    return lambda command: REFUSED.update({name: Refusal(command, says)})


def prepared_from(
    world: World, log: str | bytes, *options: object, name: str = "log.csv"
) -> Command:
    path = world.write(f"bad/{name}", log)
    return ("prepare", path, "--run", world.run, *options)


@refused("missing column in the log", "no column 'item_id'; .*user_id, product.*--set item_column=")
def _(world):
    return prepared_from(world, "user_id,product\na,x\n")


@refused("missing column in the items", "items.csv has no column 'item_id'.*--set item_column=")
def _(world):
    world.write("raw/items.csv", "sku,title\np00,x\n")
    return ("prepare", world.raw, "--run", world.run)


@refused("missing column that was named", "no column 'when'.*--set timestamp_column=")
def _(world):
    return ("prepare", world.raw, "--run", world.run, "--set", "timestamp_column=when")


@refused("truncated gzip", r"log\.csv\.gz is a truncated gzip file.*download it again")
def _(world):
    rows = "".join(f"u{n},i{n * 7919 % 1000},{n}\n" for n in range(5000))
    whole = gzip.compress(("user_id,item_id,timestamp\n" + rows).encode())
    return prepared_from(world, whole[: len(whole) // 2], name="log.csv.gz")


@refused("gzip that is a stub", "truncated gzip file.*download it again")
def _(world):
    return prepared_from(world, gzip.compress(b"user_id,item_id\na,x\n")[:11], name="log.csv.gz")


@refused(
    "wrong format named", "does not look like movielens.*it looks like csv: leave out --format"
)
def _(world):
    return ("prepare", world.raw, "--run", world.run, "--format", "movielens")


@refused("unknown format named", "no format 'excel'; use one of recbole, movielens, .*csv")
def _(world):
    return ("prepare", world.raw, "--run", world.run, "--format", "excel")


@refused("unknown split named", "no split 'random'; use one of leave-one-out, temporal")
def _(world):
    return ("prepare", world.raw, "--run", world.run, "--split", "random")


@refused("empty log", r"log\.csv.*(is empty|holds no).*(needs|give)")
def _(world):
    return prepared_from(world, "", "--format", "csv")


@refused("log of a header alone", r"log\.csv holds no interactions; give a log with")
def _(world):
    return prepared_from(world, "user_id,item_id,timestamp\n")


@refused("log too thin for its k-core", "nothing is left .* use a smaller --k-core")
def _(world):
    return prepared_from(world, "user_id,item_id\na,x\na,y\n")


@refused("log of bad rows", r"3 of the 4 rows .*cannot be read.*check the format")
def _(world):
    return prepared_from(world, "user_id,item_id,timestamp\na,x,1\na,x,?\na,x,?\na,x,?\n")


@refused("source that is not there", "there is no file or folder .*nowhere; download")
def _(world):
    return ("prepare", world.top / "nowhere", "--run", world.run)


@refused("duplicate ids among new items", "1 rows .* repeat the item id.*keep one row an item")
def _(world):
    return ("add-items", world.model, world.write("new.csv", "item_id,title\nn,a\nn,b\n"))


@refused(
    "new item that is there already", "in the catalogue already, 'p03' for one; leave them out"
)
def _(world):
    return ("add-items", world.model, world.write("new.csv", "item_id,title\nn,a\np03,b\n"))


@refused("new items that are no table", "is not a CSV, Parquet or JSON-lines file")
def _(world):
    return ("add-items", world.model, world.write("new.bin", b"\0\1\2" * 50))


@refused("new items that are not there", "there is no file or folder .*nowhere.csv; check the path")
def _(world):
    return ("add-items", world.model, world.top / "nowhere.csv")


@refused("unknown user", "no user 'u99' .*nearest known are u9")
def _(world):
    return ("recommend", world.model, "--run", world.run, "--user", "u99")


@refused("unknown item", "unknown item 'p3'; the nearest known ids are .*p03")
def _(world):
    return ("recommend", world.model, "--history", "p01,p3")


@refused("catalogue beyond the SID space", r"12 items do not fit into the 8 SIDs.*add a level or")
def _(world):
    return ("index", "--run", world.run, "--set", "level_sizes=[2, 2, 2]", *PLAIN)


@refused("new items beyond the SID space", r"72 items do not fit into the 64 SIDs")
def _(world):
    new = world.write("new.csv", "item_id,title\n" + "".join(f"n{n},t\n" for n in range(60)))
    return ("add-items", world.model, new)


@refused(
    "recipe with an unknown key", r"align\.yaml has the unknown key 'batchtokens'.*'batch_tokens'"
)
def _(world):
    recipe = world.write("align.yaml", "epochs: 1\nbatchtokens: 4\n")
    return ("align", "--run", world.run, "--recipe", recipe)


@refused("setting with an unknown key", "unknown key 'levelsizes'; did you mean 'level_sizes'")
def _(world):
    return ("index", "--run", world.run, "--set", "levelsizes=[4, 4]")


@refused("setting of the wrong type", "epochs must be of type int, not 'many'")
def _(world):
    return ("align", "--run", world.run, "--set", "epochs=many")


@refused("recipe that is not there", "there is no recipe at .*nowhere.yaml")
def _(world):
    return ("index", "--run", world.run, "--recipe", world.top / "nowhere.yaml")


def other_catalogue(world: World) -> Path:
    """A run of other items, indexed."""
    log = "".join(f"u{n},q{m}\n" for n in range(4) for m in range(6))
    path = world.write("other/log.csv", "user_id,item_id\n" + log)
    prepare(world.top / "second", PrepareRecipe(source=str(path), k_core=1))
    index(
        world.top / "second",
        IndexRecipe(level_sizes=LEVEL_SIZES, collaborative_dim=0, iterations=5),
    )
    return world.top / "second"


@refused("index from another catalogue's checkpoint", "belongs to another catalogue.*index without")
def _(world):
    return (
        *("index", "--run", other_catalogue(world), "--set", f"checkpoint={world.top}/released"),
        *PLAIN,
    )


@refused("align from another catalogue's checkpoint", "belongs to another catalogue.*`whyrec index")
def _(world):
    released = f"checkpoint={world.top}/released"
    return ("align", "--run", other_catalogue(world), "--set", released)


@refused("checkpoint that is none", "is no released checkpoint")
def _(world):
    return ("align", "--run", world.run, "--set", f"checkpoint={world.raw}")


def activated_from(world: World, *settings: str) -> Command:
    world.write("released/adapter_config.json", json.dumps({"r": 4}))
    released = f"checkpoint={world.top}/released"
    changes = [part for setting in (released, *settings) for part in ("--set", setting)]
    return ("activate", "--run", world.run, *changes)


@refused("activate from a checkpoint of other SIDs", "other SIDs than .*`whyrec index --set check")
def _(world):
    path = world.top / "released" / "sids.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.slice(1), path)
    return activated_from(world)


@refused("activate without an adapter, from a checkpoint", "rank 4; set lora_rank: 4, not 0")
def _(world):
    return activated_from(world, "lora_rank=0")


@refused("activate from a checkpoint of another rank", "rank 4; set lora_rank: 4, not 16")
def _(world):
    return activated_from(world)


@refused("activate from half a checkpoint", "released holds no adapter_config.json; name a check")
def _(world):
    return ("activate", "--run", world.run, "--set", f"checkpoint={world.top}/released")


@refused("model of another catalogue", "different catalogues; name the model's own run")
def _(world):
    return ("evaluate", world.model, "--run", other_catalogue(world), "--no-baselines")


@refused("history of another catalogue", "unknown item 'q0'; ")
def _(world):
    return ("recommend", world.model, "--run", other_catalogue(world), "--user", "u1")


@refused("model folder that is none", "not a WhyRec model folder.*`whyrec align` wrote")
def _(world):
    return ("recommend", world.run / "dataset", "--history", "p01")


@refused("model folder copied in part", "trie.safetensors; check the path|trie")
def _(world):
    (world.model / "trie.safetensors").unlink()
    return ("recommend", world.model, "--history", "p01")


@refused("model folder with half its weights", "cannot load .*aligned")
def _(world):
    path = world.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return ("recommend", world.model, "--history", "p01")


@refused(
    "backbone that does not exist", "cannot load the backbone 'no/such'.*give a Hugging Face id"
)
def _(world):
    return ("align", "--run", world.run, "--set", "backbone=no/such")


def killed_in(world: World, part: str) -> None:
    """What a kill leaves: a partial folder beside nothing."""
    folder = world.run / part
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    record = folder.with_name(f".{folder.name}.partial") / "stage.json"
    record.write_text(json.dumps({"stage": "x", "config": {}, "inputs": {}}))


@refused("index after a killed prepare", "dataset is missing or incomplete; run `whyrec prepare")
def _(world):
    killed_in(world, "dataset")
    return ("index", "--run", world.run)


@refused("align after a killed index", "sids is missing or incomplete; run `whyrec index --run")
def _(world):
    killed_in(world, "sids")
    return ("align", "--run", world.run)


@refused("align on a folder without its record", "sids is missing or incomplete; run `whyrec index")
def _(world):
    (world.run / "sids" / "stage.json").unlink()
    return ("align", "--run", world.run)


@refused("evaluate after a killed prepare", "dataset is missing or incomplete; run `whyrec prepare")
def _(world):
    killed_in(world, "dataset")
    return ("evaluate", world.model, "--run", world.run, "--no-baselines")


@refused("recommend after a killed align", "not a WhyRec model folder")
def _(world):
    killed_in(world, "model/aligned")
    return ("recommend", world.model, "--history", "p01")


FULL = "no room is left on the disk.*free some and run the same command again"
PLAIN = ("--set", "collaborative_dim=0", "--set", "iterations=5")
FORCED = ("index", "--force", "--set", "level_sizes=[4, 4, 4]", *PLAIN, "--run")


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")


@refused("full disk in prepare", FULL)
def _(world):
    world.patch.setattr(pq, "write_table", no_space)
    return ("prepare", world.raw, "--run", world.run, "--force")


@refused("full disk at the last rename of prepare", FULL)
def _(world):
    world.patch.setattr(stage, "_replace_folder", no_space)
    return ("prepare", world.raw, "--run", world.run, "--force")


@refused("full disk in index", FULL)
def _(world):
    world.patch.setattr(index_module, "write_json", no_space)
    return (*FORCED, world.run)


@refused("full disk in add-items", FULL)
def _(world):
    world.patch.setattr(pq, "write_table", no_space)
    return ("add-items", world.model, world.write("new.csv", "item_id,title\nn,a\n"))


@refused("full disk in evaluate", FULL)
def _(world):
    world.patch.setattr(evaluate_module, "record", no_space)
    return ("evaluate", world.model, "--run", world.run, "--no-baselines")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence_and_nothing_is_lost(world, name) -> None:
    command = REFUSED[name].command(world)
    before = world.contents()
    code, out, lines = whyrec(*command)
    assert code == 2, (out, lines)
    assert len(lines) == 1 and lines[0].startswith("whyrec: "), lines
    assert re.search(REFUSED[name].says, lines[0]), lines[0]
    assert not re.search(r"Traceback|Errno", lines[0])
    assert world.contents() == before


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A real fault that every writer meets, Rust and C++ included: files end at `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [100, 3000])
@pytest.mark.parametrize("command", ["prepare", "index", "evaluate", "add-items"])
def test_writers_that_meet_a_full_disk(world, command, size) -> None:
    new = world.write("new.csv", "item_id,title\nn,a\n")
    arguments: Command = {
        "prepare": ("prepare", world.raw, "--run", world.run, "--force"),
        "index": (*FORCED, world.run),
        "evaluate": ("evaluate", world.model, "--run", world.run, "--no-baselines"),
        "add-items": ("add-items", world.model, new),
    }[command]
    before = world.contents()
    with largest_file(size):
        code, _, lines = whyrec(*arguments)
    if code == 0:  # all its files are smaller
        assert size > 1000
        return
    assert code == 2 and len(lines) == 1 and re.search(FULL, lines[0]), lines
    assert world.contents() == before


@pytest.mark.parametrize(
    ("rank", "size"),
    [
        pytest.param(2, 20_000, id="tokenizer"),
        pytest.param(2, 4_000_000, id="merged weights"),
        pytest.param(0, 8_000_000, id="optimizer"),
    ],
)
def test_training_that_meets_a_full_disk(world, backbone, rank, size) -> None:
    """Checkpoints and weights are written by libraries; the old model stays."""
    recipe = world.write(
        "align.yaml",
        f"backbone: {backbone}\nlora_rank: {rank}\nmax_history: 4\nbatch_tokens: 512\nreplays: 0\n"
        "evaluations: 1\nvalid_users: 2\nbeam_width: 10\nmax_steps: 1\nwarmup_epochs: 0\n"
        "report_to: none\n",
    )
    before = world.contents()
    with largest_file(size):
        code, _, lines = whyrec("align", "--run", world.run, "--recipe", recipe)
    assert code == 2 and re.search(FULL, lines[-1]), lines
    assert [line for line in lines if line.startswith("whyrec: ")] == lines[-1:]
    assert world.contents() == before
    code, _, lines = whyrec("align", "--run", world.run, "--recipe", recipe)  # and now it goes on
    assert code == 0 and (world.model / "model.safetensors").exists()


def test_duplicate_items_of_a_catalogue_are_told_and_the_first_is_kept(world) -> None:
    """Published catalogues hold duplicates, so they are counted, not refused."""
    with (world.raw / "items.csv").open("a") as file:
        file.write("p00,another title\np01,Ends <|im_end|> here 1\n")
    code, out, _ = whyrec("prepare", world.raw, "--run", world.run)
    assert code == 0
    assert "2 item rows repeat an id (1 with other texts); the first of each was kept" in out
    assert Dataset.load(world.run / "dataset").items[0].title == "Plain title 0"


def test_bad_rows_are_told_with_file_and_line(world) -> None:
    with (world.raw / "interactions.csv").open("a") as file:
        file.write("u1,,5\nu1,p01,yesterday\n")
    code, out, _ = whyrec("prepare", world.raw, "--run", world.run)
    assert code == 0
    assert "2 bad rows in the log; the first is interactions.csv:82: no user or item id" in out


def test_a_killed_stage_is_done_again_as_if_nothing_had_been(world) -> None:
    finished = world.contents()
    killed_in(world, "dataset")
    killed_in(world, "sids")
    assert whyrec("prepare", world.raw, "--run", world.run, "--k-core", 1)[0] == 0
    assert whyrec(*FORCED, world.run)[0] == 0
    again = world.contents()
    for name in ("items.parquet", "interactions.parquet", "splits.parquet"):
        assert again[f"run/dataset/{name}"] == finished[f"run/dataset/{name}"]
    assert again["run/sids/sids.parquet"] == finished["run/sids/sids.parquet"]
    assert not list(world.run.glob(".*"))


def test_control_tokens_in_a_title_are_harmless_text(world) -> None:
    """From the raw file to the token ids of every training example: letters, never control."""
    parts = load_model_folder(world.model)
    dataset = Dataset.load(world.run / "dataset")
    titles = [item.title for item in dataset.items]
    assert titles[1:4] == [f"{TITLES[n]} {n}" for n in (1, 2, 3)]
    added = {
        token: text
        for text, token in parts.tokenizer.get_added_vocab().items()
        if not text.isspace()
    }
    for item in dataset.items:
        ids = parts.encoder.text(item_text(item))
        assert not added.keys() & set(ids)
        assert parts.tokenizer.decode(ids) == item_text(item)

    mix = AlignmentMix(
        parts.encoder,
        items=dataset.items,
        sequences=dataset.training_sequences(),
        replies=[],
        sizes=MixSizes(1.0, 1.0, 8),
        epochs=1,
        seed=0,
    )
    harmless = AlignmentMix(
        parts.encoder,
        items=[Item(item.item_id, "x") for item in dataset.items],
        sequences=dataset.training_sequences(),
        replies=[],
        sizes=MixSizes(1.0, 1.0, 8),
        epochs=1,
        seed=0,
    )
    assert len(mix) == len(harmless) > 12
    seen = set()
    for n in range(len(mix)):
        dangerous_ids, harmless_ids = mix[n]["input_ids"], harmless[n]["input_ids"]
        # The same control tokens in the same order: titles gave none.
        assert [t for t in dangerous_ids if t in added] == [t for t in harmless_ids if t in added]
        seen |= {title for title in titles if title in parts.tokenizer.decode(dangerous_ids)}
    assert seen == set(titles)
    code, out, _ = whyrec("recommend", world.model, "--history", "p01,p02", "-k", 12)
    assert code == 0 and TITLES[3] in out
