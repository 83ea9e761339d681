"""Prompts and training examples as token ids, in the backbone's own chat format.

Data is never control. Templates are ours and may hold control tokens; titles, brands and histories
are other people's and are encoded by a copy of the tokenizer that knows no added tokens at all, so
that `<|im_end|>` or `<s_a_1>` inside a title arrives as harmless letters.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from whyrec.catalog.dataset import Item
from whyrec.prompting.notes import Notes
from whyrec.prompting.templates import load_templates
from whyrec.sid.vocabulary import SidVocabulary

IGNORED = -100  # the label of a token that no loss is taken on
_SENTINEL = "\x1a"


@dataclass
class Example:
    """A training example: token ids, and labels that equal them where the task wants a loss."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, trained: bool) -> "Example":
        self.input_ids.extend(ids)
        self.labels.extend(ids if trained else [IGNORED] * len(ids))
        return self


@dataclass(frozen=True)
class ChatFrame:
    """What stands around one question and its reply: token ids."""

    before_user: list[int]
    before_reply: list[int]
    after_reply: list[int]


class PromptEncoder:
    """Encodes prompts for one tokenizer and one SID vocabulary.

    Args:
        tokenizer: of a backbone whose vocabulary is extended.
        vocabulary: where the SID tokens are.
        codes_NL: the catalogue's SIDs, one row an item.
        template_folder: a model folder's own templates; the packaged ones when None.
        thinks: the model has learnt to think before it recommends, and to do without a thought
            that is closed at once.
        notes: what is said of a history's newest events beside their SIDs; None for SIDs alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: SidVocabulary,
        codes_NL: Sequence[Sequence[int]],
        template_folder: Path | None = None,
        thinks: bool = False,
        notes: Notes | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.thinks = thinks
        self.notes = notes
        self.recommend = load_templates("recommend", template_folder)
        self._item_ids = [vocabulary.encode(codes) for codes in codes_NL]
        self._plain = _without_added_tokens(tokenizer)
        self.frame = lru_cache(maxsize=None)(self._frame)
        self.control = lru_cache(maxsize=None)(self._control)
        self._tilde = self.text("~")
        self._note = lru_cache(maxsize=1 << 16)(self._note_text)

    def text(self, text: str) -> list[int]:
        """Encode somebody else's words: never gives a control token."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def _control(self, text: str) -> list[int]:
        """Encode our own words, control tokens included."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def item(self, item: int) -> list[int]:
        """An item's SID without brackets, as histories hold it."""
        return self._item_ids[item]

    def sid(self, item: int) -> list[int]:
        """An item's SID in its brackets, as replies and sentences hold it."""
        return [self.vocabulary.begin, *self._item_ids[item], self.vocabulary.end]

    def history(
        self, items: Sequence[int], *, own: Sequence[int] | np.ndarray | None = None
    ) -> list[int]:
        """A history as a prompt holds it, oldest first: SIDs, and notes where there are any."""
        return [token for ids, _ in self.history_parts(items, own=own) for token in ids]

    def history_parts(
        self, items: Sequence[int], *, own: Sequence[int] | np.ndarray | None = None
    ) -> list[tuple[list[int], bool]]:
        """The pieces of a history, and whether each is an event's own SID.

        Args:
            items: item indices, oldest first.
            own: the user's training sequence, when an item of it is still to be predicted: what
                only this user did must not stand in the notes.
        """
        if self.notes is None:
            return [(self._item_ids[item], True) for item in items]
        begin, parts = [self.vocabulary.begin], list[tuple[list[int], bool]]()
        near = self._others(items, own)
        silent = len(items) - len(near)
        for place, item in enumerate(items):
            parts += [(begin, False), (self._item_ids[item], True)]
            if place >= silent:
                parts.append((near[place - silent] + self._note(item), False))
        return parts

    def _others(
        self, items: Sequence[int], own: Sequence[int] | np.ndarray | None
    ) -> list[list[int]]:
        """By noted event, its neighbours and what is like it, as a note holds them."""
        assert self.notes is not None
        noted: list[list[int]] = []
        for near, like in zip(
            self.notes.near(items, own), self.notes.like(items, own), strict=True
        ):
            noted.append([token for other in near for token in self._item_ids[other]])
            noted[-1] += self._tilde if like else []
            noted[-1] += [token for other in like for token in self._item_ids[other]]
        return noted

    def history_tokens(self, num_items: int) -> int:
        """Tokens of a history of so many items at most."""
        levels = self.vocabulary.num_levels
        if self.notes is None:
            return levels * num_items
        note = levels * self.notes.neighbours + self.notes.text_tokens
        if self.notes.alike:
            note += levels * self.notes.alike + len(self._tilde)
        return (levels + 1) * num_items + note * min(num_items, self.notes.events)

    def longest_prompt(self, num_items: int) -> int:
        """Tokens of the prompt of a beam for so many items at most, without a thought."""
        return len(self.recommendation_prompt([])) + self.history_tokens(num_items)

    def _note_text(self, item: int) -> list[int]:
        assert self.notes is not None
        return self.text(self.notes.text(item))[: self.notes.text_tokens]

    def note_text(self, item: int) -> str:
        """What a note spells out of an item, as far as it goes; "" where notes hold no text."""
        return "" if self.notes is None else str(self.tokenizer.decode(self._note(item)))

    def render(self, template: str, **slots: Sequence[int]) -> list[list[int]]:
        """Fill a template's `{slots}` with token ids; the pieces in order, literals included.

        Raises:
            ValueError: for a slot that nothing is there for.
        """
        pieces: list[list[int]] = []
        for literal, slot, _, _ in string.Formatter().parse(template):
            if literal:
                pieces.append(self.control(literal))
            if slot is not None:
                if slot not in slots:
                    raise ValueError(
                        f"there is nothing to fill {{{slot}}} of {template!r} with; take it out"
                    )
                pieces.append(list(slots[slot]))
        return pieces

    def recommendation_prompt(self, history: Sequence[int]) -> list[int]:
        """The prompt that a beam starts from without a thought: the history and an opened SID.

        A model that thinks is shown a thought that is closed at once: `<think></think>`.

        Args:
            history: item indices, oldest first.
        """
        if self.thinks:
            return self.answer_prompt(history)
        return [*self._question(history), self.vocabulary.begin]

    def thinking_prompt(
        self, history: Sequence[int], *, own: Sequence[int] | np.ndarray | None = None
    ) -> list[int]:
        """The prompt that a thought is sampled after: it ends in `<think>`.

        Args:
            history: item indices, oldest first.
            own: as for `history_parts`, in training.
        """
        return [*self._question(history, own=own), self.vocabulary.think_begin]

    def answer_prompt(self, history: Sequence[int], thought: Sequence[int] = ()) -> list[int]:
        """The prompt that a beam starts from: `… <think>THOUGHT</think><|sid_begin|>`.

        Args:
            history: item indices, oldest first.
            thought: token ids without brackets; none is the no-think mode.
        """
        closing = [self.vocabulary.think_end, self.vocabulary.begin]
        return [*self.thinking_prompt(history), *thought, *closing]

    def _question(
        self, history: Sequence[int], *, own: Sequence[int] | np.ndarray | None = None
    ) -> list[int]:
        """The history and the question, up to where the reply begins."""
        frame = self.frame(self.recommend["system"])
        question = self.render(self.recommend["user"], history=self.history(history, own=own))
        return [
            *frame.before_user,
            *(token for piece in question for token in piece),
            *frame.before_reply,
        ]

    def _frame(self, system: str) -> ChatFrame:
        """Read the chat format off the tokenizer's own template."""
        if self.tokenizer.chat_template is None:
            texts = (f"{system}\n\nUser: ", "\nAssistant: ", self.tokenizer.eos_token or "\n")
        else:
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": _SENTINEL},
            ]
            asked = self._apply(messages, add_generation_prompt=True)
            reply = {"role": "assistant", "content": _SENTINEL}
            answered = self._apply([*messages, reply], add_generation_prompt=False)
            before_user, before_reply = asked.split(_SENTINEL)
            texts = (before_user, before_reply, answered.split(_SENTINEL)[2])
        return ChatFrame(*(self._control(text) for text in texts))

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text


def item_text(item: Item) -> str:
    """What the catalogue says of an item, in one line: title, categories, brand.

    >>> item_text(Item("1", "Toy Story (1995)", "", ("Animation", "Comedy"), ""))
    'Toy Story (1995) (Animation, Comedy)'
    """
    parts = [item.title or "(untitled)"]
    if item.categories:
        parts.append(f"({', '.join(item.categories)})")
    if item.brand:
        parts.append(f"by {item.brand}")
    return " ".join(parts)


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's core that can spell control tokens but never emit them."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in spec["added_tokens"]}
    spec["added_tokens"] = []
    spec["post_processor"] = None
    vocab = spec["model"].get("vocab")
    if spec["model"].get("ignore_merges") and isinstance(vocab, dict):
        # Such models look whole words up before merging, and control tokens are in the list.
        spec["model"]["vocab"] = {k: v for k, v in vocab.items() if k not in added}
    return Tokenizer.from_str(json.dumps(spec))
