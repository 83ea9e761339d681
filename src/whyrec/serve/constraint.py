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

vLLM has two interfaces, one for each model runner. `SidConstraint` is whichever is asked for:
`constraint_v1.py` or `constraint_v2.py`. All rows of a batch are permitted together (`permit.py`).
"""

from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from whyrec.serve.constraint_v1 import V1Constraint
from whyrec.serve.constraint_v2 import LogitsProcessorV2, V2Constraint
from whyrec.serve.permit import TEXT_ONLY

__all__ = ["TEXT_ONLY", "KeepTokenIds", "SidConstraint", "V1Constraint", "V2Constraint"]


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


LogitsProcessor.register(SidConstraint)  # so that it can be named in --logits-processors too
if LogitsProcessorV2 is not None:
    LogitsProcessorV2.register(SidConstraint)  # V2 takes no other class for a plugin
    LogitsProcessorV2.register(KeepTokenIds)
