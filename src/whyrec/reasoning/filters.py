"""Which rationales are fit to train on: nothing leaks, everything is true, the length is right.

A rationale is trained before the item that it explains, so it may not give the item away: no SID,
no title, and no long piece of its title, unless that is the name of a category or a brand that
several items bear, or of a series in the user's own history. Every fact and title that it names
must be known: in the grounded writer's words each claim of the history must hold of the history,
and each of the next item of the target; in free text every name must be one of the history's or the
target's.

    checker = RationaleFilter(items, book=book, count_tokens=lambda text: len(encoder.text(text)))
    checker.reason(text, history, target)          # None, or why the rationale is dropped
    reasons, report = filter_rationales(rows, checker)
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whyrec.catalog.dataset import Item
from whyrec.reasoning.facts import Fact, FactBook
from whyrec.reasoning.mentions import Mention, MentionFinder
from whyrec.reasoning.titles import title_words, words_of
from whyrec.reasoning.trace import read_trace
from whyrec.sid.vocabulary import MARKERS
from whyrec.workers import in_processes

# So many words of a title in a row point to it.
_TELLING_WORDS = 4
_WORD = re.compile(r"\w+(?:['’]\w+)?")
_CONTROL = re.compile("|".join([r"<s_[a-z]_\d+>", r"<\|", *map(re.escape, MARKERS)]))


@dataclass(frozen=True)
class Row:
    """A rationale and the training step that it belongs to.

    Attributes:
        user, position: of the event.
        history: item indices as the prompt shows them, oldest first.
        target: the item that followed.
        text: what was written; None where the writer had nothing to say.
    """

    user: int
    position: int
    history: Sequence[int]
    target: int
    text: str | None


@dataclass(frozen=True)
class FilterReport:
    """How many rationales came and stayed, and why the others went."""

    written: int
    kept: int
    dropped: dict[str, int]
    mean_tokens: float

    @property
    def share_kept(self) -> float:
        return self.kept / max(self.written, 1)


class RationaleFilter:
    """Says what is wrong with a rationale.

    Args:
        items: the catalogue.
        book: its facts.
        count_tokens: tokens of a text, in the model's own tokenizer.
        min_tokens, max_tokens: bounds of a rationale's length, both included.
        free_text: the rationales are in a language model's own words, not the grounded writer's.
        guesses: what is announced may be a guess, and need not be true of the target.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        book: FactBook,
        count_tokens: Callable[[str], int],
        min_tokens: int = 4,
        max_tokens: int = 48,
        free_text: bool = False,
        guesses: bool = False,
    ) -> None:
        self.book, self.count_tokens = book, count_tokens
        self.min_tokens, self.max_tokens = min_tokens, max_tokens
        self.free_text, self.guesses = free_text, guesses
        self._titles = [item.title for item in items]
        self._bare = [title_words(title) for title in self._titles]
        self._finder = MentionFinder(book, titles=self._titles if free_text else ())

    def reason(self, text: str | None, history: Sequence[int], target: int) -> str | None:
        """Why a rationale is dropped, in a few words; None for one to keep.

        Args:
            text: the rationale.
            history: item indices as the prompt shows them, oldest first.
            target: the item that followed.
        """
        if text is None or not text.strip():
            return "nothing written"
        if _CONTROL.search(text):
            return "holds a SID or a control token"
        tokens = self.count_tokens(text)
        if tokens < self.min_tokens:
            return "too short"
        if tokens > self.max_tokens:
            return "too long"
        held = {fact for item in history for fact in self.book.of(item)}
        mentions = self._finder.find(text)
        if leak := self._leak(text, mentions, held, target):
            return leak
        # The name of its series gives a target away, unless the history has it too.
        borne = {f for f in self.book.of(target) if f.kind != "series" or f in held}
        if self.free_text:
            known_items = set(history) - {target}
            return next(
                (why for m in mentions if (why := _unknown(m, held | borne, known_items))), None
            )
        trace = read_trace(text, self.book)
        if not trace.well_formed:
            return "not in the writer's words"
        if not all(held.intersection(claim.facts) for claim in trace.evidence):
            return "says of the history what is not so"
        if self.guesses and all(claim.facts for claim in trace.announced):
            return None
        if not all(borne.intersection(claim.facts) for claim in trace.announced):
            return "says of the target what is not so"
        return None

    def _leak(
        self, text: str, mentions: Sequence[Mention], held: set[Fact], target: int
    ) -> str | None:
        title = self._bare[target]
        if not title:
            return None
        # Names that may be said, whatever the title: their words do not count as the title's.
        said = [
            (mention.start, mention.end)
            for mention in mentions
            if any(self._is_common_name(fact, held, title) for fact in mention.facts)
        ]
        words = []
        for found in _WORD.finditer(text):
            free = any(start <= found.start() and found.end() <= end for start, end in said)
            words.append("" if free else found.group().casefold().replace("’", "'"))
        whole = words_of(text)
        if len(title) == 1:
            named = self._one_word(text, title[0], words)
        else:
            named = _repeats(whole, words, {title}, len(title))
        if named:
            return "names the target's title"
        starts = range(len(title) - _TELLING_WORDS + 1)
        pieces = {title[start : start + _TELLING_WORDS] for start in starts}
        if _repeats(whole, words, pieces, _TELLING_WORDS):
            return "repeats the target's title"
        return None

    def _is_common_name(self, fact: Fact, held: set[Fact], title: tuple[str, ...]) -> bool:
        if fact.kind == "series":
            return fact in held and words_of(fact.name)[-len(title) :] != title
        return self.book.count(fact) > 1

    def _one_word(self, text: str, title: str, words: Sequence[str]) -> bool:
        """Whether a title of one word is named: written with a capital, and no common name."""
        return any(
            word == title and not found.group()[0].islower()
            for found, word in zip(_WORD.finditer(text), words, strict=True)
        )


def filter_rationales(
    rows: Sequence[Row], checker: RationaleFilter
) -> tuple[list[str | None], FilterReport]:
    """Why each row is dropped, None for one to keep; and what became of all."""

    def looked_at(n: int) -> tuple[str | None, int]:
        row = rows[n]
        reason = checker.reason(row.text, row.history, row.target)
        return reason, checker.count_tokens(row.text or "") if reason is None else 0

    found = in_processes(looked_at, len(rows), progress="filtering rationales")
    reasons = [reason for reason, _ in found]
    kept = reasons.count(None)
    dropped = Counter(why for why in reasons if why is not None)
    mean = round(sum(tokens for _, tokens in found) / max(kept, 1), 2)
    return reasons, FilterReport(len(reasons), kept, dict(dropped.most_common()), mean)


def _unknown(mention: Mention, facts: set[Fact], items: set[int]) -> str | None:
    if facts.intersection(mention.facts) or items.intersection(mention.items):
        return None
    return "names what neither history nor target has"


def _repeats(
    whole: tuple[str, ...], words: Sequence[str], phrases: set[tuple[str, ...]], length: int
) -> bool:
    """Whether a phrase stands in a text, and not wholly within names that may be said.

    Args:
        whole: all words of the text.
        words: the same, empty where a name may be said.
        phrases: of `length` words each.
        length: of a phrase.
    """
    return any(
        whole[start : start + length] in phrases and any(words[start : start + length])
        for start in range(len(whole) - length + 1)
    )
