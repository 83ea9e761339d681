"""The constraint for vLLM's V1 model runner, whose tokens are on the host.

The host finds each row's node, a code at a time, and the device permits all rows together. What a
step costs the host is a look at the last tokens of each row, and a few microseconds for a row
inside a SID; text-only rows are looked at when the batch changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from whyrec.serve.permit import TEXT_ONLY, permit_spans
from whyrec.serve.tries import ServedTrie, Shelf, shelf_of
from whyrec.sid.vocabulary import SidVocabulary


def codes_after_begin(tail: Sequence[int], vocabulary: SidVocabulary) -> list[int] | None:
    """The codes of the SID that text is inside of, from its last L + 1 tokens; None outside."""
    if vocabulary.begin not in tail:
        return None
    start = len(tail) - list(tail)[::-1].index(vocabulary.begin)
    codes = []
    for level, token in enumerate(tail[start:]):
        code = token - vocabulary.offsets[level]
        if not 0 <= code < vocabulary.level_sizes[level]:
            return None  # a prompt's own words, such as a sentence about the token
        codes.append(code)
    return codes


@dataclass
class _Row:
    """What a row's text is: the end of its prompt, and its output, a list that vLLM extends.

    Where its SID stood a step ago is only remembered to walk one code instead of all.
    """

    prompt_tail: list[int]
    output: list[int]
    text_only: bool
    served: ServedTrie | None = None
    codes: list[int] | None = None
    node: int = 0

    def tail(self, size: int) -> list[int]:
        tail = self.output[-size:]
        return tail if len(tail) == size else (self.prompt_tail + tail)[-size:]


class V1Constraint(LogitsProcessor):
    """For vLLM's V1 model runner.

    Raises:
        ValueError: when vLLM would not tell it the tokens in time.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        self._device, self._pinned = device, is_pin_memory
        self._shelf = shelf_of(model.model, device=device, vocab_size=model.get_vocab_size())
        self._rows: dict[int, _Row] = {}
        self._writing: list[tuple[int, _Row]] = []  # rows that may hold a SID
        self._thinking_R1: Tensor | None = None  # those that may not
        self._silence = torch.full((), -torch.inf, device=device)
        self._ramp_W = torch.arange(0, device=device)
        if self._shelf is None:
            return
        # vLLM fills sampled tokens into the lists in time only for processors it was named.
        if vllm_config.scheduler_config.async_scheduling and not model.logits_processors:
            raise ValueError(
                "with asynchronous scheduling vLLM does not show sampled tokens to installed "
                "logits processors; add --logits-processors whyrec.serve.constraint:KeepTokenIds, "
                "or --no-async-scheduling"
            )

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests of the batch: who left, who came, who moved."""
        if batch_update is None or self._shelf is None:
            return
        size = self._shelf.vocabulary.num_levels + 1
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            text_only = bool((params.extra_args or {}).get(TEXT_ONLY, False))
            self._rows[index] = _Row(list(prompt or [])[-size:], output, text_only)
        for source, target, direction in batch_update.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = other
        self._writing = [(index, row) for index, row in self._rows.items() if not row.text_only]
        thinking = [index for index, row in self._rows.items() if row.text_only]
        self._thinking_R1 = self._on_device(thinking)[:, None] if thinking else None

    def apply(self, logits: Tensor) -> Tensor:
        shelf = self._shelf
        if shelf is None:
            return logits
        if self._thinking_R1 is not None:
            silence = self._silence.to(logits.dtype)
            logits.index_put_((self._thinking_R1, shelf.control_C), silence)
        for served, spans in self._spans(shelf).items():
            widest = max(last - first for _, first, last, _ in spans) + 1
            permit_spans(
                logits,
                self._on_device(list(zip(*spans, strict=True))),
                code=served.trie.code,
                ramp_W=self._ramp(widest),
            )
        return logits

    def _spans(self, shelf: Shelf) -> dict[ServedTrie, list[tuple[int, int, int, int]]]:
        """For each row inside a SID: which, its first and last child, the token id of code 0."""
        vocabulary, size = shelf.vocabulary, shelf.vocabulary.num_levels + 1
        begin, found = vocabulary.begin, dict[ServedTrie, list[tuple[int, int, int, int]]]()
        for index, row in self._writing:
            tail = row.tail(size)
            if begin not in tail:
                continue
            codes = codes_after_begin(tail, vocabulary)
            if codes is None:
                continue
            served, node = self._find(shelf, row, codes)
            if len(codes) == vocabulary.num_levels or node < 0:
                span = (index, 0, 0, vocabulary.end)
            else:
                first, stop = served.children(node)
                span = (index, first, stop - 1, vocabulary.offsets[len(codes)])
            found.setdefault(served, []).append(span)
        return found

    def _find(self, shelf: Shelf, row: _Row, codes: list[int]) -> tuple[ServedTrie, int]:
        """The node of a row's prefix in the newest trie, or in the one that it was begun with."""
        served = shelf.trie
        if codes and row.served is served and row.codes == codes[:-1]:
            node = served.walk(codes[-1:], node=row.node)
        else:
            node = served.walk(codes)
        if node < 0 and shelf.before is not None:
            served, node = shelf.before, shelf.before.walk(codes)
        row.served, row.codes, row.node = served, codes, node
        return served, node

    def _ramp(self, width: int) -> Tensor:
        """0 .. width - 1, counted once for all widths up to a power of two."""
        if width > len(self._ramp_W):
            self._ramp_W = torch.arange(1 << (width - 1).bit_length(), device=self._device)
        return self._ramp_W[:width]

    def _on_device(self, numbers: Sequence[object]) -> Tensor:
        # Only pinned memory is copied without waiting for the device.
        host = torch.tensor(numbers, dtype=torch.long, pin_memory=self._pinned)
        return host.to(self._device, non_blocking=True)
