import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrec.catalog import prepare as prepare_module
from whyrec.catalog.dataset import Dataset
from whyrec.catalog.prepare import PrepareRecipe, prepare
from whyrec.stage import STAGE_FILE

EXAMPLE = Path(__file__).parents[2] / "data" / "example"
HEADER = "user_id,item_id,timestamp\n"


def csv_log(folder: Path, rows: str, header: str = HEADER) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "interactions.csv").write_text(header + rows)
    return folder


def fails(tmp_path: Path, match: str, **recipe) -> None:
    recipe = {"source": str(tmp_path), "k_core": 0} | recipe
    with pytest.raises(ValueError, match=match) as error:
        prepare(tmp_path / "run", PrepareRecipe(**recipe))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "dataset").exists()


def card(run: Path) -> dict:
    return json.loads((run / "dataset" / "card.json").read_text())


def test_movielens_100k_is_the_embedded_default(tmp_path: Path) -> None:
    prepare(tmp_path, PrepareRecipe(source="ml-100k"))
    told = card(tmp_path)
    assert told["before"] == {"users": 943, "items": 1682, "events": 100_000}
    assert told["after"] == {"users": 943, "items": 1349, "events": 99_287}
    assert told["splits"] == {"train": 97_401, "valid": 943, "test": 943, "none": 0}
    assert told["share_of_repeated_targets"] == {"valid": 0, "test": 0}
    dataset = Dataset.load(tmp_path / "dataset")
    item = dataset.items[dataset.item("1")]
    assert item.title == "Toy Story (1995)"
    assert item.categories == ("Animation", "Children's", "Comedy")
    times = pq.read_table(tmp_path / "dataset" / "interactions.parquet")
    assert times.schema.names == ["user_id", "item_id", "timestamp", "position"]
    assert [str(t) for t in times.schema.types] == ["string", "string", "int64", "int32"]


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    prepare(tmp_path, PrepareRecipe(source=str(EXAMPLE)))
    told = card(tmp_path)
    assert told["after"]["users"] == 25
    assert 15 <= told["after"]["items"] <= 20
    assert told["share_of_items_with"]["title"] == 1
    assert len(Dataset.load(tmp_path / "dataset").examples("test")) == 25


times = st.lists(
    st.tuples(st.sampled_from("uvw"), st.sampled_from("abcd"), st.integers(0, 3)), min_size=1
)


@settings(max_examples=30, deadline=None)
@given(times, st.sampled_from(["leave-one-out", "temporal"]))
def test_sequences_are_the_log_sorted_stably_by_time(tmp_path_factory, rows, split) -> None:
    folder = tmp_path_factory.mktemp("log")
    csv_log(folder, "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    prepare(folder / "run", PrepareRecipe(source=str(folder), k_core=0, split=split))
    dataset = Dataset.load(folder / "run" / "dataset")
    for user_id, sequence in zip(dataset.user_ids, dataset.sequences, strict=True):
        mine = sorted((row for row in rows if row[0] == user_id), key=lambda row: row[2])
        assert [dataset.items[i].item_id for i in sequence] == [row[1] for row in mine]
    assert sum(map(len, dataset.sequences)) == len(rows)  # repeats are kept
    assert dataset.user_ids == sorted({row[0] for row in rows})
    assert [item.item_id for item in dataset.items] == sorted({row[1] for row in rows})


def test_temporal_split_by_global_time(tmp_path: Path) -> None:
    rows = "".join(f"u,i{t},{t}\n" for t in range(9)) + "late,x,100\n"
    csv_log(tmp_path, rows)
    prepare(tmp_path / "run", PrepareRecipe(source=str(tmp_path), k_core=0, split="temporal"))
    assert card(tmp_path / "run")["splits"] == {"train": 8, "valid": 1, "test": 0, "none": 1}


def test_milliseconds_become_seconds_after_sorting(tmp_path: Path) -> None:
    reviews = [("b", 1999), ("a", 1001)]
    (tmp_path / "X.jsonl").write_text(
        "".join(
            json.dumps({"user_id": "u", "parent_asin": item, "timestamp": t}) + "\n"
            for item, t in reviews
        )
    )
    prepare(tmp_path / "run", PrepareRecipe(source=str(tmp_path), k_core=0))
    table = pq.read_table(tmp_path / "run" / "dataset" / "interactions.parquet").to_pydict()
    assert table["item_id"] == ["a", "b"]
    assert table["timestamp"] == [1, 1]


def test_min_rating_and_what_the_card_counts(tmp_path: Path) -> None:
    csv_log(
        tmp_path,
        "u,a,1,5\nu,b,2,5\nu,a,3,4\nu,b,4,1\nu,,5,5\nu,b,soon,5\nu,a,6\n",
        "user_id,item_id,timestamp,rating\n",
    )
    (tmp_path / "items.csv").write_text("item_id,title\na,A\na,A\na,other\nzzz,Z\n,no id\n")
    prepare(tmp_path / "run", PrepareRecipe(source=str(tmp_path), k_core=0, min_rating=2))
    told = card(tmp_path / "run")
    assert told["below_min_rating"] == 1
    assert told["after"]["events"] == 3
    assert told["share_of_repeated_targets"] == {"valid": 0, "test": 1}
    assert told["bad_rows"]["log"]["by_reason"] == {
        "no user or item id": 1,
        "not 4 fields": 1,
        "the timestamp is not a number": 1,
    }
    assert told["bad_rows"]["log"]["first"][0].startswith("interactions.csv:6: no user or item id")
    assert told["bad_rows"]["items"]["total"] == 1
    assert told["item_rows"] == {"duplicate": 2, "conflicting": 1, "not_in_log": 1}
    assert told["items_without_metadata"] == 1
    assert told["share_of_items_with"]["title"] == 0.5
    assert Dataset.load(tmp_path / "run" / "dataset").items[0].title == "A"  # the first is kept


def test_same_bytes_on_every_run(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path;"
        "from whyrec.catalog.prepare import PrepareRecipe, prepare;"
        "prepare(Path(sys.argv[1]), PrepareRecipe(source=sys.argv[2]))"
    )
    made = []
    for seed in ("1", "2"):
        run = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": f"UTC+{seed}"}
        command = [sys.executable, "-c", program, str(run), str(EXAMPLE)]
        subprocess.run(command, check=True, env=environment)
        files = sorted((run / "dataset").iterdir())
        made.append({f.name: f.read_bytes() for f in files if f.name != STAGE_FILE})
    assert set(made[0]) == {
        "card.json",
        "interactions.parquet",
        "items.parquet",
        "splits.parquet",
    }
    assert made[0] == made[1]


def test_unchanged_stage_returns_at_once_and_a_changed_file_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = PrepareRecipe(source=str(csv_log(tmp_path, "u,a,1\nu,b,2\n")), k_core=0)
    prepare(tmp_path / "run", recipe)
    before = (tmp_path / "run" / "dataset").stat().st_ino
    prepare(tmp_path / "run", recipe)
    assert "unchanged" in capsys.readouterr().err
    assert (tmp_path / "run" / "dataset").stat().st_ino == before
    csv_log(tmp_path, "u,a,1\nu,b,2\nu,c,3\n")
    prepare(tmp_path / "run", recipe)
    assert card(tmp_path / "run")["after"]["events"] == 3


def test_a_killed_stage_leaves_the_old_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = PrepareRecipe(source=str(csv_log(tmp_path, "u,a,1\nu,b,2\n")), k_core=0)
    prepare(tmp_path / "run", recipe)
    old = {f.name: f.read_bytes() for f in (tmp_path / "run" / "dataset").iterdir()}
    csv_log(tmp_path, "u,a,1\nu,c,2\n")
    with monkeypatch.context() as planted:

        def killed(*args: object, **kwargs: object) -> dict:
            raise KeyboardInterrupt

        planted.setattr(prepare_module, "make_card", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "run", recipe)
    assert {f.name: f.read_bytes() for f in (tmp_path / "run" / "dataset").iterdir()} == old
    prepare(tmp_path / "run", recipe)
    dataset = Dataset.load(tmp_path / "run" / "dataset")
    assert [item.item_id for item in dataset.items] == ["a", "c"]
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["dataset"]


def test_bad_sources(tmp_path: Path) -> None:
    fails(tmp_path, "name a source", source="")
    fails(tmp_path, "no file or folder .*/nowhere; download", source=str(tmp_path / "nowhere"))
    fails(tmp_path, "holds no files")
    (tmp_path / "inner").mkdir()
    fails(tmp_path, "give one of its subfolders: inner")
    (tmp_path / "notes.txt").write_text("Nothing to see here.\n")
    fails(tmp_path, r"could not tell the format .*notes\.txt.*name it with --format")
    fails(tmp_path, "there is no format 'amazon'", format="amazon")
    (tmp_path / "data.csv").write_bytes(b"PK\3\4" + b"\0" * 20)
    fails(tmp_path, "data.csv is a zip file, not text; unpack it first")


def test_bad_recipes(tmp_path: Path) -> None:
    csv_log(tmp_path, "u,a,1\n")
    fails(tmp_path, "no split 'random'; use one of leave-one-out, temporal", split="random")
    fails(tmp_path, "k_core must be 0", k_core=-1)
    fails(tmp_path, "min_rating needs ratings", min_rating=3)
    fails(tmp_path, "items_file=x.csv: there is no such file", items_file="x.csv")
    csv_log(tmp_path, "u,a\n", "user_id,item_id\n")
    fails(tmp_path, "a temporal split needs times", split="temporal")


def test_missing_columns_name_those_that_are_there(tmp_path: Path) -> None:
    csv_log(tmp_path, "u,a,1\n", "customer,item_id,timestamp\n")
    fails(
        tmp_path,
        "no column 'user_id'; its columns are customer, item_id, timestamp: "
        ".*--set user_column=NAME",
    )
    fails(tmp_path, "no column 'when'.*timestamp", timestamp_column="when", user_column="customer")
    (tmp_path / "items.csv").write_text("sku,title\na,A\n")
    fails(tmp_path, "items.csv has no column 'item_id'; .* sku, title", user_column="customer")
    (tmp_path / "shop.inter").write_text("user:token\titem_id:token\nu\ta\n")
    fails(tmp_path, r"shop\.inter has no column 'user_id'; its columns are user, item_id")


def test_several_logs(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text(HEADER + "u,a,1\n")
    fails(tmp_path, r"could be meant \(one.csv, two.csv\); name one with --set interactions_file")
    prepare(tmp_path / "run", PrepareRecipe(source=str(tmp_path / "two.csv"), k_core=0))
    assert card(tmp_path / "run")["files"]["log"]["name"] == "two.csv"


@pytest.mark.parametrize("kept", [5, 200, -20])
def test_truncated_gzip(tmp_path: Path, kept: int) -> None:
    rows = "".join(f"u{n},i{n * 7919 % 1000},{n}\n" for n in range(5000))
    whole = gzip.compress((HEADER + rows).encode())
    (tmp_path / "interactions.csv.gz").write_bytes(whole[:kept])
    fails(tmp_path, "truncated gzip file .*download it again")


@pytest.mark.parametrize("damaged", [slice(20, 60), slice(3000, 3100)])
def test_damaged_gzip(tmp_path: Path, damaged: slice) -> None:
    rows = "".join(f"u{n},i{n * 7919 % 1000},{n}\n" for n in range(5000))
    whole = bytearray(gzip.compress((HEADER + rows).encode()))
    whole[damaged] = b"x" * (damaged.stop - damaged.start)
    (tmp_path / "interactions.csv.gz").write_bytes(whole)
    fails(tmp_path, "(damaged|truncated) gzip .*download it again")


def test_wrong_format_named(tmp_path: Path) -> None:
    csv_log(tmp_path, "u,a,1\n")
    fails(tmp_path, "does not look like amazon2014 .*it looks like csv", format="amazon2014")
    fails(tmp_path, "does not look like jsonl .*it looks like csv", format="jsonl")
    os.rename(tmp_path / "interactions.csv", tmp_path / "prose.txt")
    (tmp_path / "prose.txt").write_text("Call me Ishmael.\n")
    fails(tmp_path, "does not look like movielens .*starts with 'Call me", format="movielens")


@pytest.mark.parametrize("content", ["", HEADER])
def test_empty_log(tmp_path: Path, content: str) -> None:
    csv_log(tmp_path, "", content)
    fails(tmp_path, "interactions.csv (is empty|holds no interactions)")


def test_nothing_left_after_k_core(tmp_path: Path) -> None:
    csv_log(tmp_path, "u,a,1\nv,b,2\n")
    fails(
        tmp_path,
        "nothing is left .* after the 5-core: its 2 events by 2 users on 2 items .*--k-core",
        k_core=5,
    )


def test_undecodable_bytes(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_bytes((HEADER + "u,café,1\n").encode("latin-1"))
    fails(tmp_path, "interactions.csv line 2 has bytes that are not UTF-8 .*convert")
    (tmp_path / "interactions.csv").write_bytes((HEADER + "u,a,1\n").encode("utf-16"))
    fails(tmp_path, "line 1 has bytes that are not UTF-8")


def test_timestamps_that_are_no_numbers(tmp_path: Path) -> None:
    csv_log(tmp_path, "u,a,1\nu,b,x\nu,c,nan\nu,d,1e999\nu,e,2.5\n")
    fails(tmp_path, "3 of the 5 rows .*timestamp is not a number .*interactions.csv:3")
    csv_log(tmp_path, "u,a,1\nu,b,x\nu,c,nan\nu,d,4\nu,e,2.5\n")
    prepare(tmp_path / "run", PrepareRecipe(source=str(tmp_path), k_core=0))
    assert card(tmp_path / "run")["bad_rows"]["log"]["total"] == 2


def test_an_open_quote(tmp_path: Path) -> None:
    csv_log(tmp_path, 'u,a,1\nu,"b,2\nu,c,3\n')
    fails(tmp_path, "line 3 opens a quote .* that is never closed")
