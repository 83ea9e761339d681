"""`whyrec add-items`: new items in a model folder, without training.

New items are encoded with the saved codebooks; every SID that was given stays. The model has never
seen them, but its codes have meaning, so a new item is recommended where its neighbours are.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from whyrec.backbone.load import load_backbone
from whyrec.catalog.alike import Alike
from whyrec.catalog.dataset import Item, read_items, write_items
from whyrec.catalog.readers.tables import Columns, read_item_table
from whyrec.decode.model_folder import (
    ADDED,
    ALIKE_FILE,
    SETTINGS_FILE,
    catalogue_file,
    read_catalogue,
)
from whyrec.sid.index import encode_new_items, read_sids, write_sids
from whyrec.sid.trie import Trie

RETIRED_ITEMS, RETIRED_SIDS = "retired-items.parquet", "retired-sids.parquet"


def add_items(folder: Path, items_file: Path) -> int:
    """Add the items of a table to a model folder; the number added.

    Args:
        folder: a model folder.
        items_file: CSV, TSV, JSON lines or Parquet with item_id, title, brand, categories,
            description (all but item_id may be missing).

    Raises:
        ValueError: when an item is there already, or the file is no table of items. The folder
            is then as it was.
    """
    if not (folder / SETTINGS_FILE).exists():
        raise ValueError(f"{folder} is not a WhyRec model folder; name one that `align` wrote")
    items, codes_NL = read_catalogue(folder)
    retired, retired_codes_RL = read_retired(folder, num_levels=codes_NL.shape[1])
    new_items = _new_items(items_file, known={item.item_id for item in [*items, *retired]})
    new_codes_ML = encode_new_items(
        new_items,
        # A retired item keeps its SID, for the day it comes back.
        torch.cat([codes_NL, retired_codes_RL]),
        embeddings=folder / "embeddings.safetensors",
        codebooks=folder / "codebooks.safetensors",
        load_backbone=load_backbone,
    )
    level_sizes = Trie.load(catalogue_file(folder, "trie.safetensors")).level_sizes
    codes_NL = torch.cat([codes_NL, new_codes_ML])
    with new_catalogue(folder, [*items, *new_items], codes_NL, level_sizes=level_sizes):
        pass
    return len(new_items)


@contextmanager
def new_catalogue(
    folder: Path, items: Sequence[Item], codes_NL: Tensor, *, level_sizes: Sequence[int]
) -> Iterator[Path]:
    """Put a catalogue in the place of a model folder's own; the old one counts until the end.

    Args:
        folder: the model folder.
        items: of the new catalogue.
        codes_NL: their SIDs.
        level_sizes: codes of each level.

    Yields:
        A scratch folder, for files that shall come with the catalogue.
    """
    scratch = folder / ".adding"
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
    scratch.mkdir()
    item_ids = [item.item_id for item in items]
    try:
        write_items(scratch / "items.parquet", items)
        write_sids(scratch / "sids.parquet", item_ids, codes_NL)
        Trie.build(codes_NL, level_sizes=tuple(level_sizes)).save(scratch / "trie.safetensors")
        if (folder / ALIKE_FILE).exists():
            known = Alike.load(catalogue_file(folder, ALIKE_FILE), item_ids=item_ids)
            alike = known.joined(items, new=_with_other_words(folder, items))
            alike.save(scratch / ALIKE_FILE, item_ids=item_ids)
        yield scratch
        _move_added(folder)
        # One rename decides: before it the old catalogue counts, after it the new one.
        os.replace(scratch, folder / ADDED)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _move_added(folder)


def _with_other_words(folder: Path, items: Sequence[Item]) -> list[int]:
    """Which of a new catalogue's items are not in the folder's own, or with other words."""
    old = read_items(catalogue_file(folder, "items.parquet"))
    words = {item.item_id: (item.brand, item.title) for item in old}
    return [n for n, i in enumerate(items) if words.get(i.item_id) != (i.brand, i.title)]


def read_retired(folder: Path, *, num_levels: int) -> tuple[list[Item], Tensor]:
    """Its retired items and the SIDs they had; none where nothing was ever retired."""
    path = catalogue_file(folder, RETIRED_ITEMS)
    items = read_items(path) if path.exists() else []
    if not items:
        return [], torch.zeros(0, num_levels, dtype=torch.int64)
    ids = [item.item_id for item in items]
    return items, read_sids(catalogue_file(folder, RETIRED_SIDS), ids)


def _new_items(items_file: Path, *, known: set[str]) -> list[Item]:
    """The items of the table; every row must be good, for an item given a SID keeps it."""
    catalogue = read_item_table(items_file, Columns())
    if catalogue.bad.total:
        raise ValueError(
            f"{catalogue.bad.total} rows of {items_file} cannot be read, the first is "
            f"{catalogue.bad.first[0]}; mend them or take them out"
        )
    if catalogue.duplicates:
        raise ValueError(
            f"{catalogue.duplicates} rows of {items_file} repeat the item id of an earlier row; "
            "keep one row an item"
        )
    if not catalogue.items:
        raise ValueError(f"{items_file} holds no items; give a table with at least one row")
    twice = [item_id for item_id in catalogue.items if item_id in known]
    if twice:
        raise ValueError(
            f"{len(twice)} of the items are in the catalogue already, {twice[0]!r} for one; "
            "leave them out, SIDs once given do not change"
        )
    return list(catalogue.items.values())


def _move_added(folder: Path) -> None:
    """Move finished files from `.added` to their places; again, if an earlier try was killed."""
    added = folder / ADDED
    if not added.exists():
        return
    for path in added.iterdir():
        os.replace(path, folder / path.name)
    added.rmdir()
