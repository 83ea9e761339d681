from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrec.catalog.dataset import Dataset, Item, nearest_ids, read_items, write_items
from whyrec.catalog.prepare import PrepareRecipe, prepare

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(Item, text, text, text, st.lists(text, max_size=3).map(tuple), text), max_size=5
    )
)
def test_items_survive_the_file(tmp_path_factory, items: list[Item]) -> None:
    path = tmp_path_factory.mktemp("items") / "items.parquet"
    write_items(path, items)
    assert read_items(path) == items
    first = path.read_bytes()
    write_items(path, items)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "interactions.csv").write_text(
        "user_id,item_id,timestamp\n"
        "zoe,tea,3\nzoe,cup,1\nzoe,pot,2\nzoe,tea,4\namy,pot,1\namy,tea,9\nbob,cup,5\n"
    )
    (tmp_path / "items.csv").write_text("item_id,title,categories\ntea,Tea,Food|Drink\npot,Pot,\n")
    prepare(tmp_path / "run", PrepareRecipe(source=str(tmp_path), k_core=0))
    return tmp_path / "run" / "dataset"


def test_round_trip(prepared: Path) -> None:
    dataset = Dataset.load(prepared)
    assert dataset.items == [
        Item("cup"),
        Item("pot", "Pot"),
        Item("tea", "Tea", categories=("Food", "Drink")),
    ]
    assert dataset.user_ids == ["amy", "bob", "zoe"]
    assert [s.tolist() for s in dataset.sequences] == [[1, 2], [0], [0, 1, 2, 2]]
    assert [s.tolist() for s in dataset.training_sequences()] == [[1, 2], [0], [0, 1]]
    assert all(s.dtype == np.int32 for s in dataset.sequences)
    for split, history, target in (("valid", [0, 1], 2), ("test", [0, 1, 2], 2)):
        examples = dataset.examples(split)
        assert len(examples) == 1
        assert examples.users_E.tolist() == [2]
        assert examples.histories[0].tolist() == history
        assert examples.targets_E.tolist() == [target]
        assert examples.targets_E.dtype == np.int32
    assert dataset.item("pot") == dataset.item_index["pot"] == 1
    assert dataset.user("zoe") == 2


def test_unknown_ids_name_their_neighbours(prepared: Path) -> None:
    dataset = Dataset.load(prepared)
    with pytest.raises(ValueError, match=r"no item 'teas'.*nearest known are tea"):
        dataset.item("teas")
    with pytest.raises(ValueError, match=r"no user 'zoé'.*zoe"):
        dataset.user("zoé")
    with pytest.raises(ValueError, match="no evaluation split 'train'"):
        dataset.examples("train")  # type: ignore[arg-type]
    assert nearest_ids("B00475", ["B004756YJA", "7806397051", "B00476"], n=1) == ["B00476"]
    assert nearest_ids("qqq", ["1", "2"]) == []


def test_take_is_fixed_ordered_and_nested() -> None:
    length = 30
    dataset = Dataset(
        [Item(str(i)) for i in range(length)],
        [str(u) for u in range(length)],
        [np.array([u, u, u], np.int32) for u in range(length)],
        [np.array([0, 1, 2], np.int8)] * length,
    )
    examples = dataset.examples("test")
    small, large = (examples.take(n, 3).users_E.tolist() for n in (5, 12))
    assert small == examples.take(5, 3).users_E.tolist() == sorted(small)
    assert set(small) < set(large)
    assert small != examples.take(5, 4).users_E.tolist()
    assert len(examples.take(99, 0)) == length
    assert examples.at_most(5).users_E.tolist() == examples.take(5, 0).users_E.tolist()
    assert examples.at_most(0) is examples.at_most(length) is examples


def test_folders_that_are_no_dataset(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(ValueError, match="run `whyrec prepare`"):
        Dataset.load(tmp_path / "nothing")
    (prepared / "items.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        Dataset.load(prepared)
