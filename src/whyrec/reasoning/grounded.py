"""The grounded writer: rationales out of facts alone, with no language model.

From a history and the item that followed, two or three clauses (see `wording.py`):

* evidence: the facts that the pruned history and the target share, the most telling first; or,
  where they share none, what the history was about ("Something new after …");
* the turn: what the newest items have in common that older ones do not, if there is such a thing;
* what the next item should be like: its categories from broad to narrow and, as far as the history
  or the catalogue lets one expect them, its series, brand and era.

So a thought goes from what is there to a guess that is refined word by word, which is what the
codes of a SID then do: 20 to 40 tokens. Every fact is true, and no title or SID of the target is
told. What a history holds can be limited to what its notes spell out, which the model that learns
from these rationales can read: the rest of the catalogue it would have to know by heart.

    writer = GroundedWriter(items, vectors_ND=vectors_ND, settings=GroundedSettings(), seed=0)
    rationale = writer.write(history, target, user=3, position=17)
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from whyrec.catalog.dataset import Item
from whyrec.reasoning.facts import Fact, FactBook, Kind, leading_facts, shared_facts, turn
from whyrec.reasoning.pruning import prune
from whyrec.reasoning.titles import title_words, words_of
from whyrec.reasoning.wording import TAILS, Clause, Wording, packaged_wording

SPECIFICITIES = ("broad", "category", "supported", "full", "expected")
Near = Callable[[Sequence[int], Sequence[int]], list[list[tuple[int, int]]]]
# A brand that makes so many of a category's items is to be expected there.
_TYPICAL_BRAND = 0.15
# What is expected: how an event's votes weigh against the next newer one's, and the share of them
# that a further category, and a brand or an era, must have.
_MOST_EXPECTED = 4  # categories
_VOTE_DECAY, _CATEGORY_SHARE, _TAIL_SHARE = 0.8, 0.3, 0.3


@dataclass(frozen=True)
class GroundedSettings:
    """How the grounded writer writes.

    Attributes:
        announce: how much the last clause tells of the target, a list of which one is drawn for
            each rationale (a model that has seen several can learn when to be vague):
            "broad": its broadest category;
            "category": all its categories;
            "supported": and its series, brand and era where the history has them, or its brand
            where that is common in its narrowest category;
            "full": and its brand and era in any case;
            "expected": nothing of the target, but what the history leads to expect, by a vote of
            the items that its notes name, or of its own where it has no notes: a conclusion that
            the model can draw itself, where the others ask it to guess.
        max_evidence: facts in the first clause at most.
        pruned: k, the history items that evidence is taken from.
        paraphrases: ways to say a clause, of those in `prompts/rationale.yaml`; 1 is the plainest
            and what a small model learns fastest.
        readable: to say of a history only what its notes spell out.
    """

    announce: tuple[str, ...] = ("supported",)
    max_evidence: int = 3
    pruned: int = 10
    paraphrases: int = 3
    readable: bool = False

    def __post_init__(self) -> None:
        for name in self.announce:
            if name not in SPECIFICITIES:
                raise ValueError(f"announce: {name!r} is none of {', '.join(SPECIFICITIES)}")
        if not self.announce:
            raise ValueError(f"announce must name one of {', '.join(SPECIFICITIES)}, or several")
        for name in ("max_evidence", "pruned", "paraphrases"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Rationale:
    """A rationale, and the facts it is made of.

    Attributes:
        text: to stand between <think> and </think>.
        evidence: what the history holds; shared with the target unless `jump`.
        turn: what the newest items have in common, or nothing.
        announced: what the next item should be like.
        jump: the history and the target share nothing.
    """

    text: str
    evidence: tuple[Fact, ...]
    turn: tuple[Fact, ...]
    announced: tuple[Fact, ...]
    jump: bool


class GroundedWriter:
    """Writes rationales for one catalogue.

    Args:
        items: the catalogue.
        vectors_ND: item vectors of length 1, for pruning.
        settings: how to write.
        seed: of the paraphrases and of `announce`.
        wording: the words; the packaged ones when None.
        near: the neighbours in a history's notes, given the user's own sequence, and their grades;
            see `Notes.graded`. None where prompts hold none.
        shown: by item, what a note spells out of it; looked at where `settings.readable`.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        vectors_ND: np.ndarray,
        settings: GroundedSettings,
        seed: int,
        wording: Wording | None = None,
        near: Near | None = None,
        shown: Sequence[str] = (),
    ) -> None:
        self.near = near
        assert len(items) == len(vectors_ND)
        assert not settings.readable or len(items) == len(shown)
        self.items, self.vectors_ND = items, vectors_ND
        self.settings, self.seed = settings, seed
        self.book = FactBook(items)
        self.told = self.book
        if settings.readable:
            self.told = self.book.only(partial(_spells_out, [words_of(text) for text in shown]))
        self.wording = wording or packaged_wording()
        self._makers = self._brands_by_category()

    def write(
        self,
        history: Sequence[int],
        target: int,
        *,
        user: int,
        position: int,
        own: Sequence[int] = (),
    ) -> Rationale | None:
        """The rationale of one training step; None where the catalogue says nothing of the target.

        Args:
            history: item indices as the prompt shows them, oldest first.
            target: the item that followed.
            user, position: of the event; what is drawn depends on these and the seed alone.
            own: the user's training sequence.
        """
        rng = np.random.default_rng((self.seed, user, position))
        specificity = self.settings.announce[int(rng.integers(len(self.settings.announce)))]
        guess = specificity == "expected"
        announced = (
            self.expect(history, own)
            if guess
            else self.announce(history, target, specificity=specificity)
        )
        if not announced:
            return None
        book, hidden = self.told, None if guess else self._telltale(target)
        if guess:
            pruned = list(history[-self.settings.pruned :])
            shared = [found.fact for found in leading_facts(book, pruned)]
        else:
            pruned = prune(history, target, vectors_ND=self.vectors_ND, k=self.settings.pruned)
            borne = self.book.of(target)
            shared = [found.fact for found in shared_facts(book, pruned, borne)]
        evidence = [fact for fact in shared if fact != hidden][: self.settings.max_evidence]
        jump = not evidence
        if jump:
            # Categories tell best what it is a change from.
            leading = [found.fact for found in leading_facts(book, pruned) if found.fact != hidden]
            evidence = [fact for fact in leading if fact.kind == "category"][:2] or leading[:2]
        turned = turn(book, history)
        # Said twice it would cost tokens and tell nothing.
        told = turned is not None and turned.fact not in (*evidence, hidden)
        newest = [turned.fact] if turned is not None and told else []
        clauses: list[tuple[Clause, list[Fact]]] = [
            ("jump" if jump else "evidence", evidence),
            ("turn", newest),
            ("next", announced),
        ]
        text = " ".join(
            self.wording.say(clause, facts, self.book, way=self._way(clause, rng))
            for clause, facts in clauses
            if facts
        )
        return Rationale(text, tuple(evidence), tuple(newest), tuple(announced), jump)

    def announce(self, history: Sequence[int], target: int, *, specificity: str) -> list[Fact]:
        """What the next item should be like: categories, then series, brand, era."""
        book = self.book
        telling = [fact for fact in book.categories(target) if book.says_something(fact)]
        categories = telling or list(book.categories(target))
        if specificity == "broad":
            return categories[:1]
        others = [fact for fact in book.of(target) if fact.kind != "category"]
        if specificity == "category":
            # What has no category at all is better described by its brand than by nothing.
            return categories or [fact for fact in others if fact.kind == "brand"]
        known = {fact for item in history for fact in book.of(item)}
        for fact in others:
            expected = fact in known or (
                fact.kind != "series"
                and (specificity == "full" or self._is_typical(fact, categories))
            )
            if expected and fact != self._telltale(target) and book.says_something(fact):
                categories.append(fact)
        return categories

    def expect(self, history: Sequence[int], own: Sequence[int]) -> list[Fact]:
        """What most of a history's neighbours are: categories as far as they agree, brand, era."""
        book, votes = self.book, defaultdict[int, float](float)
        noted = self.near(history, own) if self.near is not None else []
        for age, near in enumerate(reversed(noted)):
            for item, grade in near:
                votes[item] += _VOTE_DECAY**age * (1 + grade)
        if not votes:
            for age, item in enumerate(reversed(history)):
                votes[item] += _VOTE_DECAY**age
        total, expected = sum(votes.values()), list[Fact]()

        def narrow(kind: Kind, least: float) -> bool:
            """Add what most of those agree on that bear all that is expected so far."""
            weight = defaultdict[Fact, float](float)
            for item, vote in votes.items():
                row = [f for f in book.of(item) if book.says_something(f) and f.kind == kind]
                if book.is_path and kind == "category":
                    row = row[len(expected) : len(expected) + 1]
                for fact in row:
                    if fact not in expected:
                        weight[fact] += vote
            best = max(weight, key=lambda fact: weight[fact], default=None)
            if best is None or weight[best] < least * total:
                return False
            expected.append(best)
            for item in [item for item in votes if best not in book.of(item)]:
                del votes[item]
            return True

        narrow("category", 0.0)
        while len(expected) < _MOST_EXPECTED and narrow("category", _CATEGORY_SHARE):
            pass
        expected.sort(key=book.narrowness)
        for kind in TAILS:
            narrow(kind, _TAIL_SHARE)
        return expected

    def _way(self, clause: Clause, rng: np.random.Generator) -> int:
        ways = min(self.settings.paraphrases, self.wording.paraphrases(clause))
        return int(rng.integers(ways))

    def _telltale(self, target: int) -> Fact | None:
        """The target's series, where that is its very title: "Toy Story" before "Toy Story 2"."""
        title = title_words(self.items[target].title)
        for fact in self.book.of(target):
            if fact.kind == "series" and words_of(fact.name)[-len(title) :] == title:
                return fact
        return None

    def _brands_by_category(self) -> dict[Fact, Counter[Fact]]:
        makers: dict[Fact, Counter[Fact]] = {}
        for item in range(len(self.items)):
            brand = [fact for fact in self.book.of(item) if fact.kind == "brand"]
            for fact in self.book.categories(item)[-1:]:
                makers.setdefault(fact, Counter()).update(brand)
        return makers

    def _is_typical(self, brand: Fact, categories: Sequence[Fact]) -> bool:
        if brand.kind != "brand" or not categories:
            return False
        narrowest = categories[-1]
        made = self._makers.get(narrowest, Counter())[brand]
        return made >= 2 and made >= _TYPICAL_BRAND * self.book.count(narrowest)


def _spells_out(shown: Sequence[tuple[str, ...]], item: int, fact: Fact) -> bool:
    """Whether the words of a fact's name stand in a row in those that are shown of an item."""
    words, name = shown[item], words_of(fact.name)
    starts = range(len(words) - len(name) + 1)
    return any(words[start : start + len(name)] == name for start in starts)
