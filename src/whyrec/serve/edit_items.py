"""Changes of a model folder's catalogue: items added, retired, or encoded again.

    change_items(folder, put=[Item("new-1", "A film")])     # added, or encoded again if known
    change_items(folder, retire=["50"])

As with `whyrec add-items`, the codebooks stay and nothing is trained: the model knows what the
codes mean. A new folder of catalogue files is made whole before one rename lets it count. A
retired item leaves the catalogue and the trie; its record and its SID are kept beside them, so that
histories with it can still be read and no other item is given its SID. Added again, it gets it
back.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from whyrec.backbone.load import load_backbone
from whyrec.catalog.dataset import Item, write_items
from whyrec.decode.add_items import RETIRED_ITEMS, RETIRED_SIDS, new_catalogue, read_retired
from whyrec.decode.model_folder import read_catalogue, read_settings
from whyrec.sid.index import encode_new_items, write_sids


def change_items(folder: Path, *, put: Sequence[Item] = (), retire: Sequence[str] = ()) -> None:
    """Change a model folder's catalogue; the folder is as it was when this fails.

    Args:
        folder: a model folder.
        put: items that are new, were retired, or have new texts. A new one gets a SID, a retired
            one its old SID again, a live one the SID that its new text asks for.
        retire: ids of live items.

    Raises:
        ValueError: when an id comes twice, there is no room for the new items, or nothing is left.
    """
    settings = read_settings(folder)
    items, codes_NL = read_catalogue(folder)
    gone, gone_codes_NL = read_retired(folder, num_levels=codes_NL.shape[1])
    ids = [*(item.item_id for item in put), *retire]
    if twice := next((item_id for item_id in ids if ids.count(item_id) > 1), None):
        raise ValueError(f"the item {twice!r} comes twice; name each item once")
    old_place = {item.item_id: n for n, item in enumerate([*items, *gone])}
    old_codes = dict(zip(old_place, [*codes_NL.tolist(), *gone_codes_NL.tolist()], strict=True))

    live = {item.item_id: item for item in items}
    retired = {item.item_id: item for item in gone}
    to_encode = [item for item in put if item.item_id not in retired]
    for item in put:
        live[item.item_id] = item  # a known one keeps its place
        retired.pop(item.item_id, None)
    for item_id in retire:
        if item_id not in live:
            raise ValueError(f"the item {item_id!r} is not in the catalogue, or retired already")
        retired[item_id] = live.pop(item_id)
    if not live:
        raise ValueError("nothing would be left to recommend; keep at least one item")

    codes = dict(old_codes)
    if to_encode:
        for item in to_encode:
            codes.pop(item.item_id, None)
        taken_NL = torch.tensor(list(codes.values()), dtype=torch.int64)
        taken_NL = taken_NL.view(-1, codes_NL.shape[1])
        new_ML = encode_new_items(
            to_encode,
            taken_NL,
            embeddings=folder / "embeddings.safetensors",
            codebooks=folder / "codebooks.safetensors",
            load_backbone=load_backbone,
        )
        codes |= {item.item_id: row for item, row in zip(to_encode, new_ML.tolist(), strict=True)}
    live_codes_NL = torch.tensor([codes[item_id] for item_id in live])
    gone_codes_NL = torch.tensor([codes[item_id] for item_id in retired])
    catalogue = new_catalogue(
        folder, list(live.values()), live_codes_NL, level_sizes=settings.level_sizes
    )
    with catalogue as scratch:
        write_items(scratch / RETIRED_ITEMS, retired.values())
        write_sids(scratch / RETIRED_SIDS, list(retired), gone_codes_NL)
