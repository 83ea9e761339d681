"""What a prompt may say of a history's newest events, beside their SIDs.

*Neighbours* are the items that other users chose near an event (`catalog/covisits.py`), as SIDs:
counts know exact pairs that a small model cannot keep in its weights, and a language model is good
at picking up what stands before it. *Alike* are the items that share words with it, well-liked
ones first (`catalog/alike.py`): a model that is shown the words of what somebody has, and of no
other item, cannot know which others bear them. *Text* is the beginning of what the catalogue says
of the event. The log and the catalogue are all they are made of, at training time as at serving
time.

A noted history is written `<|sid_begin|>EVENT NEIGHBOURS~ALIKE TEXT<|sid_begin|>EVENT …`, so that
every event of it is predicted after `<|sid_begin|>`, as the next item is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from whyrec.catalog.alike import Alike
from whyrec.catalog.covisits import CoVisits


@dataclass(frozen=True)
class Notes:
    """Which notes, and where they come from.

    Attributes:
        events: how many of the newest events carry notes.
        neighbours: of an event, at most.
        visits: where neighbours are looked up; None where there are to be none.
        text_tokens: of an event's text, at most.
        texts: by item, what the catalogue says of it; may be empty where `text_tokens` is 0.
        alike: items that are like an event, at most; none of the history up to it is.
        likeness: where these are looked up; None where there are to be none.
    """

    events: int
    neighbours: int = 0
    visits: CoVisits | None = None
    text_tokens: int = 0
    texts: Sequence[str] = ()
    alike: int = 0
    likeness: Alike | None = None

    def near(
        self, history: Sequence[int], own: Sequence[int] | np.ndarray | None
    ) -> list[list[int]]:
        """The neighbours of a history's noted events, oldest first; see `CoVisits.neighbours`."""
        return [items.tolist() for items, _ in self._scored(history, own)]

    def graded(
        self, history: Sequence[int], own: Sequence[int] | np.ndarray | None
    ) -> list[list[tuple[int, int]]]:
        """The same, with the grade of each, which says how strong the tie is.

        A grade is a number from 0 to 9, a step for each factor of √2, and 7 for what is typical of
        an item's best neighbour.
        """
        return [
            list(zip(items.tolist(), self._grades(scores).tolist(), strict=True))
            for items, scores in self._scored(history, own)
        ]

    def _scored(
        self, history: Sequence[int], own: Sequence[int] | np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        if self.visits is None or not self.neighbours:
            return [(np.empty(0, np.int64), np.empty(0))] * min(self.events, len(history))
        return self.visits.neighbours(
            history,
            k=self.neighbours,
            own=own,
            last=self.events,
        )

    def like(
        self, history: Sequence[int], own: Sequence[int] | np.ndarray | None
    ) -> list[list[int]]:
        """The items that are like a history's noted events; `own` as for `CoVisits.neighbours`."""
        if self.likeness is None or self.visits is None:
            return [[]] * min(self.events, len(history))
        found = self.likeness.beside(
            history, k=self.alike, events_N=self.visits.events_N, own=own, last=self.events
        )
        return [items.tolist() for items in found]

    def _grades(self, scores: np.ndarray) -> np.ndarray:
        return np.clip(np.floor(2 * np.log2(scores / self._typical)) + 7, 0, 9).astype(int)

    @cached_property
    def _typical(self) -> float:
        assert self.visits is not None
        return self.visits.typical_best()

    def text(self, item: int) -> str:
        """What is said of an item."""
        return self.texts[item] if self.text_tokens else ""
