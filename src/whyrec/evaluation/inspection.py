"""Look at one recommendation: history, trace, items, and the beam; and change something in it.

What is shown is one thought and the beam behind it (`recommend` mixes several). A thought is
sampled as the model does it, or given, so that a word of it can be changed and the same beam run
again at otherwise equal inputs.

    inspector = Inspector.open(Path("runs/ml-100k/model/activated"))
    history = inspector.history_of("1")
    seen = inspector.look(history, think=True)
    other = inspector.look(history, thought=change_word(seen.trace.text, "Drama", "Comedy"))
    for row in changes(seen, other):
        print(inspector.name(row.item), row.before, row.after)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from whyrec.catalog.dataset import Dataset
from whyrec.decode.permitted import Rule
from whyrec.decode.recommender import Recommender
from whyrec.evaluation.beam_tree import Branch, beam_tree
from whyrec.evaluation.codes import name_of
from whyrec.evaluation.trace_view import Token, TraceReader, TraceView


@dataclass(frozen=True)
class View:
    """One recommendation.

    Attributes:
        history: item indices, oldest first, those that the prompt showed.
        hidden: older items of the history that the prompt had no room for; never recommended.
        trace: the thought; None without thinking.
        found: items with log-probabilities, best first.
        tree: the beam behind them.
        missing: what could not be shown, in sentences.
    """

    history: list[int]
    hidden: int
    trace: TraceView | None
    found: list[tuple[int, float]]
    tree: list[Branch]
    missing: list[str] = field(default_factory=list)

    @property
    def items(self) -> list[int]:
        return [item for item, _ in self.found]


@dataclass(frozen=True)
class Change:
    """An item's rank in two lists, from 1; None where a list lacks it."""

    item: int
    before: int | None
    after: int | None


class Inspector:
    """Looks into the recommendations of one model. Make it with `Inspector.open`.

    Attributes:
        recommender: the model.
        dataset: users and their histories; None without a run.
        thinks: whether the model has learnt to think.
        missing: what is not there to be looked at, in sentences.
    """

    def __init__(
        self, recommender: Recommender, *, reader: TraceReader, dataset: Dataset | None
    ) -> None:
        self.recommender, self.reader, self.dataset = recommender, reader, dataset
        self.thinks = recommender.settings.thoughts is not None
        self.missing: list[str] = []
        if not self.thinks:
            self.missing.append(
                f"this model is {recommender.settings.stage} and has not learnt to think: no "
                "trace, only items; `whyrec activate` teaches it"
            )
        if dataset is None:
            self.missing.append("no run beside the model: no users to choose, so type a history")
        untitled = sum(not item.title for item in recommender.items)
        if untitled:
            self.missing.append(f"{untitled:,} items have no title; their ids stand for them")

    @classmethod
    def open(cls, model: Path, *, run: Path | None = None) -> "Inspector":
        """Load a model folder, and the users of its run.

        Args:
            model: a model folder.
            run: its run folder; where None, the one that the model lies in, if it does.

        Raises:
            ValueError: when it is no model folder, or the run holds another catalogue.
        """
        recommender = Recommender.from_pretrained(model)
        beside = model.resolve().parent.parent
        if run is None and (beside / "dataset" / "items.parquet").exists():
            run = beside
        dataset = None if run is None else Dataset.load(run / "dataset")
        if dataset is not None:
            # add-items appends to a model's catalogue; the run's items stay the first ones
            own = [item.item_id for item in recommender.items[: len(dataset.items)]]
            if own != [item.item_id for item in dataset.items]:
                raise ValueError(f"{model} and {run} hold different catalogues; name its own run")
        reader = TraceReader(recommender.items, template_folder=model / "prompts")
        return cls(recommender, reader=reader, dataset=dataset)

    def history_of(self, user_id: str, *, split: str = "test") -> list[int]:
        """A user's item indices before the event of a split; all of them where it has none.

        Raises:
            ValueError: for an unknown user, or without a run.
        """
        if self.dataset is None:
            raise ValueError("there are no users without a run; name it, or type a history")
        user = self.dataset.user(user_id)
        examples = self.dataset.examples(split)  # type: ignore[arg-type]
        for row in (examples.users_E == user).nonzero()[0]:
            return examples.histories[row].tolist()
        return self.dataset.sequences[user].tolist()

    def some_history(self, user_id: str | None = None) -> list[int]:
        """A user's history before the test event: the user's, or the first test user's.

        Without a run, a few items of the catalogue stand in.
        """
        if self.dataset is None:
            return list(range(min(5, len(self.recommender.items))))
        if user_id is None:
            users_E = self.dataset.examples("test").users_E
            user_id = self.dataset.user_ids[int(users_E[0]) if len(users_E) else 0]
        return self.history_of(user_id)

    def name(self, item: int) -> str:
        """An item's title; its id where it has none."""
        return name_of(self.recommender.items[item])

    def look(
        self,
        history: Sequence[int],
        *,
        think: bool = False,
        thought: str | None = None,
        width: int = 20,
        k: int = 10,
        seed: int = 0,
    ) -> View:
        """Recommend after a history, and keep what led there.

        Args:
            history: item indices, oldest first; none of them comes again.
            think: sample a thought. A model that cannot think goes without, and says so.
            thought: this one instead.
            width: of the beam.
            k: items of the list.
            seed: of the thought.
        """
        recommender = self.recommender
        shown = list(history)[-recommender.settings.max_history :]
        missing = []
        if len(shown) < len(history):
            missing.append(
                f"the history has {len(history):,} items; the model is shown the newest "
                f"{len(shown)}"
            )
        if (think or thought is not None) and not self.thinks:
            missing.append("the model has not learnt to think: looked at without a thought")
            think, thought = False, None
        encoder = recommender.encoder
        ids: list[int] | None = None
        if thought is not None:
            ids = encoder.text(thought)
        elif think:
            ids, thought = self._thought(shown, seed=seed)
        prompt = (
            encoder.recommendation_prompt(shown)
            if ids is None
            else encoder.answer_prompt(shown, ids)
        )
        width = min(max(width, k), len(recommender.items))
        rule = Rule(excluded=history)
        found, tree = beam_tree(recommender.decoder, prompt, width=width, rule=rule)
        trace = None
        if ids is not None:
            assert thought is not None
            items = [item for item, _ in found[:k]]
            trace = self.reader.read(thought, shown, items).with_tokens(self._tokens(shown, ids))
            if not trace.claims:
                missing.append("the trace names no fact of the catalogue that could be checked")
        return View(shown, len(history) - len(shown), trace, found[:k], tree, missing)

    def _thought(self, shown: Sequence[int], *, seed: int) -> tuple[list[int], str]:
        settings = self.recommender.thoughts
        drawn = self.recommender.thinker.think(
            [self.recommender.encoder.thinking_prompt(shown)],
            samples=1,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=seed,
        )
        ids = drawn.thought(0, 0)
        return ids, self.recommender.encoder.tokenizer.decode(ids)

    @torch.no_grad()
    def _tokens(self, shown: Sequence[int], ids: Sequence[int]) -> list[Token]:
        """Every token of a thought and the one that ends it, with probabilities, in one pass."""
        encoder, model = self.recommender.encoder, self.recommender.decoder.model
        prompt = encoder.thinking_prompt(shown)
        told = [*ids, encoder.vocabulary.think_end]
        device = self.recommender.decoder.device
        ids_1T = torch.tensor([[*prompt, *told[:-1]]], device=device)
        hidden_1TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state
        logits_TV = model.get_output_embeddings()(hidden_1TD[0, len(prompt) - 1 :]).float()
        chosen_T1 = torch.tensor(told, device=device)[:, None]
        probabilities_T = logits_TV.softmax(-1).gather(1, chosen_T1)[:, 0].tolist()
        # A letter may be spread over several tokens: a token is what it adds to the text before.
        texts = [encoder.tokenizer.decode(told[: n + 1]) for n in range(len(told))]
        before = ["", *texts[:-1]]
        return [
            Token(text[len(old) :], probability)
            for text, old, probability in zip(texts, before, probabilities_T, strict=True)
        ]


def swap_item(history: Sequence[int], place: int, item: int) -> list[int]:
    """The history with another item at a place; places count from the oldest, or back from -1.

    Raises:
        ValueError: when the history has no such place.
    """
    if not -len(history) <= place < len(history):
        raise ValueError(f"a history of {len(history)} items has no place {place}")
    place %= len(history)
    return [*history[:place], item, *history[place + 1 :]]


def change_word(trace: str, old: str, new: str) -> str:
    """The trace with other words in the last place where it says them: there it announces.

    Raises:
        ValueError: when the trace does not say them.
    """
    before, found, after = trace.rpartition(old) if old else ("", "", "")
    if not found:
        raise ValueError(f"the trace does not say {old!r}; it says {trace!r}")
    return before + new + after


def another_fact(inspector: Inspector, view: View) -> tuple[str, str] | None:
    """What a trace announces, its narrowest category if it does, and another the history lacks.

    None where there is no trace, or none that announces a known fact.
    """
    book = inspector.reader.book
    held = {fact for item in view.history for fact in book.of(item)}
    announced = [
        (claim.name, fact)
        for claim in (view.trace.claims if view.trace else ())
        if claim.clause == "next"
        for fact in book.named(claim.name)
    ]
    announced.sort(key=lambda found: found[1].kind == "category")  # stable: the last is narrowest
    for name, fact in reversed(announced):
        others = [f for f in book.all_facts() if f.kind == fact.kind and f not in held]
        if others:
            return name, max(others, key=book.count).name
    return None


def changes(before: View, after: View) -> list[Change]:
    """All items of two lists: those of the second in their order, then what has left."""
    ranks = [{item: rank for rank, item in enumerate(view.items, 1)} for view in (before, after)]
    left = [item for item in before.items if item not in ranks[1]]
    return [Change(item, ranks[0].get(item), ranks[1].get(item)) for item in [*after.items, *left]]
