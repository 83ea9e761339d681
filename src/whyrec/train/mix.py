"""The alignment mix: which examples an epoch holds, and what each task shows and asks.

Tasks (OneRec-Think, arXiv 2510.11639, §3.1):

* sequence: a user's history as SIDs; every item of it is predicted from those before it, and the
  next one after the question. Long histories are cut into windows, at an offset that is drawn
  anew each epoch.
* caption and lookup: SID → text and text → SID.
* persona: a user's story, SIDs beside titles and categories.
* replay: general prompts with the backbone's own replies.

Everything is drawn from (seed, epoch, index) alone, so that a resumed run and a run on several
processes see the very same examples in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Sampler

from whyrec.catalog.dataset import Item
from whyrec.prompting.encoder import Example, PromptEncoder, item_text
from whyrec.prompting.templates import load_templates

Task = Literal["sequence", "caption", "lookup", "persona", "replay"]
_PERSONA_EVENTS = 8  # a story long enough to interleave, short enough for a small context


@dataclass(frozen=True)
class MixSizes:
    """How much of each task an epoch holds, beside all windows of all sequences.

    Attributes:
        captions: share of the catalogue that is captioned, and looked up, in an epoch.
        personas: share of the users whose story is told.
        max_history: items of a history at most.
    """

    captions: float
    personas: float
    max_history: int


class AlignmentMix:
    """Training examples of several epochs, rendered when they are asked for.

    Args:
        encoder: renders prompts.
        items: the catalogue.
        sequences: by user, item indices of the training events.
        replies: (prompt, reply) pairs of the backbone itself.
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
        replies: Sequence[tuple[str, str]],
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
        self._align = load_templates("align")
        self._general_system = load_templates("general")["system"]
        self.epoch_starts = [0]
        self._plan: list[tuple[Task, int, int]] = []
        for epoch in range(epochs):
            self._plan += self._epoch_plan(epoch)
            self.epoch_starts.append(len(self._plan))

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        task, subject, start = self._plan[index]
        rng = np.random.default_rng((self.seed, index))
        if task == "sequence":
            stop = start + self.sizes.max_history + 1
            example = self._sequence(self.sequences[subject][max(start, 0) : stop])
        elif task == "persona":
            example = self._persona(self.sequences[subject], rng)
        elif task == "replay":
            example = self._replay(*self.replies[subject])
        else:
            example = self._caption(task, subject, rng)
        return {"input_ids": example.input_ids, "labels": example.labels}

    def length(self, index: int) -> int:
        """About how many tokens an example has, without rendering it."""
        task, subject, start = self._plan[index]
        levels = self.encoder.vocabulary.num_levels
        if task == "sequence":
            stop = min(start + self.sizes.max_history + 1, len(self.sequences[subject]))
            return levels * (stop - max(start, 0))
        if task == "persona":
            return _PERSONA_EVENTS * (levels + 14)
        return 64 if task == "replay" else levels + len(self._texts[subject])

    def tasks(self) -> dict[str, int]:
        """Number of examples by task, over all epochs."""
        names = [task for task, _, _ in self._plan]
        return {task: names.count(task) for task in sorted(set(names))}

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
        num_items = len(self._texts)
        captioned = round(self.sizes.captions * num_items)
        for task in ("caption", "lookup"):
            chosen = rng.permutation(np.arange(max(captioned, num_items)) % num_items)[:captioned]
            plan += [(task, int(item), 0) for item in chosen]
        told = round(self.sizes.personas * len(self.sequences))
        plan += [("persona", int(user), 0) for user in rng.permutation(len(self.sequences))[:told]]
        plan += [("replay", reply, 0) for reply in range(len(self.replies))]
        return plan

    def _sequence(self, window: np.ndarray) -> Example:
        encoder, recommend = self.encoder, self.encoder.recommend
        frame = encoder.frame(recommend["system"])
        example = Example().add(frame.before_user, trained=False)
        history = encoder.history(window[:-1].tolist())
        for piece in encoder.render(recommend["user"], history=history):
            example.add(piece, trained=piece == history)
        reply = encoder.sid(int(window[-1]))
        example.add(frame.before_reply, trained=False)
        example.add(reply[:1], trained=False)  # the recommender opens the SID itself
        return example.add([*reply[1:], *frame.after_reply[:1]], trained=True)

    def _caption(self, task: Task, item: int, rng: np.random.Generator) -> Example:
        slots = {"sid": self.encoder.sid(item), "text": self._texts[item]}
        return self._dialogue(task, rng, **slots)

    def _persona(self, sequence: np.ndarray, rng: np.random.Generator) -> Example:
        start = int(rng.integers(0, max(1, len(sequence) - _PERSONA_EVENTS + 1)))
        events: list[int] = []
        for item in sequence[start : start + _PERSONA_EVENTS].tolist():
            slots = {"sid": self.encoder.sid(item), "text": self._texts[item]}
            for piece in self.encoder.render(self._align["event"], **slots):
                events += piece
        return self._dialogue("persona", rng, events=events)

    def _replay(self, prompt: str, reply: str) -> Example:
        frame = self.encoder.frame(self._general_system)
        asked = [*frame.before_user, *self.encoder.text(prompt), *frame.before_reply]
        answered = [*self.encoder.text(reply), *frame.after_reply[:1]]
        return Example().add(asked, trained=False).add(answered, trained=True)

    def _dialogue(self, task: str, rng: np.random.Generator, **slots: list[int]) -> Example:
        """A question drawn from the task's paraphrases, and a reply that is trained whole."""
        questions = self._align[f"{task}_user"]
        question = questions[int(rng.integers(len(questions)))]
        frame = self.encoder.frame(self._align["system"])
        example = Example().add(frame.before_user, trained=False)
        for piece in self.encoder.render(question, **slots):
            example.add(piece, trained=False)
        example.add(frame.before_reply, trained=False)
        for piece in self.encoder.render(self._align[f"{task}_assistant"], **slots):
            example.add(piece, trained=True)
        return example.add(frame.after_reply[:1], trained=True)


class BucketedOrder(Sampler[int]):
    """Each epoch's examples in batches of like length, the batches in random order.

    The order is a function of (seed, epoch): every process and every resumed run has the same one.
    """

    def __init__(self, mix: AlignmentMix, *, batch_size: int, seed: int) -> None:
        self.mix, self.batch_size, self.seed = mix, batch_size, seed

    def __len__(self) -> int:
        return sum(len(self._epoch(epoch)) for epoch in range(len(self.mix.epoch_starts) - 1))

    def __iter__(self) -> Iterator[int]:
        for epoch in range(len(self.mix.epoch_starts) - 1):
            rng = np.random.default_rng((self.seed, epoch, 2))
            indices = self._epoch(epoch)
            # Sort within chunks of many batches only: whole-epoch sorting would mix too little.
            chunk = 32 * self.batch_size
            for begin in range(0, len(indices), chunk):
                part = sorted(indices[begin : begin + chunk], key=self.mix.length)
                batches = [
                    part[b : b + self.batch_size] for b in range(0, len(part), self.batch_size)
                ]
                for batch in rng.permutation(len(batches)):
                    yield from batches[int(batch)]

    def _epoch(self, epoch: int) -> list[int]:
        """The epoch's examples in random order, whole batches only.

        What is left over (another part each epoch) is dropped: a short batch would shift all
        later ones across their buckets.
        """
        start, stop = self.mix.epoch_starts[epoch : epoch + 2]
        rng = np.random.default_rng((self.seed, epoch, 3))
        whole = max((stop - start) // self.batch_size, 1) * self.batch_size
        return [start + int(index) for index in rng.permutation(stop - start)[:whole]]


def collate(examples: Sequence[dict[str, list[int]]], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right, to a multiple of 8: input_ids, labels, attention_mask [B, T]."""
    longest = -(-max(len(example["input_ids"]) for example in examples) // 8) * 8
    batch = {
        name: torch.full((len(examples), longest), fill)
        for name, fill in (("input_ids", pad_id), ("labels", -100), ("attention_mask", 0))
    }
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        batch["input_ids"][row, :length] = torch.tensor(example["input_ids"])
        batch["labels"][row, :length] = torch.tensor(example["labels"])
        batch["attention_mask"][row, :length] = 1
    return batch
