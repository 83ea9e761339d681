"""The constraint for vLLM's V2 model runner, whose tokens are on the device: it is never asked.

Where each row's SID begins, its node and its children are found for all rows at once, by gathers of
fixed shapes. The tests run it in the V2 runner of vLLM 0.32, whose kernels Triton's interpreter can
compute on a CPU.

Dimensions: B rows of a batch, V vocabulary, L levels of a SID, T = L + 1 last tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig

from whyrec.serve.permit import TEXT_ONLY, permit_spans_where
from whyrec.serve.tries import Shelf, shelf_of
from whyrec.sid.trie import Trie

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:  # vLLM before 0.28 has one interface only
    LogitsProcessorV2 = None  # type: ignore[assignment, misc]


class _Constants:
    """What stays the same from step to step, on the device."""

    def __init__(self, shelf: Shelf, *, vocab_size: int) -> None:
        vocabulary, device = shelf.vocabulary, shelf.device
        num_levels = vocabulary.num_levels
        self.back_T = torch.arange(-num_levels, 1, device=device)
        self.from_1_T = torch.arange(1, num_levels + 2, device=device)
        self.level_L = torch.arange(num_levels, device=device)
        self.size_L = torch.tensor(vocabulary.level_sizes, device=device)
        self.offset_L = torch.tensor(vocabulary.offsets, device=device)
        self.offset_T = torch.tensor([*vocabulary.offsets, vocabulary.end], device=device)
        self.ramp_W = torch.arange(max(vocabulary.level_sizes), device=device)
        self.control_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.control_V[shelf.control_C] = True


class V2Constraint(LogitsProcessorV2 or object):  # type: ignore[misc]
    """For vLLM's V2 model runner.

    Raises:
        ValueError: with speculative decoding, whose draft tokens it does not follow.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: Any) -> None:
        model = vllm_config.model_config
        self._states = req_states
        vocab_size = model.get_vocab_size()
        self._shelf = shelf_of(model.model, device=req_states.device, vocab_size=vocab_size)
        self._text_only = torch.zeros(req_states.max_num_reqs, dtype=torch.bool)
        self._text_only_device = self._text_only.to(req_states.device)
        self._staged = self._any_text_only = False
        if self._shelf is None:
            return
        self._constants = _Constants(self._shelf, vocab_size=vocab_size)
        if vllm_config.speculative_config is not None:
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
            self._any_text_only = bool(self._text_only.any())
            self._staged = False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        shelf = self._shelf
        if shelf is None:
            return logits
        known, trie = self._constants, shelf.trie.trie
        slots_B = ctx.expanded_idx_mapping.long()
        text_only_B = self._text_only_device[slots_B]
        if self._any_text_only:
            silent_BV = known.control_V[: logits.shape[1]] & text_only_B[:, None]
            logits.masked_fill_(silent_BV, -torch.inf)
        # The last L + 1 tokens up to each row's own; -1 before the text's beginning.
        place_BT = ctx.pos.long()[:, None] + known.back_T
        tail_BT = self._states.all_token_ids.gpu[slots_B[:, None], place_BT.clamp(min=0)].long()
        tail_BT = tail_BT.masked_fill(place_BT < 0, -1)
        # Where the last SID begins, counted from 1: 0 is nowhere.
        begun_B = ((tail_BT == shelf.vocabulary.begin) * known.from_1_T).amax(-1)
        depth_B = (len(known.from_1_T) - begun_B).clamp(max=len(known.level_L))
        place_BL = (begun_B[:, None] + known.level_L).clamp(max=len(known.level_L))
        codes_BL = tail_BT.gather(1, place_BL) - known.offset_L
        legal_BL = (codes_BL >= 0) & (codes_BL < known.size_L)
        legal_BL |= known.level_L >= depth_B[:, None]
        inside_B = (begun_B > 0) & ~text_only_B & legal_BL.all(-1)
        node_B = _nodes(trie, codes_BL, depth_B)
        ends_B = (node_B < 0) | (depth_B == len(known.level_L))
        parent_B = torch.where(ends_B | ~inside_B, 0, node_B)
        within_B = inside_B & ~ends_B
        offset_B = known.offset_T[torch.where(ends_B, len(known.level_L), depth_B)]
        permit_spans_where(
            logits,
            inside_B,
            first_B=trie.first_child[parent_B] * within_B,
            last_B=(trie.first_child[parent_B + 1] - 1) * within_B,
            offset_B=offset_B * inside_B,
            code=trie.code,
            ramp_W=known.ramp_W[: max(trie.fan_outs)],
        )
        return logits


def _nodes(trie: Trie, codes_BL: Tensor, depth_B: Tensor) -> Tensor:
    """The node of each row's prefix of `depth` codes: int64 [B]; -1 where no item has it.

    A whole SID is not walked to its end: what follows it is known.
    """
    nodes = [torch.zeros_like(depth_B)]
    for level in range(trie.num_levels - 1):
        nodes.append(trie.step(nodes[-1], codes_BL[:, level], level=level))
    nodes_BT = F.pad(torch.stack(nodes, dim=1), (0, 1))
    return nodes_BT.gather(1, depth_B[:, None])[:, 0]
