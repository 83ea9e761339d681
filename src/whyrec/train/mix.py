"""The alignment mix: which examples an epoch holds, and what each task shows and asks.

Tasks (OneRec-Think, arXiv 2510.11639, §3.1):

* sequence: a user's history as SIDs; every item of it is predicted from those before it, and the
  next one after the question. Long histories are cut into windows, at an offset that is drawn
  anew each epoch. Leaving events out and jittering their order shows pairs that do not follow
  one another, as counts of co-visitation do, and never the same example twice.
* caption and lookup: SID → text and text → SID.
* persona: a user's story, SIDs beside titles and categories.
* replay: general prompts with the backbone's own replies, others each epoch while there are any.

Everything is drawn from (seed, epoch, index) alone, so that a resumed run and a run on several
processes see the very same examples in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from whyrec.catalog.dataset import Item
from whyrec.catalog.withheld import withheld
from whyrec.prompting.encoder import Example, PromptEncoder, item_text
from whyrec.prompting.templates import load_templates
from whyrec.train.replay import Conversation

Task = Literal["sequence", "caption", "lookup", "persona", "replay"]
_PERSONA_EVENTS = 8  # a story long enough to interleave, short enough for a small context


@dataclass(frozen=True)
class MixSizes:
    """How much of each task an epoch holds, beside all windows of all sequences.

    Attributes:
        captions: share of the catalogue that is captioned, and looked up, in an epoch.
        personas: share of the users whose story is told.
        max_history: items of a history at most.
        drop_events: share of a sequence's events that is left out, others each epoch.
        jitter_events: how many places events may change against each other, at most; an order
            that is drawn anew each epoch, and how much it may change too.
        withheld: share of the items whose text is never shown (`catalog/withheld.py`).
        replays: replies of the backbone that are replayed in an epoch; all of them when None.
    """

    captions: float
    personas: float
    max_history: int
    drop_events: float = 0.0
    jitter_events: float = 0.0
    withheld: float = 0.0
    replays: int | None = None


class AlignmentMix:
    """Training examples of several epochs, rendered when they are asked for.

    Args:
        encoder: renders prompts.
        items: the catalogue.
        sequences: by user, item indices of the training events.
        replies: conversations of the backbone itself.
        sizes: how much of each task.
        epochs: how many epochs to lay out.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        *,
        items: Sequence[Item],
        sequences: Sequence[np.ndarray],
        replies: Sequence[Conversation],
        sizes: MixSizes,
        epochs: int,
        seed: int,
    ) -> None:
        self.encoder = encoder
        self.sequences = [sequence for sequence in sequences if len(sequence) >= 2]
        self.sizes = sizes
        self.seed = seed
        self.replies = list(replies)
        self._texts = [encoder.text(item_text(item)) for item in items]
        # Text tasks know nothing of withheld items; sequences are as they are.
        self._told_N = ~withheld(items, share=sizes.withheld)
        stories = [sequence[self._told_N[sequence]] for sequence in self.sequences]
        self._stories = [story for story in stories if len(story) >= 2]
        self._align = load_templates("align")
        self._general_system = load_templates("general")["system"]
        self.epoch_starts = [0]
        self._frame_tokens = self._frames()
        event = encoder.render(self._align["event"], sid=[], text=[])
        self._event_frame = sum(len(piece) for piece in event)
        self._plan: list[tuple[Task, int, int]] = []
        for epoch in range(epochs):
            self._plan += self._epoch_plan(epoch)
            self.epoch_starts.append(len(self._plan))

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        task, subject, _ = self._plan[index]
        rng = self._rng(index)
        if task == "sequence":
            example = self._sequence(self._window(index), own=self.sequences[subject])
        elif task == "persona":
            example = self._persona(self._stories[subject], rng)
        elif task == "replay":
            example = self._replay(self.replies[subject])
        else:
            example = self._caption(task, subject, rng)
        return {"input_ids": example.input_ids, "labels": example.labels}

    def length(self, index: int) -> int:
        """At most how many tokens an example has, without rendering it.

        Exact for replays and, without notes, for sequences; for the rest the longest paraphrase
        and notes of full length are reckoned with.
        """
        task, subject, _ = self._plan[index]
        levels = self.encoder.vocabulary.num_levels
        if task == "replay":
            return len(self._replay(self.replies[subject]).input_ids)
        if task == "sequence":
            window = self._window(index)
            return self._frame_tokens[task] + self.encoder.history_tokens(len(window) - 1) + levels
        if task == "persona":
            events = self._persona_events(self._stories[subject], self._rng(index))
            return self._frame_tokens[task] + sum(self._event_tokens(item) for item in events)
        return self._frame_tokens[task] + levels + 2 + len(self._texts[subject])

    def _frames(self) -> dict[str, int]:
        """By task, tokens of an example besides its items and their texts, at most."""
        encoder, nothing = self.encoder, np.zeros(2, dtype=np.int32)
        items = len(encoder.history(nothing[:1].tolist(), own=nothing)) + len(encoder.item(0))
        frames = {"sequence": len(self._sequence(nothing, own=nothing).input_ids) - items}
        for task in ("caption", "lookup", "persona"):
            empty: dict[str, list[int]] = {"sid": [], "text": [], "events": []}
            questions = range(len(self._align[f"{task}_user"]))
            frames[task] = max(
                len(self._dialogue(task, question, **empty).input_ids) for question in questions
            )
        return frames

    def _event_tokens(self, item: int) -> int:
        return self._event_frame + self.encoder.vocabulary.num_levels + 2 + len(self._texts[item])

    def tasks(self) -> dict[str, int]:
        """Number of examples by task, over all epochs."""
        names = [task for task, _, _ in self._plan]
        return {task: names.count(task) for task in sorted(set(names))}

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))

    def _epoch_plan(self, epoch: int) -> list[tuple[Task, int, int]]:
        rng = np.random.default_rng((self.seed, epoch, 1))
        window = self.sizes.max_history + 1
        plan: list[tuple[Task, int, int]] = []
        for user, sequence in enumerate(self.sequences):
            if len(sequence) <= window:
                plan.append(("sequence", user, 0))
                continue
            # The first window may begin before the first event and is then shorter; one that would
            # hold the last event alone begins one event earlier, so that every event is a target.
            first = int(rng.integers(2, window + 1)) - window
            starts = range(first, len(sequence), window)
            plan += [("sequence", user, min(start, len(sequence) - 2)) for start in starts]
        items = np.flatnonzero(self._told_N)
        captioned = round(self.sizes.captions * len(items))
        for task in ("caption", "lookup"):
            chosen = rng.permutation(np.resize(items, max(captioned, len(items))))[:captioned]
            plan += [(task, int(item), 0) for item in chosen]
        told = round(self.sizes.personas * len(self._stories))
        plan += [("persona", int(user), 0) for user in rng.permutation(len(self._stories))[:told]]
        there = len(self.replies)
        every = there if self.sizes.replays is None else min(self.sizes.replays, there)
        plan += [("replay", (epoch * every + n) % there, 0) for n in range(every)]
        return plan

    def _window(self, index: int) -> np.ndarray:
        """The events of a sequence example, some left out and some out of order where asked."""
        _, user, start = self._plan[index]
        sizes = self.sizes
        window = self.sequences[user][max(start, 0) : start + sizes.max_history + 1]
        if not (sizes.drop_events or sizes.jitter_events):
            return window
        rng = self._rng(index)
        kept = np.flatnonzero(rng.random(len(window)) >= sizes.drop_events)
        window = window[kept] if len(kept) >= 2 else window[-2:]
        places = np.arange(len(window)) + rng.random() * sizes.jitter_events * rng.random(
            len(window)
        )
        return window[np.argsort(places, kind="stable")]

    def _sequence(self, window: np.ndarray, *, own: np.ndarray) -> Example:
        encoder, recommend = self.encoder, self.encoder.recommend
        frame = encoder.frame(recommend["system"])
        example = Example().add(frame.before_user, trained=False)
        parts = encoder.history_parts(window[:-1].tolist(), own=own)
        history = [token for ids, _ in parts for token in ids]
        for piece in encoder.render(recommend["user"], history=history):
            pieces = parts if piece == history else [(piece, False)]
            for ids, is_event in pieces:
                example.add(ids, trained=is_event)
        reply = encoder.sid(int(window[-1]))
        example.add(frame.before_reply, trained=False)
        example.add(reply[:1], trained=False)  # the recommender opens the SID itself
        return example.add([*reply[1:], *frame.after_reply[:1]], trained=True)

    def _caption(self, task: Task, item: int, rng: np.random.Generator) -> Example:
        slots = {"sid": self.encoder.sid(item), "text": self._texts[item]}
        return self._dialogue(task, self._draw_question(task, rng), **slots)

    def _persona_events(self, sequence: np.ndarray, rng: np.random.Generator) -> list[int]:
        start = int(rng.integers(0, max(1, len(sequence) - _PERSONA_EVENTS + 1)))
        return sequence[start : start + _PERSONA_EVENTS].tolist()

    def _persona(self, sequence: np.ndarray, rng: np.random.Generator) -> Example:
        events: list[int] = []
        for item in self._persona_events(sequence, rng):
            slots = {"sid": self.encoder.sid(item), "text": self._texts[item]}
            for piece in self.encoder.render(self._align["event"], **slots):
                events += piece
        return self._dialogue("persona", self._draw_question("persona", rng), events=events)

    def _replay(self, said: Conversation) -> Example:
        frame = self.encoder.frame(self._general_system)
        asked = [*frame.before_user, *self.encoder.text(said.prompt), *frame.before_reply]
        end = frame.after_reply[:1] if said.ended else []
        answered = [*self.encoder.text(said.reply), *end]
        return Example().add(asked, trained=False).add(answered, trained=True)

    def _draw_question(self, task: str, rng: np.random.Generator) -> int:
        return int(rng.integers(len(self._align[f"{task}_user"])))

    def _dialogue(self, task: str, question: int, **slots: list[int]) -> Example:
        """One of a task's paraphrases as the question, and a reply that is trained whole."""
        frame = self.encoder.frame(self._align["system"])
        example = Example().add(frame.before_user, trained=False)
        for piece in self.encoder.render(self._align[f"{task}_user"][question], **slots):
            example.add(piece, trained=False)
        example.add(frame.before_reply, trained=False)
        for piece in self.encoder.render(self._align[f"{task}_assistant"], **slots):
            example.add(piece, trained=True)
        return example.add(frame.after_reply[:1], trained=True)
