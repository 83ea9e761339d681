"""`card.json`: what came in, what was dropped and why, and what the prepared dataset looks like."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whyrec.catalog.dataset import SPLITS, Item
from whyrec.catalog.raw import RawData
from whyrec.catalog.source import BadRows, Files
from whyrec.stage import fingerprint

_QUANTILES = {"min": 0.0, "10%": 0.1, "50%": 0.5, "90%": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Events:
    """The events that stay, sorted by user index and position; arrays have one entry an event."""

    user_ids: list[str]
    item_ids: list[str]
    users_E: np.ndarray
    items_E: np.ndarray
    timestamps_E: np.ndarray
    positions_E: np.ndarray
    splits_E: np.ndarray
    below_min_rating: int


def make_card(
    raw: RawData, events: Events, items: Sequence[Item], *, files: Files, format_name: str
) -> dict:
    """Plain JSON values; nothing in it depends on the machine or the time."""
    users, catalogue, count = len(events.user_ids), len(items), len(events.users_E)
    known = raw.catalogue.items
    titles = [item.title for item in items if item.title]
    sources = {"log": files.log} | ({"items": files.items} if files.items else {})
    return {
        "format": format_name,
        "files": {
            role: {"name": path.name, "sha256": fingerprint(path), "bytes": path.stat().st_size}
            for role, path in sources.items()
        },
        "before": {
            "users": len(raw.log.user_ids),
            "items": len(raw.log.item_ids),
            "events": len(raw.log),
        },
        "below_min_rating": events.below_min_rating,
        "after": {"users": users, "items": catalogue, "events": count},
        "density": round(count / (users * catalogue), 8),
        "history_length": _quantiles(np.bincount(events.users_E)),
        "events_an_item": _quantiles(np.bincount(events.items_E)),
        "splits": {name: int((events.splits_E == code).sum()) for code, name in enumerate(SPLITS)},
        "share_of_repeated_targets": _repeated_targets(events),
        "share_of_items_with": {
            name: round(sum(bool(getattr(item, name)) for item in items) / catalogue, 6)
            for name in ("title", "brand", "categories", "description")
        },
        "items_without_metadata": sum(item.item_id not in known for item in items),
        "items_sharing_a_title": len(titles) - len(set(titles)),
        "item_rows": {
            "duplicate": raw.catalogue.duplicates,
            "conflicting": raw.catalogue.conflicting,
            "not_in_log": raw.catalogue.unused,
        },
        "bad_rows": {"log": _bad(raw.log.bad), "items": _bad(raw.catalogue.bad)},
    }


def summary_lines(card: dict) -> list[str]:
    """What a person wants to know of a card at once."""
    before, after, rows = card["before"], card["after"], card["item_rows"]
    lines = [
        f"{after['events']:,} events by {after['users']:,} users on {after['items']:,} items "
        f"({before['events']:,} by {before['users']:,} on {before['items']:,} as read)",
        ", ".join(f"{count:,} {name}" for name, count in card["splits"].items() if count),
    ]
    if rows["duplicate"]:
        lines.append(
            f"{rows['duplicate']:,} item rows repeat an id ({rows['conflicting']:,} with other "
            "texts); the first of each was kept"
        )
    for role, bad in card["bad_rows"].items():
        if bad["total"]:
            lines.append(f"{bad['total']:,} bad rows in the {role}; the first is {bad['first'][0]}")
    return lines


def _quantiles(counts: np.ndarray) -> dict[str, float]:
    # "lower" takes a value that occurs, so no rounding can differ between machines.
    found = {name: int(np.quantile(counts, q, method="lower")) for name, q in _QUANTILES.items()}
    return found | {"mean": round(int(counts.sum()) / len(counts), 4)}


def _repeated_targets(events: Events) -> dict[str, float]:
    """Of the targets of each split, the share that is already in its user's history."""
    pairs_E = events.users_E.astype(np.int64) * len(events.item_ids) + events.items_E
    repeated_E = np.ones(len(pairs_E), bool)
    repeated_E[np.unique(pairs_E, return_index=True)[1]] = False  # first of each pair
    shares = {}
    for name in ("valid", "test"):
        chosen_E = events.splits_E == SPLITS.index(name)
        shares[name] = round(float(repeated_E[chosen_E].mean()), 6) if chosen_E.any() else 0.0
    return shares


def _bad(bad: BadRows) -> dict:
    return {
        "total": bad.total,
        "by_reason": dict(sorted(bad.by_reason.items())),
        "first": bad.first,
    }
