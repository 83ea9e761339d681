"""A tiny random model folder that vLLM can load, and a vLLM that serves it in this process."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from conftest import LEVEL_SIZES, make_model
from whyrec.backbone.extend import extend_vocabulary
from whyrec.decode.model_folder import Settings, save_model_folder
from whyrec.sid.vocabulary import SidVocabulary

MAX_LENGTH = 256
# vLLM's CPU attention wants heads of a multiple of 32.
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_served(
    folder: Path, run: Path, tokenizer: PreTrainedTokenizerBase, *, kind: str = "llama"
) -> Path:
    """A model folder of random weights over the catalogue of a run."""
    tokenizer = copy.deepcopy(tokenizer)
    model = make_model(kind, vocab_size=len(tokenizer), **SIZES)
    extend_vocabulary(model, tokenizer, level_sizes=LEVEL_SIZES)
    save_model_folder(
        folder,
        model=model,
        tokenizer=tokenizer,
        settings=Settings("aligned", "tiny", list(LEVEL_SIZES), max_history=8),
        dataset_folder=run / "dataset",
        sids_folder=run / "sids",
    )
    return folder


def engine_settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of vLLM for the tiny model, with 40 blocks of keys and values."""
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 40 * 32 * 2 * 2 * 2 * 32 * 4,  # blocks, tokens, layers, k v, heads
        "worker_extension_cls": "whyrec.serve.worker.BeamWorker",
        "logits_processors": ["whyrec.serve.constraint:SidConstraint"],
        "disable_log_stats": False,
        "seed": 0,
    }
    return settings | more


@lru_cache(maxsize=1)
def one_llm(folder: Path) -> Any:
    """vLLM in this process, with our worker and our constraint; the same for all test files."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    return LLM(**engine_settings(folder))


@contextmanager
def started_client(run: Callable[[Any], Any], folder: Path, **more: Any) -> Iterator[Any]:
    """vLLM's asynchronous client, with its engine in another process.

    Args:
        run: of the event loop that the client shall belong to.
        folder: the model's.
        more: as for `engine_settings`.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_settings(folder, **more)))

        client = run(start())
        yield client
        client.shutdown()


def one_served(run: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The model folder of `one_llm`, beside its run; not to be changed."""
    folder = run.with_name(f"{run.name}-served")
    return folder if folder.exists() else make_served(folder, run, tokenizer)


def sids_in(ids: Sequence[int], vocabulary: SidVocabulary) -> list[tuple[int, ...]]:
    """The codes behind every `<|sid_begin|>`, whole or cut at the end; fails where text follows."""
    found, place = [], 0
    while place < len(ids):
        if ids[place] != vocabulary.begin:
            place += 1
            continue
        inside = ids[place + 1 : place + 1 + vocabulary.num_levels]
        codes = tuple(t - o for t, o in zip(inside, vocabulary.offsets, strict=False))
        pairs = zip(codes, vocabulary.level_sizes, strict=False)
        assert all(0 <= code < size for code, size in pairs), f"{inside} is no SID"
        found.append(codes)
        place += 1 + vocabulary.num_levels
        if place < len(ids):
            assert ids[place] == vocabulary.end, "a SID is not closed"
    return found
