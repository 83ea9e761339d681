"""Run a Hugging Face decoder over a prompt and then over a tree of beam tokens.

Beams of one user share the prompt's keys and values, which are computed once and never copied. Each
beam token is written into its own slot behind them, once, and never moved: when beams are
re-parented only a boolean mask changes, which says whose ancestors a token may see (tree attention,
Miao et al. 2024, SpecInfer, arXiv 2305.09781). The query heads of a key/value head are folded into
the query axis, so that grouped keys are not expanded either.

The model runs its own code: Transformers' `AttentionInterface` lets us put our attention in place
of its own for the length of one call; `whyrec.serve.tree_model` does the same to vLLM's models. On
a GPU a plain Llama or Qwen runs by `whyrec.backbone.lean_blocks`.
Dimensions: U users, T new tokens a user, P prompt slots, S slots in use, H query heads, J key/value
heads, E head size, D hidden size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel

from whyrec.backbone import lean_blocks
from whyrec.backbone.packed_attention import attention_of

_NAME = "whyrec_tree"
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class KeyValueStore:
    """Keys and values of U prompts and of the beam tokens behind them, for every layer.

    Attributes:
        lengths_U: prompt lengths; prompts are padded on the right.
        prompt_slots: P, the longest prompt.
        capacity: slots a user in all: P and the tree's.
        used: slots in use; the next tokens are written from here on.
        align: attention is over a multiple of so many slots, as some kernels want it; the slots
            that are too many hold zeros and no mask shows them.
        keys, values: by layer, [U, J, capacity, E].
        mask_UTS: what the tokens of the running call may see; None for whole prompts. Set it with
            `look`.
    """

    lengths_U: Tensor
    prompt_slots: int
    capacity: int
    used: int = 0
    align: int = 1
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    mask_UTS: Tensor | None = None
    _bias_U1RS: Tensor | None = None

    def look(self, mask_UTS: Tensor | None) -> None:
        """Say what the tokens of the next call may see."""
        self.mask_UTS, self._bias_U1RS = mask_UTS, None

    def bias(self, groups: int, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores, [U, 1, G·T, S]: made once a call, not once a layer.

        Args:
            groups: G, the query heads of one key/value head.
            dtype: of the queries.
        """
        assert self.mask_UTS is not None
        if self._bias_U1RS is None:
            hidden_UTS = torch.zeros_like(self.mask_UTS, dtype=dtype)
            hidden_UTS.masked_fill_(~self.mask_UTS, -torch.inf)
            self._bias_U1RS = hidden_UTS.repeat(1, groups, 1)[:, None]
        return self._bias_U1RS

    def forget_tree(self) -> None:
        """Drop all beam tokens, so that another beam can start from the same prompts."""
        self.used = self.prompt_slots

    def in_sight(self, num_tokens: int) -> int:
        """S: the slots that attention is over when so many tokens more have been written."""
        return -(-(self.used + num_tokens) // self.align) * self.align

    def start_with(self, prefix: "KeyValueStore") -> None:
        """Take over what one prompt's store holds as the beginning of every prompt."""
        for layer, key_1JSE in prefix.keys.items():
            shape = (len(self.lengths_U), -1, -1, -1)
            self.write(layer, key_1JSE.expand(shape), prefix.values[layer].expand(shape))
        self.used = prefix.used

    def write(self, layer: int, key_UJTE: Tensor, value_UJTE: Tensor) -> tuple[Tensor, Tensor]:
        """Put new tokens into the next slots of a layer; return all slots in sight of them."""
        num_tokens = key_UJTE.shape[2]
        self.allocate(layer, like_UJTE=key_UJTE)
        stop, seen = self.used + num_tokens, self.in_sight(num_tokens)
        assert seen <= self.capacity, f"{seen} slots needed, {self.capacity} there"
        self.keys[layer][:, :, self.used : stop] = key_UJTE
        self.values[layer][:, :, self.used : stop] = value_UJTE
        return self.keys[layer][:, :, :seen], self.values[layer][:, :, :seen]

    def allocate(self, layer: int, *, like_UJTE: Tensor) -> None:
        """Make room for a layer whose heads are like these, if there is none yet."""
        if layer in self.keys:
            return
        _, num_heads, _, size = like_UJTE.shape
        shape = (len(self.lengths_U), num_heads, self.capacity, size)
        # Zeros: a slot that nobody may look at must still hold a number.
        self.keys[layer] = like_UJTE.new_zeros(shape)
        self.values[layer] = like_UJTE.new_zeros(shape)


def attend(
    store: KeyValueStore,
    layer: int,
    query_UHTE: Tensor,
    key_UJTE: Tensor,
    value_UJTE: Tensor,
    *,
    scaling: float | None = None,
) -> Tensor:
    """Write new tokens' keys and values into a layer of the store and attend; [U, T, J, G, E].

    G are the query heads of a key/value head. Heads may lie anywhere in memory, as long as the
    numbers of one head are neighbours.
    """
    keys_UJSE, values_UJSE = store.write(layer, key_UJTE, value_UJTE)
    num_users, num_heads, num_tokens, size = query_UHTE.shape
    num_kv_heads = key_UJTE.shape[1]
    groups = num_heads // num_kv_heads
    with _kernels(query_UHTE.device):
        if store.mask_UTS is None:
            # Padding is on the right, where causal attention never looks from a real token.
            output_UHTE = F.scaled_dot_product_attention(
                query_UHTE,
                key_UJTE,
                value_UJTE,
                is_causal=True,
                scale=scaling,
                enable_gqa=groups > 1,
            )
            return output_UHTE.transpose(1, 2).unflatten(2, (num_kv_heads, groups))
        folded = query_UHTE.reshape(num_users, num_kv_heads, groups * num_tokens, size)
        output_UJRE = F.scaled_dot_product_attention(
            folded,
            keys_UJSE,
            values_UJSE,
            attn_mask=store.bias(groups, query_UHTE.dtype),
            scale=scaling,
        )
    return output_UJRE.unflatten(2, (groups, num_tokens)).permute(0, 3, 1, 2, 4)


def _kernels(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU PyTorch's own kernels: cuDNN's would be planned anew for each shape."""
    return sdpa_kernel(_BACKENDS) if device.type == "cuda" else nullcontext()


def tree_attention(
    module: nn.Module,
    query_UHTE: Tensor,
    key_UJTE: Tensor,
    value_UJTE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    tree_store: KeyValueStore,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over a `KeyValueStore`; returns [U, T, H, E], None."""
    assert isinstance(module.layer_idx, int)
    output_UTJGE = attend(
        tree_store, module.layer_idx, query_UHTE, key_UJTE, value_UJTE, scaling=scaling
    )
    return output_UTJGE.flatten(2, 3).contiguous(), None


AttentionInterface.register(_NAME, tree_attention)


class TreeModel(Protocol):
    """A language model that runs over trees; `HuggingFaceTree`, or vLLM's in `whyrec.serve`."""

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        ...

    def head_rows(self, first: int, stop: int) -> Tensor:
        """Rows of the language-model head for the tokens first .. stop - 1: [K, D]."""
        ...

    def run(
        self,
        ids_UT: Tensor,
        *,
        positions_UT: Tensor,
        store: KeyValueStore,
        mask_UTS: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of new tokens [U, T, D], as the function `run` below."""
        ...


class HuggingFaceTree:
    """A Hugging Face causal LM as a `TreeModel`.

    Raises:
        ValueError: when its attention cannot run on trees.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_supported(model)
        self._model = model

    @property
    def device(self) -> torch.device:
        return self._model.get_input_embeddings().weight.device

    def head_rows(self, first: int, stop: int) -> Tensor:
        return self._model.get_output_embeddings().weight[first:stop]

    def run(
        self,
        ids_UT: Tensor,
        *,
        positions_UT: Tensor,
        store: KeyValueStore,
        mask_UTS: Tensor | None = None,
    ) -> Tensor:
        return run(self._model, ids_UT, positions_UT=positions_UT, store=store, mask_UTS=mask_UTS)


def check_supported(model: PreTrainedModel) -> None:
    """Refuse, before any work, a model whose attention is more than plain softmax attention.

    Raises:
        ValueError: for sliding windows, soft-capped scores and hybrid layers.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    reason = None
    if not model._supports_attention_backend:
        reason = "its attention cannot be replaced (no support for AttentionInterface)"
    elif kinds != {"full_attention"}:
        reason = f"it has layers of type {', '.join(sorted(kinds - {'full_attention'}))}"
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        reason = "it uses a sliding attention window"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "it soft-caps its attention scores"
    if reason:
        raise ValueError(
            f"{type(model).__name__} cannot be used for constrained beams: {reason}; choose a "
            "backbone with plain full attention, such as Llama, SmolLM2, Qwen2.5 or Qwen3"
        )


def run(
    model: PreTrainedModel,
    ids_UT: Tensor,
    *,
    positions_UT: Tensor,
    store: KeyValueStore,
    mask_UTS: Tensor | None = None,
) -> Tensor:
    """Last hidden states [U, T, D] of new tokens, whose keys and values go into `store`.

    Args:
        model: a causal LM (`AutoModelForCausalLM`).
        ids_UT: token ids.
        positions_UT: their positions in the sequence.
        store: slots for T more tokens must be free.
        mask_UTS: True where a token may look, over all slots in use after this call; one for
            all users or one a user. None for whole right-padded prompts.
    """
    store.look(mask_UTS)
    if ids_UT.is_cuda and not torch.is_grad_enabled() and lean_blocks.is_lean(model):
        hidden_UTD = run_lean(model, ids_UT, positions_UT=positions_UT, store=store)
    else:
        with attention_of(model, _NAME):
            hidden_UTD = model.base_model(
                input_ids=ids_UT, position_ids=positions_UT, use_cache=False, tree_store=store
            ).last_hidden_state
    store.used += ids_UT.shape[1]
    return hidden_UTD


def run_lean(
    model: PreTrainedModel, ids_UT: Tensor, *, positions_UT: Tensor, store: KeyValueStore
) -> Tensor:
    """Last hidden states by `lean_blocks`, of tokens that see what `store.look` was told."""

    def attend_store(
        layer: int, query_UHTE: Tensor, key_UJTE: Tensor, value_UJTE: Tensor, scale: float
    ) -> Tensor:
        return attend(store, layer, query_UHTE, key_UJTE, value_UJTE, scaling=scale)

    return lean_blocks.last_hidden(model, ids_UT, positions_UT=positions_UT, attend=attend_store)
