"""Thoughts of a training model as lists of tokens: sampled by our decoder, or by vLLM beside it.

`VllmSampler` holds a vLLM engine in this process (colocated, one a training process, on its device)
that has the shapes of the model that trains. `load` hands it the model's weights of now, an adapter
merged in, without a file between; `sample` draws by the rules of `decode/think.py`:

* text alone and `</think>`. The constraint of `serve/constraint.py` sees to it: vLLM's own
  `allowed_token_ids` and `logit_bias` take no more than 1,024 tokens on a GPU, and there are fifty
  thousand words;
* budget, temperature and nothing else: a GenerationConfig is not read;
* a seed for each thought out of (seed, key of the prompt, sample), so that a training that was
  killed goes on as it would have. The draws are not those of our decoder.

The log-probabilities are those of the distribution that was drawn from: at the temperature, over
the text alone, as in `policy.py`. GRPO takes its own from there, the old ones too, and not from
here: vLLM's kernels round otherwise, and a ratio of 1 should be 1. That draws are from a model
that rounds otherwise is not corrected for.

    sampler = VllmSampler(folder, think_end=…, samples=16, max_tokens=64, temperature=1.0,
                          rows=1024, longest=700)
    sampler.load(model)
    thoughts = sampler.sample(prompts, seed=0, keys=range(len(prompts)))

A vLLM server that runs elsewhere is not given the weights: that is not built.

Dimensions: R thoughts.
"""

import gc
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from whyrec.backbone.lora import merged_weights
from whyrec.decode.think import Thoughts
from whyrec.serve.permit import TEXT_ONLY
from whyrec.train.trainer import processes

_CONSTRAINT = "whyrec.serve.constraint:SidConstraint"
_BLOCK = 32  # tokens; no prompt is so short that its thoughts would share nothing


@dataclass(frozen=True)
class Sampled:
    """R thoughts, the samples of a prompt one after the other.

    Attributes:
        words: token ids, with `</think>` where the model closed the thought.
        log_probs: of these, by the sampler: our decoder's over the whole vocabulary, vLLM's over
            the text alone.
        closed_R: whether the model closed the thought.
    """

    words: list[list[int]]
    log_probs: list[list[float]]
    closed_R: np.ndarray

    @property
    def bare(self) -> list[list[int]]:
        """The words without `</think>`."""
        pairs = zip(self.words, self.closed_R, strict=True)
        return [ids[:-1] if closed else ids for ids, closed in pairs]

    def of(self, places: Sequence[int], *, samples: int) -> "Sampled":
        """The thoughts of some prompts."""
        rows = [place * samples + sample for place in places for sample in range(samples)]
        return Sampled(
            [self.words[row] for row in rows],
            [self.log_probs[row] for row in rows],
            self.closed_R[rows],
        )


def sampled(thoughts: Thoughts) -> Sampled:
    """What our decoder sampled."""
    ids_RT = thoughts.ids_UGT.flatten(0, 1).cpu().numpy()
    log_probs_RT = thoughts.log_probs_UGT.flatten(0, 1).float().cpu().numpy()
    lengths_R = (ids_RT >= 0).sum(1)
    rows = list(zip(ids_RT, log_probs_RT, lengths_R, strict=True))
    return Sampled(
        [ids_T[:length].tolist() for ids_T, _, length in rows],
        [log_probs_T[:length].tolist() for _, log_probs_T, length in rows],
        thoughts.closed_UG.flatten().cpu().numpy(),
    )


def check_vllm() -> None:
    """ValueError with what to install when vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollouts: vllm needs vLLM; install whyrec[serve] for CUDA or whyrec[serve-cpu], or "
            "set rollouts: decoder"
        )


class VllmSampler:
    """A vLLM engine in this process; all processes of a training make theirs at the same time.

    Args:
        folder: model folder with the shapes, the tokenizer and the catalogue of the model.
        think_end: the token that ends a thought.
        samples: G, thoughts a prompt.
        max_tokens: budget of a thought, `</think>` included.
        temperature: of their sampling, above 0.
        rows: thoughts that are under way at once.
        longest: tokens of the longest prompt.

    Raises:
        ValueError: when vLLM cannot hold such a model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        think_end: int,
        samples: int,
        max_tokens: int,
        temperature: float,
        rows: int,
        longest: int,
    ) -> None:
        self._think_end, self._samples = think_end, samples
        self._max_tokens, self._temperature = max_tokens, temperature
        state = processes()
        self._device_type = state.device.type
        on_gpu = self._device_type == "cuda"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over, not sent
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        tokens = -(-rows // samples) * (longest + _BLOCK) + rows * (max_tokens + 2 * _BLOCK)
        try:
            self._llm = LLM(
                model=str(folder),
                load_format="dummy",  # `load` comes before any thought
                dtype="bfloat16" if on_gpu else "float32",
                generation_config="vllm",
                skip_tokenizer_init=True,
                logits_processors=[_CONSTRAINT],
                logprobs_mode="processed_logprobs",
                max_model_len=longest + max_tokens,
                max_num_seqs=rows,
                max_num_batched_tokens=max(rows, longest, 8192),
                block_size=_BLOCK,
                # The rest of the device is the trainer's; the share is only asked for at the start.
                kv_cache_memory_bytes=tokens * _bytes_a_token(folder, 2 if on_gpu else 4),
                gpu_memory_utilization=0.01,
                enforce_eager=not on_gpu,
                # Several processes are in one process group already, which vLLM must join.
                distributed_executor_backend=(
                    "external_launcher" if state.num_processes > 1 else "uni"
                ),
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"vLLM cannot hold {folder} beside the training ({_reason(error)}); lower "
                "rollout_rows, or set rollouts: decoder"
            ) from error
        # An engine that is collected ends all process groups, the trainer's too: not this one.
        finalizer = getattr(self._llm.llm_engine.engine_core, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()

    def load(self, model: nn.Module) -> None:
        """Take a model's weights of now, an adapter merged in.

        Args:
            model: of the shapes of the folder; what PEFT put inside it may be there.
        """
        # Not `load_weights` of vLLM's model: on a CPU its layers keep their weights packed.
        weights = ((name, weight.detach()) for name, weight in merged_weights(model))
        with torch.no_grad(), self._as_it_is():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self._device_type == "cpu":
                self._llm.apply_model(_pack_head)
        self._llm.reset_prefix_cache()  # keys and values of the weights before

    def sample(
        self, prompts: Sequence[Sequence[int]], *, seed: int, keys: Sequence[int]
    ) -> Sampled:
        """G thoughts after each prompt.

        Args:
            prompts: token ids, ending in `<think>`.
            seed: of all draws.
            keys: a number for each prompt that the draws depend on.
        """
        from vllm import SamplingParams

        asked: list[Any] = []
        params = []
        for prompt, key in zip(prompts, keys, strict=True):
            for sample in range(self._samples):
                asked.append({"prompt_token_ids": list(prompt)})
                # A seed for each: with `n` vLLM would count on from one, into the next prompt's.
                params.append(
                    SamplingParams(
                        max_tokens=self._max_tokens,
                        temperature=self._temperature,
                        seed=int(np.random.default_rng((seed, key, sample)).integers(2**62)),
                        stop_token_ids=[self._think_end],
                        ignore_eos=True,
                        detokenize=False,
                        logprobs=0,  # the drawn token's alone
                        extra_args={TEXT_ONLY: True},
                    )
                )
        with self._as_it_is():
            answers = self._llm.generate(asked, params, use_tqdm=False)
        found: list[Any] = [one.outputs[0] for one in answers]
        words = [list(output.token_ids) for output in found]
        log_probs = [
            [place[token].logprob for token, place in zip(ids, output.logprobs, strict=True)]
            for ids, output in zip(words, found, strict=True)
        ]
        return Sampled(words, log_probs, np.array([ids[-1] == self._think_end for ids in words]))

    def close(self) -> None:
        """Give the memory back."""
        self._llm.llm_engine.model_executor.shutdown()
        del self._llm
        gc.unfreeze()  # vLLM hides what it holds from the collector
        gc.collect()
        if self._device_type == "cuda":
            torch.cuda.empty_cache()

    def _as_it_is(self) -> torch.autocast:
        """Without the trainer's mixed precision, which reaches all that runs in this process."""
        return torch.autocast(self._device_type, enabled=False)


def _pack_head(model: Any) -> None:
    """Let a head that shares the embedding's weights see that they have changed.

    On a CPU vLLM multiplies by a packed copy, made anew for those weights alone that come by name.
    """
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)


def _bytes_a_token(folder: Path, width: int) -> int:
    """Bytes of the keys and values of one token.

    Args:
        folder: of the model.
        width: bytes of a number.
    """
    config = AutoConfig.from_pretrained(folder).get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * key_heads * head_dim * width


def _reason(error: Exception) -> str:
    """What vLLM said, out of the lines that it is wrapped in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("Value error, ")]
    return (said or lines or [repr(error)])[0].removeprefix("Value error, ")
