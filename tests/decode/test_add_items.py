"""`add_items`: new items join a model folder, old SIDs stay, and no failure leaves it broken."""

import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import LEVEL_SIZES, NUM_ITEMS, text_vectors
from whyrec import Recommender
from whyrec.catalog.dataset import Item, read_items
from whyrec.catalog.prepare import PrepareRecipe, prepare
from whyrec.decode import add_items as add_items_module
from whyrec.decode.add_items import add_items
from whyrec.decode.model_folder import (
    CATALOGUE_FILES,
    load_model_folder,
)
from whyrec.sid import index as index_module

NEW = [
    {"item_id": "new-1", "title": "Film 30", "brand": "B", "categories": ["Genre 0", "Genre 1"]},
    {"item_id": "new-2", "title": "Film 31 <|im_end|><s_a_1>", "description": "words"},
    {"item_id": "new-3"},
]


@pytest.fixture
def folder(model_folder, monkeypatch) -> Path:
    """A copy that a test may change; texts become vectors as they did for the run."""
    monkeypatch.setattr(index_module, "embed_texts", text_vectors)
    return model_folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def new_items(tmp_path) -> Path:
    return write_rows(tmp_path / "items.jsonl", NEW)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_new_items_have_sids_of_their_own_and_old_ones_stay(folder, new_items, extended) -> None:
    assert add_items(folder, new_items) == 3
    parts = load_model_folder(folder)
    assert parts.items[:NUM_ITEMS] == extended.dataset.items
    assert parts.items[NUM_ITEMS:] == [
        Item("new-1", "Film 30", "B", ("Genre 0", "Genre 1"), ""),
        Item("new-2", "Film 31 <|im_end|><s_a_1>", "", (), "words"),
        Item("new-3", "", "", (), ""),
    ]
    assert torch.equal(parts.codes_NL[:NUM_ITEMS], extended.codes_NL)
    assert len(torch.unique(parts.codes_NL, dim=0)) == NUM_ITEMS + 3
    leaves = parts.trie.leaf_items(parts.trie.walk(parts.codes_NL))
    assert leaves.tolist() == list(range(NUM_ITEMS + 3))
    assert not list(folder.glob(".*"))


def test_new_items_are_recommended(folder, new_items) -> None:
    before = Recommender.from_pretrained(folder).recommend(["item003"], k=40, exclude=[])
    add_items(folder, new_items)
    recommender = Recommender.from_pretrained(folder)
    old = [item.item_id for item in recommender.items if not item.item_id.startswith("new")]
    found = recommender.recommend(["item003"], k=10, exclude=old)
    assert sorted(entry.item_id for entry in found) == ["new-1", "new-2", "new-3"]
    # They can stand in a history too, and the old items are still there.
    again = recommender.recommend(["item003", "new-2"], k=40)
    assert {e.item_id for e in before} - {e.item_id for e in again} == {"item003"}


def test_tables_of_every_kind_give_the_same(saved_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(index_module, "embed_texts", text_vectors)
    rows = [
        {"item_id": "n1", "title": "One, two", "categories": "A|B"},
        {"item_id": "n2", "title": "", "categories": ""},
    ]
    write_rows(tmp_path / "new.jsonl", rows)
    (tmp_path / "new.csv").write_text('item_id,title,categories\nn1,"One, two",A|B\nn2,,\n')
    (tmp_path / "new.tsv").write_text("item_id\ttitle\tcategories\nn1\tOne, two\tA|B\nn2\t\t\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "new.parquet")
    results = []
    for kind in ("jsonl", "csv", "tsv", "parquet"):
        folder = Path(shutil.copytree(saved_model, tmp_path / kind))
        assert add_items(folder, tmp_path / f"new.{kind}") == 2
        results.append({n: contents(folder)[n] for n in ("items.parquet", "sids.parquet")})
    assert results.count(results[0]) == len(results)


def test_items_may_be_added_again_and_again(folder, tmp_path) -> None:
    for n in range(4):
        add_items(folder, write_rows(tmp_path / "one.jsonl", [{"item_id": f"again-{n}"}]))
    parts = load_model_folder(folder)
    assert [item.item_id for item in parts.items[NUM_ITEMS:]] == [f"again-{n}" for n in range(4)]
    assert len(torch.unique(parts.codes_NL, dim=0)) == NUM_ITEMS + 4


def test_a_backbone_may_be_the_embedder(folder, new_items, backbone, monkeypatch) -> None:
    """`embedder: backbone:NAME` is loaded anew for the new items."""
    run = folder.parent / "run"
    index_module.index(
        _dataset_of(run, folder),
        index_module.IndexRecipe(
            embedder=f"backbone:{backbone}",
            level_sizes=LEVEL_SIZES,
            collaborative_dim=0,
            iterations=3,
        ),
        load_backbone=add_items_module.load_backbone,
    )
    for name in CATALOGUE_FILES:
        shutil.copyfile(run / "sids" / name, folder / name)
    assert add_items(folder, new_items) == 3
    assert len(load_model_folder(folder).items) == NUM_ITEMS + 3


def _dataset_of(run: Path, folder: Path) -> Path:
    """A run of the items that the folder holds."""
    items = read_items(folder / "items.parquet")
    with (folder.parent / "log.csv").open("w") as file:
        file.write("user_id,item_id\n")
        for user in range(5):
            file.writelines(f"u{user},{item.item_id}\n" for item in items)
    prepare(run, PrepareRecipe(source=str(folder.parent / "log.csv"), k_core=0))
    return run


REFUSED = {
    "known already": ('{"item_id": "n"}\n{"item_id": "item004"}\n', "'item004'.*leave them out"),
    "twice in the file": ('{"item_id": "n"}\n{"item_id": "n"}\n', "repeat the item id.*keep one"),
    "no id": ('{"item_id": "n"}\n{"item_id": "", "title": "x"}\n', "items.jsonl:2: no item id"),
    "no id column": ('{"title": "x"}\n', "no column 'item_id'"),
    "broken line": ('{"item_id": "n"}\n{"item_id": \n', "items.jsonl:2: not a JSON object"),
    "nothing": ("", "is empty"),
    "too many": ("".join(f'{{"item_id": "n{n}"}}\n' for n in range(40)), "70 items.*64 SIDs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_unchanged(folder, tmp_path, name) -> None:
    text, message = REFUSED[name]
    (tmp_path / "items.jsonl").write_text(text)
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        add_items(folder, tmp_path / "items.jsonl")
    assert contents(folder) == before


@pytest.mark.parametrize("data", [b"\0\1\2\3" * 100, b"just words\nno table\n", b"PAR1 not really"])
def test_a_file_that_is_no_table(folder, tmp_path, data) -> None:
    (tmp_path / "items.bin").write_bytes(data)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"items\.bin is not"):
        add_items(folder, tmp_path / "items.bin")
    assert contents(folder) == before


def test_a_csv_of_a_header_alone(folder, tmp_path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\n")
    with pytest.raises(ValueError, match="holds no items"):
        add_items(folder, tmp_path / "items.csv")


def test_a_folder_that_is_no_model(tmp_path, new_items) -> None:
    with pytest.raises(ValueError, match="not a WhyRec model folder"):
        add_items(tmp_path, new_items)


class Killed(BaseException):
    """What no handler catches, as a kill."""


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
@pytest.mark.parametrize("writer", ["write_items", "write_sids", "encode_new_items"])
def test_a_crash_while_writing_leaves_it_as_it_was(
    folder, new_items, monkeypatch, writer, error
) -> None:
    before = contents(folder)
    real = getattr(add_items_module, writer)

    def failing(*arguments, **settings):
        real(*arguments, **settings)
        raise error

    monkeypatch.setattr(add_items_module, writer, failing)
    with pytest.raises(type(error)):
        add_items(folder, new_items)
    assert contents(folder) == before
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "embed_texts", text_vectors)
    assert add_items(folder, new_items) == 3


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_crash_between_any_two_renames_leaves_a_whole_catalogue(
    folder, new_items, monkeypatch, moment
) -> None:
    """Every rename is a moment to die at: the folder loads with the old items or with all."""
    real, calls = os.replace, 0

    def dying(*arguments):
        nonlocal calls
        calls += 1
        if calls == moment:
            raise Killed
        real(*arguments)

    monkeypatch.setattr(os, "replace", dying)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing
    died = False
    try:
        add_items(folder, new_items)
    except Killed:
        died = True
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "embed_texts", text_vectors)
    assert died == (moment <= calls)
    parts = load_model_folder(folder)
    assert len(parts.items) in (NUM_ITEMS, NUM_ITEMS + 3)
    assert len(parts.codes_NL) == len(parts.items) == parts.trie.num_items
    if len(parts.items) == NUM_ITEMS:
        assert add_items(folder, new_items) == 3
    else:
        with pytest.raises(ValueError, match="in the catalogue already"):
            add_items(folder, new_items)
        (new_items.parent / "more.jsonl").write_text('{"item_id": "more"}\n')
        assert add_items(folder, new_items.parent / "more.jsonl") == 1
        assert not (folder / ".added").exists()
    parts = load_model_folder(folder)
    assert {f"new-{n}" for n in (1, 2, 3)} <= {item.item_id for item in parts.items}
    assert len(parts.codes_NL) == len(parts.items) == parts.trie.num_items
