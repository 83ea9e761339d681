"""`whyrec prepare`: raw files → a dataset folder that every later stage reads.

Read the log and the items, drop rows below `min_rating`, take the iterated k-core, sort stably by
time (rows of equal time stay in the order of the file as it was downloaded, on which the published
numbers of Amazon 2014 rest), split, and write:

    items.parquet         item_id, title, brand, categories, description; sorted by item_id
    interactions.parquet  user_id, item_id, timestamp (seconds), position; by user_id, position
    splits.parquet        user_id, position, split (train, valid, test, none)
    card.json             what came in, what was dropped and why, what is left

Repeats in a history are kept; items without a metadata row are kept with empty texts. The same
files give the same bytes on every machine.

    whyrec prepare ml-100k --run runs/ml-100k
    whyrec prepare FOLDER --run runs/NAME --format csv --k-core 5 --split leave-one-out
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from whyrec.catalog import readers, splits
from whyrec.catalog.card import Events, make_card, summary_lines
from whyrec.catalog.dataset import SPLITS, Item, write_items, write_table
from whyrec.catalog.kcore import k_core
from whyrec.catalog.raw import Log, RawData
from whyrec.catalog.readers.tables import Columns
from whyrec.catalog.source import BadRows
from whyrec.packaged import packaged_folder
from whyrec.stage import run_stage, write_json

EMBEDDED = "ml-100k"  # MovieLens-100K out of the recbole wheel; a folder of that name is ./ml-100k


@dataclass
class PrepareRecipe(Columns):
    """What to prepare; the keys of `Columns` name files and columns of your own data."""

    source: str = ""  # a folder, a log file, or ml-100k for the embedded default
    format: str = ""  # one of readers.FORMATS; empty: told from the files
    k_core: int = 5  # 0 or 1: off
    split: str = "leave-one-out"  # or temporal
    min_rating: float = 0.0  # drop events rated lower; 0: off


def prepare(run: Path, recipe: PrepareRecipe, *, force: bool = False) -> None:
    """Make `run/dataset`; return at once when it is already there, made from the same files.

    Raises:
        ValueError: for a source that cannot be read or that leaves nothing, saying what to do.
    """
    if not recipe.source:
        raise ValueError("name a source: a folder, a log file, or ml-100k")
    if recipe.split not in splits.RULES:
        raise ValueError(
            f"there is no split {recipe.split!r}; use one of {', '.join(splits.RULES)}"
        )
    if recipe.k_core < 0:
        raise ValueError(f"k_core must be 0 (off) or more, not {recipe.k_core}")
    source = Path(recipe.source)
    columns: Columns = recipe
    if recipe.source == EMBEDDED:
        source = packaged_folder("recbole") / "recbole" / "dataset_example" / EMBEDDED
    elif source.is_file():
        columns = replace(recipe, interactions_file=source.name)
    format_name, files = readers.locate(source, columns, format_name=recipe.format)

    def build(folder: Path) -> dict:
        raw = readers.FORMATS[format_name].read(files, columns)
        _check_bad(files.log, raw.log.bad, len(raw.log))
        if files.items is not None:
            catalogue = raw.catalogue
            good = len(catalogue.items) + catalogue.duplicates + catalogue.unused
            _check_bad(files.items, catalogue.bad, good)
        events = _select(raw.log, recipe, files.log)
        items = _items(raw, events)
        _write(folder, events, items)
        card = make_card(raw, events, items, files=files, format_name=format_name)
        card["recipe"] = {
            key: value for key, value in asdict(recipe).items() if key not in ("source", "format")
        }
        write_json(folder / "card.json", card)
        print(f"prepare: {run / 'dataset'}")
        for line in summary_lines(card):
            print(f"  {line}")
        return {"before": card["before"], "after": card["after"]}

    inputs = {"log": files.log} | ({"items": files.items} if files.items else {})
    config = asdict(recipe) | {"format": format_name}
    run_stage(run / "dataset", build, stage="prepare", config=config, inputs=inputs, force=force)


def _check_bad(path: Path, bad: BadRows, good: int) -> None:
    if bad.total > good:
        reason, _ = bad.by_reason.most_common(1)[0]
        raise ValueError(
            f"{bad.total} of the {bad.total + good} rows of {path} cannot be read, most because "
            f"{reason} (the first is {bad.first[0]}); check the format and the column names"
        )


def _select(log: Log, recipe: PrepareRecipe, path: Path) -> Events:
    """The events that stay, sorted by user and time, with their splits."""
    if not len(log):
        raise ValueError(f"{path} holds no interactions; give a log with at least one row")
    if recipe.split == "temporal" and log.clock != "time":
        raise ValueError(
            f"a temporal split needs times, and {path} has none; use --split leave-one-out"
        )
    users_E, items_E, ticks_E = log.users_E, log.items_E, log.timestamps_E
    kept = np.arange(len(log))
    if recipe.min_rating:
        ratings_E = log.ratings_E
        if np.isnan(ratings_E).all():
            raise ValueError(f"min_rating needs ratings, and {path} has none; leave it out")
        kept = np.flatnonzero(ratings_E >= recipe.min_rating)
        if not len(kept):
            raise ValueError(f"no event of {path} is rated {recipe.min_rating} or higher")
    rated = kept
    kept = rated[k_core(users_E[rated], items_E[rated], k=recipe.k_core)]
    if not len(kept):
        raise ValueError(
            f"nothing is left of {path} after the {recipe.k_core}-core: its {len(rated)} events "
            f"by {len(np.unique(users_E[rated]))} users on {len(np.unique(items_E[rated]))} items "
            "are too thin; use a smaller --k-core, or 0 for none"
        )
    kept = kept[np.argsort(ticks_E[kept], kind="stable")]
    time_ranks_E = np.arange(len(kept))
    user_ids, users_E = _renumber(log.user_ids, users_E[kept])
    item_ids, items_E = _renumber(log.item_ids, items_E[kept])
    by_user = np.argsort(users_E, kind="stable")
    users_E = users_E[by_user]
    lengths_U = np.bincount(users_E)
    starts_U = np.cumsum(lengths_U) - lengths_U
    positions_E = (np.arange(len(users_E)) - starts_U[users_E]).astype(np.int32)
    if recipe.split == "temporal":
        splits_E = splits.temporal(positions_E, time_ranks_E[by_user])
    else:
        splits_E = splits.leave_one_out(positions_E, lengths_U[users_E])
    return Events(
        user_ids=user_ids,
        item_ids=item_ids,
        users_E=users_E,
        items_E=items_E[by_user],
        timestamps_E=ticks_E[kept][by_user] // log.ticks_per_second,
        positions_E=positions_E,
        splits_E=splits_E,
        below_min_rating=len(log) - len(rated),
    )


def _renumber(ids: list[str], numbers_E: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The ids in use, sorted by code point, and the events' numbers into them."""
    used = np.unique(numbers_E).tolist()
    used.sort(key=ids.__getitem__)
    new = np.full(len(ids), -1, np.int32)
    new[used] = np.arange(len(used), dtype=np.int32)
    return [ids[number] for number in used], new[numbers_E]


def _items(raw: RawData, events: Events) -> list[Item]:
    known = raw.catalogue.items
    return [known.get(item_id) or Item(item_id) for item_id in events.item_ids]


def _write(folder: Path, events: Events, items: list[Item]) -> None:
    write_items(folder / "items.parquet", items)
    user_ids_E = pa.array(events.user_ids, pa.string()).take(pa.array(events.users_E))
    item_ids_E = pa.array(events.item_ids, pa.string()).take(pa.array(events.items_E))
    positions_E = pa.array(events.positions_E, pa.int32())
    interactions = {
        "user_id": user_ids_E,
        "item_id": item_ids_E,
        "timestamp": pa.array(events.timestamps_E, pa.int64()),
        "position": positions_E,
    }
    write_table(folder / "interactions.parquet", pa.table(interactions))
    split_names_E = pa.array(SPLITS).take(pa.array(events.splits_E))
    write_table(
        folder / "splits.parquet",
        pa.table({"user_id": user_ids_E, "position": positions_E, "split": split_names_E}),
    )
