"""One state of the catalogue as requests see it: names → item indices, and indices → answers.

A request takes one `Catalogue` and the engine's trie of the same version, and keeps both to its
end, so that nobody sees half of a change. Live items come first, in the order of the model folder's
`items.parquet`, so that an index means the same here, in the trie and in `Recommender`. Retired
ones stand behind them: they are known in histories, whose prompts hold their SIDs, and are never
recommended.

    catalogue = Catalogue.load(folder)
    catalogue.index("50", param="history"), catalogue.allowed(Filter(category="Comedy"))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from whyrec.catalog.dataset import Item, nearest_ids
from whyrec.decode.add_items import read_retired
from whyrec.decode.model_folder import folder_encoder, read_catalogue, read_settings
from whyrec.prompting.encoder import PromptEncoder
from whyrec.serve.errors import ServeError, shown
from whyrec.serve.schema import (
    CatalogueItem,
    Event,
    Filter,
    HistoryEntry,
    RecommendedItem,
    TreeBranch,
)
from whyrec.sid.vocabulary import SidVocabulary, sid_text

_NAMES_TO_COMPARE = 5_000  # to look through more would hold up everybody else


class Catalogue:
    """Items, their SIDs, and how they are found.

    Args:
        items: live items, then retired ones.
        codes_NL: their SIDs.
        num_live: how many are live.
        encoder: of prompts over all of them.
        max_history: items of a history that a prompt holds at most.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        codes_NL: torch.Tensor,
        num_live: int,
        encoder: PromptEncoder,
        max_history: int,
    ) -> None:
        self.items, self.num_live = items, num_live
        self.encoder, self.max_history = encoder, max_history
        self._codes_NL = codes_NL.numpy()
        self._by_id = {item.item_id: n for n, item in enumerate(items)}
        self._by_title: dict[str, list[int]] = {}
        self._titles: list[str] = []  # folded
        self._by_category: dict[str, list[int]] = {}
        self._by_brand: dict[str, list[int]] = {}
        self._prefixes: dict[int, np.ndarray] = {}  # by depth, sorted; made when asked for
        for n, item in enumerate(items):
            self._titles.append(_fold(item.title))
            self._by_title.setdefault(self._titles[-1], []).append(n)
            if n < num_live:
                self._by_brand.setdefault(_fold(item.brand), []).append(n)
                for category in set(map(_fold, item.categories)):
                    self._by_category.setdefault(category, []).append(n)

    @classmethod
    def load(cls, folder: Path, *, tokenizer: Tokenizer | None = None) -> "Catalogue":
        """Read a model folder's catalogue; the weights stay where they are.

        Args:
            folder: the model folder.
            tokenizer: its own, where it is loaded already.

        Raises:
            ValueError: when it is no model folder, or its parts do not belong together.
        """
        settings = read_settings(folder)
        items, codes_NL = read_catalogue(folder)
        retired, retired_codes_NL = read_retired(folder, num_levels=codes_NL.shape[1])
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
        codes_NL = torch.cat([codes_NL, retired_codes_NL])
        vocabulary = SidVocabulary.bind(tokenizer, level_sizes=settings.level_sizes)
        everything = [*items, *retired]
        encoder = folder_encoder(
            folder, tokenizer, vocabulary=vocabulary, items=everything, codes_NL=codes_NL
        )
        return cls(
            everything,
            codes_NL=codes_NL,
            num_live=len(items),
            encoder=encoder,
            max_history=settings.max_history,
        )

    def find(self, item_id: str) -> int | None:
        """The index of an id; None when there is no such item."""
        return self._by_id.get(item_id)

    def is_live(self, item_id: str) -> bool:
        """Whether an item may be recommended."""
        index = self._by_id.get(item_id)
        return index is not None and index < self.num_live

    def index(self, item_id: str, *, param: str) -> int:
        """The index of an id.

        Raises:
            ServeError: 404 when there is no such item, with the nearest known ids.
        """
        found = self._by_id.get(item_id)
        if found is None:
            raise self._unknown(item_id, param)
        return found

    def history(self, entries: Sequence[HistoryEntry], *, param: str) -> list[int]:
        """Item indices of a history, oldest first.

        Raises:
            ServeError: for an unknown item, or a title that several items have.
        """
        found = [self._entry(entry, f"{param}.{n}") for n, entry in enumerate(entries)]
        events = [entry for entry in entries if isinstance(entry, Event)]
        timed = [event.timestamp for event in events if event.timestamp is not None]
        if not timed:
            return found
        if len(timed) != len(entries):
            raise ServeError(
                f"{len(timed)} of the {len(entries)} events have a timestamp; give all of them "
                "one, or none and the oldest first",
                code="mixed_timestamps",
                param=param,
            )
        return [found[n] for n in np.argsort(timed, kind="stable")]

    def allowed(self, wanted: Filter | None) -> list[int] | None:
        """Indices of the live items that meet a filter; None where every item does.

        Raises:
            ServeError: for a category, a brand or an item that the catalogue does not have.
        """
        if wanted is None:
            return None
        sets = []
        if wanted.category is not None:
            sets.append(self._named(self._by_category, wanted.category, "category"))
        if wanted.brand is not None:
            sets.append(self._named(self._by_brand, wanted.brand, "brand"))
        if wanted.items is not None:
            sets.append({self.index(item_id, param="filter.items") for item_id in wanted.items})
        if not sets:
            return None
        return sorted(n for n in set.intersection(*sets) if n < self.num_live)

    def prefixes(self, prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
        """Those of some SID prefixes that live items still have."""
        sizes = self.encoder.vocabulary.level_sizes
        places: dict[int, list[int]] = {}
        for place, prefix in enumerate(prefixes):
            places.setdefault(len(prefix), []).append(place)
        kept: list[int] = []
        for depth, of_depth in places.items():
            if not 1 <= depth <= len(sizes):
                continue
            if depth not in self._prefixes:
                columns = tuple(self._codes_NL[: self.num_live, :depth].T)
                self._prefixes[depth] = np.unique(np.ravel_multi_index(columns, sizes[:depth]))
            known = self._prefixes[depth]
            codes_PD = np.array([prefixes[place] for place in of_depth], dtype=np.int64)
            inside_P = ((codes_PD >= 0) & (codes_PD < sizes[:depth])).all(1)
            numbers = np.ravel_multi_index(tuple(codes_PD[inside_P].T), sizes[:depth])
            low, high = (known.searchsorted(numbers, side) for side in ("left", "right"))
            found = high > low
            kept += np.array(of_depth)[inside_P][found].tolist()
        return [list(prefixes[place]) for place in sorted(kept)]

    def recommended(self, index: int, score: float) -> RecommendedItem:
        """An item of an answer."""
        item = self.items[index]
        return RecommendedItem(id=item.item_id, title=item.title, score=score, sid=self._sid(index))

    def item(self, index: int) -> CatalogueItem:
        """All that is known of an item."""
        item = self.items[index]
        return CatalogueItem(
            id=item.item_id,
            title=item.title,
            brand=item.brand,
            categories=list(item.categories),
            sid=self._sid(index),
            retired=index >= self.num_live,
        )

    def search(self, words: str, *, limit: int) -> list[int]:
        """Live items whose titles hold some words, in the order of the catalogue.

        The item with that very id comes first, since it may have no title to be found by; behind
        those that say the words as given come those that say each of them somewhere.
        """
        wanted, titles = _fold(words), self._titles[: self.num_live]
        named = self.find(words.strip())
        found = dict.fromkeys([named] if named is not None and named < self.num_live else [])
        each = wanted.split()
        for holds in (lambda title: wanted in title, lambda title: all(w in title for w in each)):
            for n, title in enumerate(titles):
                if len(found) >= limit:
                    return list(found)
                if holds(title):
                    found[n] = None
        return list(found)

    def branches(self, told: Sequence[dict[str, Any]]) -> list[TreeBranch]:
        """The engine's beam tree with ids and titles at its leaves."""
        found = []
        for branch in told:
            item = None if branch["item"] is None else self.items[branch["item"]]
            found.append(
                TreeBranch(
                    code=branch["code"],
                    probability=branch["probability"],
                    log_prob=branch["log_prob"],
                    id=item and item.item_id,
                    title=item and item.title,
                    left=branch["left"],
                    children=self.branches(branch["children"]),
                )
            )
        return found

    def _entry(self, entry: HistoryEntry, param: str) -> int:
        if isinstance(entry, Event) and entry.item_id is not None:
            return self.index(entry.item_id, param=f"{param}.item_id")
        if isinstance(entry, str) and entry in self._by_id:
            return self._by_id[entry]
        title = entry if isinstance(entry, str) else entry.title
        assert title is not None
        found = self._by_title.get(_fold(title), []) if title.strip() else []
        if len(found) > 1:
            ids = ", ".join(self.items[n].item_id for n in found[:5])
            raise ServeError(
                f"{len(found)} items have the title {shown(title)}: {ids}; give an item id",
                code="ambiguous_title",
                param=param,
            )
        if not found:
            raise self._unknown(title, param)
        return found[0]

    def _named(self, table: dict[str, list[int]], name: str, what: str) -> set[int]:
        found = table.get(_fold(name)) if name.strip() else None
        if found is None:
            raise ServeError(
                f"no item has the {what} {shown(name)}; leave the filter out, or ask for one that "
                "the catalogue has",
                code=f"unknown_{what}",
                param=f"filter.{what}",
            )
        return set(found)

    def _unknown(self, name: str, param: str) -> ServeError:
        near: list[str] = []
        if len(self.items) <= _NAMES_TO_COMPARE and len(name) <= 100:
            near = nearest_ids(name, self._by_id)
        hint = f"the nearest known ids are {', '.join(near)}" if near else "check the id"
        return ServeError(
            f"the catalogue has no item {shown(name)}; {hint}",
            code="unknown_item",
            status=404,
            param=param,
        )

    def _sid(self, index: int) -> str:
        return sid_text(self._codes_NL[index].tolist())


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())
