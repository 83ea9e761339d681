"""`whyrec add-items`: new items in a model folder, without training.

New items are encoded with the saved codebooks; every SID that was given stays. The model has never
seen them, but its codes have meaning, so a new item is recommended where its neighbours are.
"""

import os
import tempfile
from pathlib import Path

import torch

from whyrec.catalog.dataset import read_items, write_items
from whyrec.catalog.readers.tables import Columns, read_item_table
from whyrec.decode.model_folder import CATALOGUE_FILES, SETTINGS_FILE
from whyrec.sid.index import encode_new_items, read_sids, write_sids
from whyrec.sid.trie import Trie


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
    items = read_items(folder / "items.parquet")
    new_items = list(read_item_table(items_file, Columns()).items.values())
    known = {item.item_id for item in items}
    twice = [item.item_id for item in new_items if item.item_id in known]
    if twice:
        raise ValueError(
            f"{len(twice)} of the items are in the catalogue already, {twice[0]!r} for one; "
            "leave them out, SIDs once given do not change"
        )
    codes_NL = read_sids(folder / "sids.parquet", [item.item_id for item in items])
    new_codes_ML = encode_new_items(
        new_items,
        codes_NL,
        embeddings=folder / "embeddings.safetensors",
        codebooks=folder / "codebooks.safetensors",
    )
    everything = [*items, *new_items]
    codes_NL = torch.cat([codes_NL, new_codes_ML])
    level_sizes = Trie.load(folder / "trie.safetensors").level_sizes
    # All files are whole before the first one is renamed.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adding") as name:
        scratch = Path(name)
        write_items(scratch / "items.parquet", everything)
        write_sids(scratch / "sids.parquet", [item.item_id for item in everything], codes_NL)
        Trie.build(codes_NL, level_sizes=level_sizes).save(scratch / "trie.safetensors")
        for file in ("items.parquet", *CATALOGUE_FILES):
            if (scratch / file).exists():
                os.replace(scratch / file, folder / file)
    return len(new_items)
