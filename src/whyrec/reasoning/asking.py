"""What a language model is asked for a rationale, and the log of what it answered.

A model, the aligned one itself or an endpoint, sees the pruned history and the target in words and
explains the step (OneRec-Think, arXiv 2510.11639, §3.2). Answers go into an append-only JSONL file,
one line a training step, so that a killed run goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from whyrec.catalog.dataset import Item
from whyrec.prompting.encoder import item_text
from whyrec.prompting.templates import load_templates
from whyrec.reasoning.pruning import prune

Key = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A training step that wants a rationale.

    Attributes:
        user, position: of the event; the key of what is written.
        history: item indices as the prompt shows them, oldest first.
        target: the item that followed.
        own: the user's whole training sequence, whose pairs no note of the prompt may tell of.
    """

    user: int
    position: int
    history: Sequence[int]
    target: int
    own: Sequence[int]

    @property
    def key(self) -> Key:
        return self.user, self.position


@dataclass(frozen=True)
class Question:
    """What is asked about one step: the words of the system, and the parts of the user's."""

    key: Key
    system: str
    template: str
    slots: dict[str, str]

    def messages(self) -> list[dict[str, str]]:
        """As a chat endpoint takes it."""
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.template.format(**self.slots)},
        ]


def question(
    step: Step, items: Sequence[Item], *, vectors_ND: np.ndarray, words: int, k: int = 10
) -> Question:
    """The question for a step: its pruned history and its target, in words.

    Args:
        step: the training step.
        items: the catalogue.
        vectors_ND: item vectors of length 1.
        words: how long the answer shall be at most.
        k: history items to show at most.
    """
    asked = load_templates("rationale")["model"]
    pruned = prune(step.history, step.target, vectors_ND=vectors_ND, k=k)
    lines = [asked["item"].format(text=item_text(items[item])) for item in pruned]
    slots = {
        "history": "".join(lines).rstrip("\n"),
        "target": item_text(items[step.target]),
        "words": str(words),
    }
    return Question(step.key, asked["system"], asked["user"], slots)


def tidy(answer: str) -> str:
    """An answer on one line, without the thoughts of a model that thinks aloud.

    >>> tidy("<think>Hm.</think>They like   films.\\n")
    'They like films.'
    """
    return " ".join(answer.rpartition("</think>")[2].split())


class AnswerLog:
    """Answers by training step, in an append-only JSONL file.

    The first line says what was asked, so that answers to other questions are not mixed in. A line
    that a kill cut short is dropped; its step is asked again.

    Args:
        path: the file; made when it is not there.
        asked: all that decides the answers besides the steps, plain JSON values.

    Raises:
        ValueError: when the file holds answers to other questions.
    """

    def __init__(self, path: Path, *, asked: dict[str, Any]) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        templates = json.dumps(load_templates("rationale")["model"], sort_keys=True)
        self._asked = asked | {"templates": hashlib.sha256(templates.encode()).hexdigest()[:16]}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = list(self._read())
        if not whole:
            path.write_bytes(b"")
            self._append({"asked": self._asked})
        elif whole[0] != {"asked": self._asked}:
            raise ValueError(
                f"{path} holds answers to other questions (another model, setting or template); "
                "name another file, or move this one away"
            )
        self.rows = whole[1:]

    def answers(self) -> dict[Key, str | None]:
        """What was answered, by step; None where the answer was of no use."""
        return {(row["user"], row["position"]): row["text"] for row in self.rows if "text" in row}

    def add(self, key: Key, **values: Any) -> None:
        """Append a row: with `text` (a rationale, or None) the step is done, without it is not."""
        row = {"user": key[0], "position": key[1], **values}
        self._append(row)
        self.rows.append(row)

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def _read(self) -> Iterator[dict[str, Any]]:
        """Rows of whole lines; a broken last line is cut off the file."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        for line in data[:whole].splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a machine that went down may leave zeros; the step is asked again
            if isinstance(row, dict):
                yield row
