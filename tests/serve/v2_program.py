"""vLLM's V2 model runner on a CPU, in Triton's interpreter: a program for `test_constraint_v2.py`.

    python v2_program.py FOLDER ASKED.json FOUND.json

The V2 runner is made of Triton kernels and asks for Triton's CPU backend, which package indexes
lack. The interpreter that is part of every Triton runs the same kernels, at milliseconds for each
thousand tokens of the vocabulary: for a small vocabulary and few steps that will do.

Our logits processor is found as with users, by whyrec's entry point. `ASKED.json` holds `batches`,
lists of requests of a `prompt` and parameters of `SamplingParams`, and `beams`, the arguments of
`whyrec_recommend`; `FOUND.json` the texts of each, the beams, the runner and its preemptions.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}

from served_models import engine_settings
from triton.backends import Backend, backends

BLOCKS = 20


class Interpreter:
    """What vLLM looks for in a backend called cpu: that it works."""

    @classmethod
    def is_active(cls) -> bool:
        return True


def answer(llm: Any, asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    texts = []
    for batch in asked["batches"]:
        prompts = [{"prompt_token_ids": one.pop("prompt")} for one in batch]
        for one in batch:  # JSON's keys are texts
            bias = one.pop("logit_bias", {})
            one["logit_bias"] = {int(token): value for token, value in bias.items()}
        params = [SamplingParams(**one) for one in batch]
        found = llm.generate(prompts, params, use_tqdm=False)
        texts.append([[list(output.token_ids) for output in one.outputs] for one in found])
    llm.collective_rpc("whyrec_load")
    core = llm.llm_engine.engine_core.engine_core
    counted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    return {
        "texts": texts,
        "beams": llm.collective_rpc("whyrec_recommend", args=tuple(asked["beams"]))[0],
        "runner": type(core.model_executor.driver_worker.worker.model_runner).__module__,
        "preemptions": sum(counted),
    }


def main(folder: str, asked: str, found: str) -> None:
    backends["cpu"] = Backend(None, Interpreter)  # type: ignore[arg-type]
    from vllm import LLM
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False  # that kernel the interpreter does not know

    settings = engine_settings(
        Path(folder),
        logits_processors=None,
        max_model_len=512,
        kv_cache_memory_bytes=BLOCKS * 32 * 2 * 2 * 2 * 32 * 4,
    )
    answers = answer(LLM(**settings), json.loads(Path(asked).read_text()))
    Path(found).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
