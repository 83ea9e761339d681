"""What every reader returns: a log of events and a catalogue of items, before any filtering."""

import html
import math
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, Literal

import numpy as np

from whyrec.catalog.dataset import Item
from whyrec.catalog.source import BadRows

_INT64_MAX = 2**63 - 1
# Known tags only: "<s_a_1>" or "<|im_end|>" in a title is text, and must stay text.
_TAG = re.compile(
    r"</?(?:a|abbr|b|big|blockquote|body|br|center|dd|div|dl|dt|em|font|form|h[1-6]|hr|html|i|iframe"
    r"|img|input|li|link|meta|noscript|ol|p|pre|small|span|strong|sub|sup|table|tbody|td|th|tr|u|ul)"
    r"(?:\s[^<>]*|/)?>",
    re.IGNORECASE,
)
_SCRIPT = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)


class Log:
    """Events in the order of the file, ids numbered by first appearance.

    Attributes:
        clock: "time" when timestamps of different users can be compared, "position" when they
            only order one user's events, "order" when the file has none and its order counts.
        ticks_per_second: unit of `timestamps_E`; the dataset keeps seconds.
        bad: rows that were left out.
    """

    def __init__(
        self,
        *,
        clock: Literal["time", "position", "order"] = "time",
        ticks_per_second: int = 1,
    ) -> None:
        self.clock = clock
        self.ticks_per_second = ticks_per_second
        self.bad = BadRows()
        self._users: dict[str, int] = {}
        self._items: dict[str, int] = {}
        self._user_numbers, self._item_numbers = array("i"), array("i")
        self._timestamps, self._ratings = array("q"), array("d")

    def __len__(self) -> int:
        return len(self._timestamps)

    def add(self, user: Any, item: Any, timestamp: Any = None, rating: Any = None) -> str | None:
        """Append one event, or return the reason why its row is bad.

        The timestamp is ignored when the clock is "order"; the rating may be missing (None, "").
        """
        user_id, item_id = clean_id(user), clean_id(item)
        if not user_id or not item_id:
            return "no user or item id"
        if self.clock == "order":
            tick: int | None = len(self)
        else:
            tick = to_ticks(timestamp, ticks_per_second=self.ticks_per_second)
        if tick is None:
            return "the timestamp is not a number"
        score = math.nan
        if rating is not None and rating != "":
            try:
                score = float(rating)
            except (TypeError, ValueError):
                return "the rating is not a number"
        self._user_numbers.append(self._users.setdefault(user_id, len(self._users)))
        self._item_numbers.append(self._items.setdefault(item_id, len(self._items)))
        self._timestamps.append(tick)
        self._ratings.append(score)
        return None

    @property
    def user_ids(self) -> list[str]:
        return list(self._users)

    @property
    def item_ids(self) -> list[str]:
        return list(self._items)

    @property
    def users_E(self) -> np.ndarray:
        """int32 indices into `user_ids`."""
        return np.array(self._user_numbers, np.int32)

    @property
    def items_E(self) -> np.ndarray:
        """int32 indices into `item_ids`."""
        return np.array(self._item_numbers, np.int32)

    @property
    def timestamps_E(self) -> np.ndarray:
        """int64 ticks."""
        return np.array(self._timestamps, np.int64)

    @property
    def ratings_E(self) -> np.ndarray:
        """float64, NaN where the file gave none."""
        return np.array(self._ratings, np.float64)


@dataclass
class Catalogue:
    """Texts of the items that occur in the log; of several rows with one id the first is kept.

    Attributes:
        wanted: ids that occur in the log, rows of others are only counted; None for all ids.
        duplicates: rows whose id was already there; `conflicting`: those of them that differ
            from the row that was kept; `unused`: rows of items that the log does not have.
    """

    wanted: frozenset[str] | None = None
    items: dict[str, Item] = field(default_factory=dict)
    duplicates: int = 0
    conflicting: int = 0
    unused: int = 0
    bad: BadRows = field(default_factory=BadRows)

    def add(self, item: Item) -> None:
        if self.wanted is not None and item.item_id not in self.wanted:
            self.unused += 1
            return
        kept = self.items.setdefault(item.item_id, item)
        if kept is not item:
            self.duplicates += 1
            self.conflicting += kept != item


@dataclass(frozen=True)
class RawData:
    """What a reader makes of its files."""

    log: Log
    catalogue: Catalogue


def clean_id(value: Any) -> str:
    """An id as text: 7, 7.0 and " 7 " are all "7"; None and NaN are ""."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        value = int(value) if value.is_integer() else value
    return plain_text(value)


def to_ticks(value: Any, *, ticks_per_second: int = 1) -> int | None:
    """A timestamp as int64, fractions dropped; None when it is not a number in that range."""
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        value = math.floor(moment.timestamp() * ticks_per_second)
    elif isinstance(value, date):
        value = (value - date(1970, 1, 1)).days * 86_400 * ticks_per_second
    try:
        tick = int(value)
    except (TypeError, ValueError, OverflowError):
        try:
            tick = math.floor(float(value))
        except (TypeError, ValueError, OverflowError):
            return None
    return tick if abs(tick) <= _INT64_MAX else None


def plain_text(value: Any) -> str:
    """Text on one line, without outer spaces; None and NaN are "", lists are joined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return " ".join(filter(None, map(plain_text, value)))
    text = " ".join(str(value).split())
    # JSON may hold half of a surrogate pair, which no UTF-8 file can.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def clean_html(value: Any) -> str:
    """`plain_text` without HTML tags, scripts and entities.

    Example:
        >>> clean_html("<b>Salt &amp; Pepper</b>, <s_a_1>")
        'Salt & Pepper , <s_a_1>'
    """
    text = plain_text(value)
    if "<" in text or "&" in text:
        # Entities may hide tags ("&lt;b&gt;"), so tags go before and after.
        text = html.unescape(_TAG.sub(" ", _SCRIPT.sub(" ", text)))
        text = plain_text(_TAG.sub(" ", _SCRIPT.sub(" ", text)))
    return text


def flatten(values: Any) -> Iterable[Any]:
    """The leaves of nested lists, in order; a single value is its own leaf."""
    if isinstance(values, list | tuple):
        for value in values:
            yield from flatten(value)
    elif values is not None:
        yield values


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Non-empty names, each once, in order of appearance."""
    return tuple(dict.fromkeys(filter(None, names)))
