"""What activation trains on: thinking and not thinking, side by side.

An example is the raw history, a thought and the item; in a share of the examples the thought is
closed at once, which is the no-think mode. A loss is taken on the rationale, on the `</think>` that
ends it and on the SID; not on a `</think>` that closes a thought at once, which would teach the
model not to think.
"""

from collections.abc import Sequence

import numpy as np

from whyrec.prompting.encoder import Example, PromptEncoder
from whyrec.train.rationales import Rationales


class ThinkingMix:
    """Training examples of several epochs; each holds every step with a rationale once.

    Which examples do without their rationale is drawn anew each epoch, from the seed alone.

    Args:
        encoder: renders prompts.
        sequences: by user, item indices of the training events.
        rationales: of the steps.
        no_think: share of an epoch's examples whose thought is closed at once.
        max_history: items of a history in a prompt.
        epochs: how many epochs to lay out.
        seed: of what is drawn.

    Attributes:
        epoch_starts: index of each epoch's first example, and how many there are.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        *,
        sequences: Sequence[np.ndarray],
        rationales: Rationales,
        no_think: float,
        max_history: int,
        epochs: int,
        seed: int,
    ) -> None:
        self.encoder, self.sequences, self.max_history = encoder, sequences, max_history
        self.keys = rationales.keys
        self._thoughts = [encoder.text(text) for text in rationales.texts]
        steps = len(self.keys)
        self.epoch_starts = [epoch * steps for epoch in range(epochs + 1)]
        silent = [
            np.random.default_rng((seed, epoch, 5)).permutation(steps)[: round(no_think * steps)]
            for epoch in range(epochs)
        ]
        self._thinks = np.ones((epochs, steps), dtype=bool)
        for epoch, chosen in enumerate(silent):
            self._thinks[epoch, chosen] = False
        frame = encoder.frame(encoder.recommend["system"])
        self._ending = [encoder.vocabulary.end, *frame.after_reply[:1]]
        self._frame_tokens = len(encoder.answer_prompt([])) + len(self._ending)

    def __len__(self) -> int:
        return self.epoch_starts[-1]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        encoder, thought = self.encoder, self._thought(index)
        user, position = self.keys[index % len(self.keys)]
        sequence = self.sequences[user]
        history = sequence[max(0, position - self.max_history) : position].tolist()
        example = Example().add(encoder.thinking_prompt(history, own=sequence), trained=False)
        example.add(thought, trained=True)
        example.add([encoder.vocabulary.think_end], trained=bool(thought))
        example.add([encoder.vocabulary.begin], trained=False)  # the recommender opens the SID
        example.add([*encoder.item(int(sequence[position])), *self._ending], trained=True)
        return {"input_ids": example.input_ids, "labels": example.labels}

    def length(self, index: int) -> int:
        """Tokens of an example, without rendering it; notes are reckoned with at full length."""
        _, position = self.keys[index % len(self.keys)]
        history = self.encoder.history_tokens(min(position, self.max_history))
        item = self.encoder.vocabulary.num_levels
        return self._frame_tokens + history + item + len(self._thought(index))

    def tasks(self) -> dict[str, int]:
        """Number of examples with a thought and without, over all epochs."""
        thinking = int(self._thinks.sum())
        return {"think": thinking, "no_think": len(self) - thinking}

    def _thought(self, index: int) -> list[int]:
        epoch, step = divmod(index, len(self.keys))
        return self._thoughts[step] if self._thinks[epoch, step] else []
