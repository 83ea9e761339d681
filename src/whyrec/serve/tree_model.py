"""vLLM's own model as a `TreeModel`: its weights, its kernels, our tree attention.

Every attention layer of a vLLM model looks itself up by name in the forward context of the running
call. For the length of one of our calls another object stands under that name, which attends over a
`KeyValueStore`: ordinary requests never see it, vLLM's paged cache is not touched, nothing is
patched and no weight is copied but the SID codes' rows of the head.

Dimensions: U users, T new tokens a user, S slots, H query heads, J key/value heads, E head size,
D hidden size, K codes, N = U·T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from whyrec.decode.tree_attention import KeyValueStore, attend
from whyrec.sid.vocabulary import SidVocabulary

_HEAD_ROWS = 64  # hidden units at a time, when the head is read


class VllmTree:
    """A model that vLLM has loaded, over trees.

    Args:
        model: of `worker.get_model()`.
        config: vLLM's.
        vocabulary: whose codes' rows of the head are needed.
        device: of the worker.

    Raises:
        ValueError: when the model, or how vLLM runs it, is more than plain softmax attention.
    """

    def __init__(
        self,
        model: nn.Module,
        config: VllmConfig,
        *,
        vocabulary: SidVocabulary,
        device: torch.device,
    ) -> None:
        layers = config.compilation_config.static_forward_context
        check_supported(config, model, layers)
        self._model, self._config, self._device = model, config, device
        # What vLLM compiled of the model takes no more tokens than this in one call.
        self._most_compiled = int(config.scheduler_config.max_num_batched_tokens)
        self._layers: dict[str, _TreeLayer] = {
            name: _TreeLayer(index, layer, device)
            for index, (name, layer) in enumerate(
                (name, layer) for name, layer in layers.items() if isinstance(layer, Attention)
            )
        }
        dtype = config.model_config.dtype
        assert isinstance(dtype, torch.dtype), "vLLM has put a type in place of its name by now"
        self._first = vocabulary.first
        self._codes_KD = _head_rows(
            model,
            first=vocabulary.first,
            stop=vocabulary.stop,
            hidden_size=config.model_config.get_hidden_size(),
            dtype=dtype,
            device=device,
        )

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def copied_bytes(self) -> int:
        """Weights that are held beside vLLM's own: the codes' rows of the head."""
        return self._codes_KD.nbytes

    def head_rows(self, first: int, stop: int) -> Tensor:
        return self._codes_KD[first - self._first : stop - self._first]

    def run(
        self,
        ids_UT: Tensor,
        *,
        positions_UT: Tensor,
        store: KeyValueStore,
        mask_UTS: Tensor | None = None,
    ) -> Tensor:
        num_users, num_tokens = ids_UT.shape
        store.look(mask_UTS)
        for layer in self._layers.values():
            layer.store = store
        with set_forward_context(
            None,
            self._config,
            num_tokens=ids_UT.numel(),
            slot_mapping={},
            skip_compiled=ids_UT.numel() > self._most_compiled,
        ):
            context = get_forward_context()
            context.no_compile_layers = {**context.no_compile_layers, **self._layers}
            # Compiled code was traced for int32 ids and contiguous int64 positions, and checks
            # neither: other ones give wrong beams without a word.
            hidden_ND = self._model(
                input_ids=ids_UT.flatten().int(),
                positions=positions_UT.long().contiguous().flatten(),
                intermediate_tensors=None,
            )
        store.used += num_tokens
        # Compiled code may write its next call's output over this one.
        return hidden_ND.view(num_users, num_tokens, -1).clone()


class _TreeLayer:
    """What vLLM finds in place of an attention layer: itself, its `impl` and an empty cache."""

    def __init__(self, index: int, layer: Attention, device: torch.device) -> None:
        self.index, self.scale = index, layer.impl.scale
        self.impl = self
        self.kv_cache = torch.zeros(0, dtype=layer.dtype, device=device)
        self.store: KeyValueStore | None = None

    def do_kv_cache_update(self, *_: Any) -> None:
        """The store is written where attention runs."""

    def forward(
        self,
        _layer: "_TreeLayer",
        query_NHE: Tensor,
        key_NJE: Tensor,
        value_NJE: Tensor,
        _cache: Tensor,
        _metadata: Any,
        *,
        output: Tensor,
        **_: Any,
    ) -> Tensor:
        """vLLM's attention interface; `output` is [N, H, E] and is written in place."""
        assert self.store is not None
        num_users = len(self.store.lengths_U)
        heads = (
            part.view(num_users, -1, *part.shape[1:]).transpose(1, 2)
            for part in (query_NHE, key_NJE, value_NJE)
        )
        output_UTJGE = attend(self.store, self.index, *heads, scaling=self.scale)
        output.view(output_UTJGE.shape).copy_(output_UTJGE)
        return output


def check_supported(config: VllmConfig, model: nn.Module, layers: dict[str, Any]) -> None:
    """Refuse, before any work, what our attention cannot stand in for.

    Raises:
        ValueError: with the reason and a way out.
    """
    attention = [layer for layer in layers.values() if isinstance(layer, AttentionLayerBase)]
    plain = [layer for layer in attention if isinstance(layer, Attention)]
    parallel = config.parallel_config
    cached = str(config.cache_config.cache_dtype)
    fusions = config.compilation_config.pass_config
    reasons = {
        "its attention is not plain (MLA, a state space or a hybrid of them)": (
            not plain or len(plain) < len(attention)
        ),
        "it attends in a sliding window": any(
            layer.sliding_window is not None and layer.sliding_window > 0 for layer in plain
        ),
        "it soft-caps its attention scores": any(
            getattr(layer.impl, "logits_soft_cap", None) for layer in plain
        ),
        "it has attention sinks": any(
            getattr(layer, "has_sink", False) or getattr(layer.impl, "sinks", None) is not None
            for layer in plain
        ),
        "it biases attention by distance (ALiBi)": any(
            getattr(layer.impl, "alibi_slopes", None) is not None for layer in plain
        ),
        "layers share keys and values": any(
            getattr(layer, "kv_sharing_target_layer_name", None) for layer in plain
        ),
        f"its key/value cache is quantised ({cached}); start with --kv-cache-dtype auto": (
            "fp8" in cached or "int8" in cached or "fp4" in cached
        ),
        "attention is fused with quantisation; turn fuse_attn_quant off": bool(
            getattr(fusions, "fuse_attn_quant", False)
        ),
        "a LoRA adapter is not merged; merge it and serve the merged model": (
            config.lora_config is not None
        ),
        "speculative decoding is on, for which vLLM ignores logits processors; turn it off": (
            config.speculative_config is not None
        ),
        "layers are spread over several devices; set --pipeline-parallel-size 1": (
            parallel.pipeline_parallel_size > 1
        ),
        # Of other models vLLM tells its replicas that they are alone, as they are.
        "its experts are shared by replicas, which must step together; leave "
        "--data-parallel-size out and start several servers": parallel.data_parallel_size > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{type(model).__name__} cannot serve constrained beams: {reason}")


@torch.no_grad()
def _head_rows(
    model: Any,
    *,
    first: int,
    stop: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Rows of the language-model head, read by asking it for the logits of unit vectors: [K, D].

    So they are right whatever the head's storage: packed, quantised, split over devices.
    """
    silence_1V = model.compute_logits(torch.zeros(1, hidden_size, dtype=dtype, device=device))
    if silence_1V is None:
        raise ValueError("this rank sees no logits; serve with one device, or with CUDA")
    if bool(silence_1V.any()):
        raise ValueError(f"{type(model).__name__} cannot serve constrained beams: biased head")
    if getattr(getattr(model, "logits_processor", None), "soft_cap", None):
        raise ValueError(f"{type(model).__name__} cannot serve constrained beams: capped logits")
    columns = []
    for start in range(0, hidden_size, _HEAD_ROWS):
        units = torch.arange(start, min(start + _HEAD_ROWS, hidden_size), device=device)
        units_DD = torch.zeros(len(units), hidden_size, dtype=dtype, device=device)
        units_DD[torch.arange(len(units), device=device), units] = 1
        logits_DV = model.compute_logits(units_DD)
        columns.append(logits_DV[:, first:stop].to(dtype))
    return torch.cat(columns).T.contiguous()
