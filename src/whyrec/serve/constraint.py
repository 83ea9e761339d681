"""After `<|sid_begin|>` only SIDs of the catalogue can follow, then `<|sid_end|>`: always.

vLLM calls a logits processor for every step of every request. Ours looks at the last tokens of each
row alone, so that nothing it knows can get lost: a request that is preempted, moved in its batch or
one of `n` is the same text behind which the same codes may follow. A row outside a SID costs one
look. Temperature, `top_p`, `min_p` and penalties come later or never lift a token that has no
probability; where `allowed_token_ids`, `bad_words` or `min_tokens` left no legal code, the legal
ones are equally likely.

The entry point `vllm.logits_processors` makes plain `vllm serve MODEL` do this when whyrec is
installed; other models are left alone. A request with `extra_args={"whyrec_text": true}` writes
text only, as thoughts do: no SID code and no control token but `</think>`.

vLLM has two interfaces, one for each model runner. `SidConstraint` is whichever is asked for. V2's
is written after its documentation (vLLM 0.32) and tested with its data structures, but not yet in a
V2 runner, which needs a GPU.

Dimensions: B rows of a batch, V vocabulary, R rows inside a SID, T = L + 1 last tokens, K codes of
a level, C control tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from whyrec.serve.tries import ServedTrie, Shelf, shelf_of
from whyrec.sid.vocabulary import SidVocabulary

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:  # vLLM before 0.28 has one interface only
    LogitsProcessorV2 = None  # type: ignore[assignment, misc]

TEXT_ONLY = "whyrec_text"


class SidConstraint:
    """The entry point: makes the processor of the runner that asks."""

    def __new__(cls, vllm_config: VllmConfig, *arguments: Any) -> Any:
        # V1 gives a device and whether memory is pinned, V2 its request states.
        return (V1Constraint if len(arguments) == 2 else V2Constraint)(vllm_config, *arguments)

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Refuse a text-only flag that is no boolean; vLLM calls this for every request."""
        flag = (params.extra_args or {}).get(TEXT_ONLY, False)
        if not isinstance(flag, bool):
            raise ValueError(f"{TEXT_ONLY} must be true or false, not {flag!r}")


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


def permit_codes(logits_BV: Tensor, rows_R: Tensor, *, first: int, legal_RK: Tensor) -> None:
    """Leave only legal codes to some rows, in place; a row without any legal one is not touched.

    Args:
        logits_BV: of a batch.
        rows_R: int64, which rows.
        first: token id of code 0.
        legal_RK: which codes may follow.
    """
    stop = first + legal_RK.shape[1]
    codes_RK = logits_BV[rows_R, first:stop].masked_fill(~legal_RK, -torch.inf)
    silenced_R1 = (codes_RK == -torch.inf).all(-1, keepdim=True)
    codes_RK = codes_RK.masked_fill(silenced_R1 & legal_RK, 0.0)
    logits_BV.index_fill_(0, rows_R, -torch.inf)
    logits_BV[:, first:stop].index_copy_(0, rows_R, codes_RK)


def permit_token(logits_BV: Tensor, rows_R: Tensor, token: int) -> None:
    """Leave only one token to some rows, in place."""
    logits_BV.index_fill_(0, rows_R, -torch.inf)
    logits_BV[:, token].index_fill_(0, rows_R, 0.0)


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
    """For vLLM's V1 model runner, whose tokens are on the host.

    Raises:
        ValueError: when vLLM would not tell it the tokens in time.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        self._device = device
        self._shelf = shelf_of(model.model, device=device, vocab_size=model.get_vocab_size())
        self._rows: dict[int, _Row] = {}
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

    def apply(self, logits: Tensor) -> Tensor:
        shelf = self._shelf
        if shelf is None or not self._rows:
            return logits
        vocabulary, size = shelf.vocabulary, shelf.vocabulary.num_levels + 1
        thinking: list[int] = []
        ending: list[int] = []
        inside: dict[tuple[ServedTrie, int], tuple[list[int], list[int]]] = {}
        for index, row in self._rows.items():
            if row.text_only:
                thinking.append(index)
                continue
            codes = codes_after_begin(row.tail(size), vocabulary)
            if codes is None:
                continue
            served, node = self._find(shelf, row, codes)
            if len(codes) == vocabulary.num_levels or node < 0:
                ending.append(index)
                continue
            indices, nodes = inside.setdefault((served, len(codes)), ([], []))
            indices.append(index)
            nodes.append(node)
        if thinking:
            rows_R = self._on_device(thinking)
            logits.index_put_((rows_R[:, None], shelf.control_C), logits.new_tensor(-torch.inf))
        for (served, level), (indices, nodes) in inside.items():
            legal_RK = served.trie.mask(self._on_device(nodes), level=level)
            permit_codes(
                logits,
                self._on_device(indices),
                first=vocabulary.offsets[level],
                legal_RK=legal_RK,
            )
        if ending:
            permit_token(logits, self._on_device(ending), vocabulary.end)
        return logits

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

    def _on_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(self._device, non_blocking=True)


class KeepTokenIds(LogitsProcessor):
    """Does nothing; named in `--logits-processors` it makes vLLM keep token lists up to date."""

    def __init__(self, vllm_config: VllmConfig, *arguments: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply_staged_writes(self) -> None:
        pass

    def apply(self, logits: Tensor, *_: Any) -> Tensor:
        return logits


class V2Constraint(LogitsProcessorV2 or object):  # type: ignore[misc]
    """For vLLM's V2 model runner, whose tokens are on the device, which is never waited for.

    Raises:
        ValueError: with speculative decoding, whose draft tokens it does not follow.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: Any) -> None:
        model = vllm_config.model_config
        self._states = req_states
        self._shelf = shelf_of(
            model.model, device=req_states.device, vocab_size=model.get_vocab_size()
        )
        self._text_only = torch.zeros(req_states.max_num_reqs, dtype=torch.bool)
        self._text_only_device = self._text_only.to(req_states.device)
        self._staged = False
        if self._shelf is not None and vllm_config.speculative_config is not None:
            raise ValueError(
                "SIDs are not constrained under speculative decoding; start vLLM without it"
            )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        flag = bool((sampling_params.extra_args or {}).get(TEXT_ONLY, False))
        self._text_only[req_idx] = flag
        self._staged = True
        return self._shelf is not None

    def apply_staged_writes(self) -> None:
        if self._staged:
            self._text_only_device.copy_(self._text_only)
            self._staged = False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        shelf = self._shelf
        if shelf is None:
            return logits
        vocabulary, served = shelf.vocabulary, shelf.trie
        num_levels = vocabulary.num_levels
        slots_B, position_B = ctx.expanded_idx_mapping.long(), ctx.pos.long()
        # The last L + 1 tokens up to each row's own; -1 before the text's beginning.
        place_BT = position_B[:, None] + torch.arange(-num_levels, 1, device=logits.device)
        tail_BT = self._states.all_token_ids.gpu[slots_B[:, None], place_BT.clamp(min=0)].long()
        tail_BT = tail_BT.masked_fill(place_BT < 0, -1)
        text_only_B = self._text_only_device[slots_B]
        control_BV = torch.zeros_like(logits, dtype=torch.bool)
        control_BV[:, shelf.control_C] = True
        logits.masked_fill_(control_BV & text_only_B[:, None], -torch.inf)
        for level in range(num_levels + 1):
            begin_B = (tail_BT[:, num_levels - level] == vocabulary.begin) & ~text_only_B
            codes_BD = tail_BT[:, num_levels - level + 1 :] - torch.tensor(
                vocabulary.offsets[:level], device=logits.device
            )
            sizes_D = torch.tensor(vocabulary.level_sizes[:level], device=logits.device)
            inside_B = begin_B & ((codes_BD >= 0) & (codes_BD < sizes_D)).all(-1)
            nodes_B = served.trie.walk(codes_BD.clamp(min=0))
            ends_B = inside_B & ((nodes_B < 0) | (level == num_levels))
            if level < num_levels:
                first = vocabulary.offsets[level]
                stop = first + vocabulary.level_sizes[level]
                legal_BK = served.trie.mask(nodes_B, level=level)
                codes_BK = logits[:, first:stop].masked_fill(~legal_BK, -torch.inf)
                silenced_B1 = (codes_BK == -torch.inf).all(-1, keepdim=True)
                codes_BK = codes_BK.masked_fill(silenced_B1 & legal_BK, 0.0)
                constrained_B1 = (inside_B & ~ends_B)[:, None]
                kept_BK = torch.where(constrained_B1, codes_BK, logits[:, first:stop])
                logits.masked_fill_(constrained_B1, -torch.inf)
                logits[:, first:stop] = kept_BK
            end_B = torch.where(ends_B, 0.0, logits[:, vocabulary.end])
            logits.masked_fill_(ends_B[:, None], -torch.inf)
            logits[:, vocabulary.end] = end_B
        return logits


LogitsProcessor.register(SidConstraint)  # so that it can be named in --logits-processors too
if LogitsProcessorV2 is not None:
    LogitsProcessorV2.register(SidConstraint)  # V2 takes no other class for a plugin
    LogitsProcessorV2.register(KeepTokenIds)
