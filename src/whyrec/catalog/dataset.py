"""The prepared dataset as every later stage reads it: items, sequences and evaluation examples.

`whyrec prepare` writes the folder (see `whyrec.catalog.prepare`); nothing here knows where the data
came from. Items and users are numbered by the code-point order of their ids, so an index means the
same thing on every machine.

    >>> dataset = Dataset.load(Path("runs/ml-100k/dataset"))          # doctest: +SKIP
    >>> test = dataset.examples("test").take(100, seed=0)             # doctest: +SKIP
    >>> [dataset.items[i].title for i in test.histories[0][-3:]]      # doctest: +SKIP
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SPLITS = ("train", "valid", "test", "none")  # split codes 0..3; "none" is history only
ITEM_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("description", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Item:
    """One item of the catalogue; any text may be empty, and titles need not be unique."""

    item_id: str
    title: str = ""
    brand: str = ""
    categories: tuple[str, ...] = ()
    description: str = ""


@dataclass(frozen=True)
class Examples:
    """Events to predict: for each, the user, all that the user did before it, and the item.

    Attributes:
        users_E: int32 user indices.
        histories: for each event the int32 item indices before it, oldest first, never empty.
        targets_E: int32 item indices.
    """

    users_E: np.ndarray
    histories: list[np.ndarray]
    targets_E: np.ndarray

    def __len__(self) -> int:
        return len(self.users_E)

    def take(self, n: int, seed: int) -> "Examples":
        """A random subset of `n` examples (all of them when there are fewer), in their order.

        Subsets of one seed are nested: the examples of `take(10, s)` are among `take(20, s)`.
        """
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:n])
        return Examples(
            self.users_E[chosen], [self.histories[i] for i in chosen], self.targets_E[chosen]
        )

    def at_most(self, n: int) -> "Examples":
        """The fixed subset of `n` that a setting such as `valid_users` asks for; 0 for all."""
        return self.take(n, seed=0) if 0 < n < len(self) else self


class Dataset:
    """Items, users and their sequences.

    Attributes:
        items: item index → `Item`.
        item_index: item id → item index.
        user_ids: user index → user id.
        user_index: user id → user index.
        sequences: user index → int32 item indices in time order, over all splits.
        splits: user index → int8 codes into `SPLITS`, one for each event of the sequence.
    """

    def __init__(
        self,
        items: Sequence[Item],
        user_ids: Sequence[str],
        sequences: Sequence[np.ndarray],
        splits: Sequence[np.ndarray],
    ) -> None:
        assert len(user_ids) == len(sequences) == len(splits)
        self.items = list(items)
        self.user_ids = list(user_ids)
        self.sequences = list(sequences)
        self.splits = list(splits)
        self.item_index = {item.item_id: index for index, item in enumerate(self.items)}
        self.user_index = {user_id: index for index, user_id in enumerate(self.user_ids)}

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Read `runs/NAME/dataset`.

        Raises:
            ValueError: when the folder does not hold a prepared dataset.
        """
        for name in ("items.parquet", "interactions.parquet", "splits.parquet"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; run `whyrec prepare` for this run first")
        items = read_items(folder / "items.parquet")
        events = _read_table(folder / "interactions.parquet")
        splits = _read_table(folder / "splits.parquet")
        if not events["user_id"].equals(splits["user_id"]):
            raise ValueError(
                f"the interactions and the splits in {folder} belong to different datasets; "
                "run `whyrec prepare` again with --force"
            )
        item_ids = pa.array([item.item_id for item in items], pa.string())
        items_E = pc.index_in(events["item_id"], value_set=item_ids).cast(pa.int32())
        if items_E.null_count:
            raise ValueError(
                f"{items_E.null_count} interactions in {folder} are of items that items.parquet "
                "lacks; run `whyrec prepare` again with --force"
            )
        split_codes_E = pc.index_in(splits["split"], value_set=pa.array(SPLITS))
        users = events["user_id"].combine_chunks().dictionary_encode()  # rows are sorted by user
        ends = np.cumsum(np.bincount(users.indices.to_numpy(), minlength=len(users.dictionary)))
        return cls(
            items,
            users.dictionary.to_pylist(),
            np.split(items_E.to_numpy().astype(np.int32), ends[:-1]),
            np.split(split_codes_E.to_numpy().astype(np.int8), ends[:-1]),
        )

    def user(self, user_id: str) -> int:
        """The index of a user; ValueError with the nearest known ids when there is none."""
        return _lookup(user_id, self.user_index, "user")

    def item(self, item_id: str) -> int:
        """The index of an item; ValueError with the nearest known ids when there is none."""
        return _lookup(item_id, self.item_index, "item")

    def training_sequences(self) -> list[np.ndarray]:
        """For each user the int32 item indices of the training events, in time order."""
        train = SPLITS.index("train")
        return [
            sequence[codes == train]
            for sequence, codes in zip(self.sequences, self.splits, strict=True)
        ]

    def examples(self, split: Literal["valid", "test"]) -> Examples:
        """The events of a split, each with everything that its user did before it."""
        if split not in ("valid", "test"):
            raise ValueError(f"there is no evaluation split {split!r}; use valid or test")
        wanted = SPLITS.index(split)
        users, histories, targets = [], [], []
        for user, (sequence, codes) in enumerate(zip(self.sequences, self.splits, strict=True)):
            for position in np.flatnonzero(codes == wanted):
                users.append(user)
                histories.append(sequence[:position])
                targets.append(sequence[position])
        return Examples(np.array(users, np.int32), histories, np.array(targets, np.int32))


def nearest_ids(unknown: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The `n` known ids that look most like an unknown one, best first.

    Example:
        >>> nearest_ids("B00475", ["B004756YJA", "7806397051", "B00476"], n=1)
        ['B00476']
    """
    return difflib.get_close_matches(unknown, list(known), n=n, cutoff=0.3)


def read_items(path: Path) -> list[Item]:
    """Read an `items.parquet`, in the order of the file.

    Raises:
        ValueError: when it is not a Parquet file with the columns of `ITEM_SCHEMA`.
    """
    table = _read_table(path)
    if missing := [name for name in ITEM_SCHEMA.names if name not in table.column_names]:
        raise ValueError(
            f"{path} has no column {missing[0]!r} (it has {', '.join(table.column_names)}); "
            "make it with `whyrec prepare`"
        )
    columns = [table[name].to_pylist() for name in ITEM_SCHEMA.names]
    return [
        Item(item_id, title or "", brand or "", tuple(categories or ()), description or "")
        for item_id, title, brand, categories, description in zip(*columns, strict=True)
    ]


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write an `items.parquet`, in the order given; equal items give equal bytes."""
    rows = list(items)
    columns = {
        "item_id": [item.item_id for item in rows],
        "title": [item.title for item in rows],
        "brand": [item.brand for item in rows],
        "categories": [list(item.categories) for item in rows],
        "description": [item.description for item in rows],
    }
    write_table(path, pa.table(columns, schema=ITEM_SCHEMA))


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet under a temporary name, then rename; equal tables give equal bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(
        table.replace_schema_metadata(None),
        temporary,
        version="2.6",
        compression="zstd",
        compression_level=3,
        row_group_size=1 << 20,
        store_schema=False,
    )
    os.replace(temporary, path)


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from None


def _lookup(wanted: str, index: dict[str, int], kind: str) -> int:
    if wanted in index:
        return index[wanted]
    near = nearest_ids(wanted, index)
    hint = f"; the nearest known are {', '.join(near)}" if near else ""
    raise ValueError(f"there is no {kind} {wanted!r} in this dataset{hint}")
