"""A Llama's blocks in few kernels, for inference on a GPU.

Transformers' blocks are written to be read: a norm is eight kernels, a rotation ten, and each reads
and writes every token in the GPU's memory. For SmolLM2-135M over 65,536 tokens that is twice the
time of the matrix products; over the few tokens of a beam the launches themselves are what takes
long. Here a block is

    [q k v] = norm(x) [W_q W_k W_v]ᵀ       rotated in place
    x      += attend(q, k, v) W_oᵀ         added by the matrix product itself
    [g u]   = norm(x) [W_g W_u]ᵀ
    x      += (SiLU(g) · u) W_dᵀ

with a kernel for each norm, the rotation and the gate. Modules are only read: nothing of the model
changes, and weights that are laid side by side are forgotten after each product.

Dimensions: U users, T new tokens a user, D hidden size, H query heads, J key/value heads,
N = H + 2 J heads of E elements, F inner size, X any.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from whyrec.backbone.fused_projections import FusedAttention, FusedMLP

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # PyTorch's CUDA builds bring it
_GATE_BLOCK = 1024

# Of these classes and no others we know what they compute. A LoRA layer, a quantised one or one
# that FSDP has sharded is of another class.
_KNOWN = {
    nn.Embedding,
    nn.Linear,
    nn.ModuleList,
    SiLUActivation,
    FusedAttention,
    FusedMLP,
    *(llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP),
    *(llama.LlamaRMSNorm, llama.LlamaRotaryEmbedding),
    *(qwen2.Qwen2Model, qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP),
    *(qwen2.Qwen2RMSNorm, qwen2.Qwen2RotaryEmbedding),
    *(qwen3.Qwen3Model, qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention, qwen3.Qwen3MLP),
    *(qwen3.Qwen3RMSNorm, qwen3.Qwen3RotaryEmbedding),
}

# Layer, queries [U, H, T, E], keys and values [U, J, T, E], scale → [U, T, J, H/J, E].
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def is_lean(model: PreTrainedModel) -> bool:
    """Whether `last_hidden` computes what the model's own forward does: nobody changed a module."""
    return all(
        type(module) in _KNOWN
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        for module in model.base_model.modules()
    )


def last_hidden(
    model: PreTrainedModel, ids_UT: Tensor, *, positions_UT: Tensor, attend: Attend
) -> Tensor:
    """Last hidden states [U, T, D], without gradients.

    Args:
        model: a causal LM that `is_lean`.
        ids_UT: token ids.
        positions_UT: their positions.
        attend: attention between these tokens and whatever it knows besides.
    """
    assert not torch.is_grad_enabled(), "products are added in place"
    base: Any = model.base_model
    hidden_UTD = base.embed_tokens(ids_UT)
    cos_UTE, sin_UTE = base.rotary_emb(hidden_UTD, position_ids=positions_UT)
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        output_UTJGE = attend(
            attention.layer_idx,
            *_heads(attention, _normed(hidden_UTD, layer.input_layernorm), cos_UTE, sin_UTE),
            attention.scaling,
        )
        hidden_UTD = _add_product(hidden_UTD, output_UTJGE.flatten(2), attention.o_proj)
        normed_UTD = _normed(hidden_UTD, layer.post_attention_layernorm)
        gated_UTF = _gated(_products(normed_UTD, mlp.gate_proj, mlp.up_proj))
        hidden_UTD = _add_product(hidden_UTD, gated_UTF, mlp.down_proj)
    return _normed(hidden_UTD, base.norm)


def _heads(
    attention: Any, normed_UTD: Tensor, cos_UTE: Tensor, sin_UTE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [U, H, T, E], rotated keys and values [U, J, T, E]."""
    kv_heads = attention.config.num_key_value_heads
    heads_UTX = _products(normed_UTD, attention.q_proj, attention.k_proj, attention.v_proj)
    heads_UTNE = heads_UTX.unflatten(-1, (-1, attention.head_dim))
    rotated = heads_UTNE.shape[2] - kv_heads
    turned, value_UTJE = heads_UTNE.split((rotated, kv_heads), dim=2)
    query_UTHE, key_UTJE = turned.split((rotated - kv_heads, kv_heads), dim=2)
    if hasattr(attention, "q_norm"):  # Qwen3 norms each head
        query_UTHE = _normed(query_UTHE, attention.q_norm)
        key_UTJE = _normed(key_UTJE, attention.k_norm)
        _rotate(query_UTHE, cos_UTE, sin_UTE)
        _rotate(key_UTJE, cos_UTE, sin_UTE)
    else:
        _rotate(turned, cos_UTE, sin_UTE)
    return query_UTHE.transpose(1, 2), key_UTJE.transpose(1, 2), value_UTJE.transpose(1, 2)


def _products(input_UTD: Tensor, *layers: nn.Linear) -> Tensor:
    """What several layers make of one input, side by side."""
    num_tokens = input_UTD.shape[:-1].numel()
    if num_tokens < input_UTD.shape[-1]:  # a beam's outputs are smaller than the weights
        return torch.cat([layer(input_UTD) for layer in layers], dim=-1)
    weight_XD = torch.cat([layer.weight for layer in layers])
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    return F.linear(input_UTD, weight_XD, torch.cat(biases) if biases else None)


def _add_product(hidden_UTD: Tensor, input_UTX: Tensor, layer: nn.Linear) -> Tensor:
    """Hidden states and what a layer makes of its input, in place of the hidden states."""
    # Under autocast the hidden states are float32 and the rest is not.
    if layer.bias is None and hidden_UTD.dtype == input_UTX.dtype == layer.weight.dtype:
        hidden_UTD.flatten(0, 1).addmm_(input_UTX.flatten(0, 1), layer.weight.T)
        return hidden_UTD
    return hidden_UTD.add_(layer(input_UTX))


def _normed(hidden_X: Tensor, norm: Any) -> Tensor:
    weight = norm.weight
    return F.rms_norm(hidden_X, weight.shape, weight, norm.variance_epsilon)


def _rotate(heads_UTME: Tensor, cos_UTE: Tensor, sin_UTE: Tensor) -> None:
    """Rotate heads to their tokens' positions, in place."""
    half = heads_UTME.shape[-1] // 2
    if not (heads_UTME.is_cuda and _HAS_TRITON):
        low, high = heads_UTME[..., :half], heads_UTME[..., half:]
        cos, sin = (part[:, :, None, :half].to(low.dtype) for part in (cos_UTE, sin_UTE))
        turned_low = low * cos - high * sin
        high.mul_(cos).addcmul_(low, sin)
        low.copy_(turned_low)
        return
    launch_rotation(heads_UTME, cos_UTE, sin_UTE)


def launch_rotation(heads_UTME: Tensor, cos_UTE: Tensor, sin_UTE: Tensor) -> None:
    """The rotation by a kernel of its own; heads of one token are neighbours in memory."""
    import triton

    from whyrec.backbone.lean_kernels import rotate_kernel

    num_users, num_tokens, num_heads, size = heads_UTME.shape
    user_stride, token_stride, *within = heads_UTME.stride()
    assert within == [size, 1] and user_stride == num_tokens * token_stride
    rotate_kernel[(num_users * num_tokens,)](
        heads_UTME,
        cos_UTE.contiguous(),
        sin_UTE.contiguous(),
        token_stride,
        M=num_heads,
        M_ROOM=triton.next_power_of_2(num_heads),
        HALF=size // 2,
        HALF_ROOM=triton.next_power_of_2(size // 2),
        num_warps=2,
    )


def _gated(both_UTF: Tensor) -> Tensor:
    """SiLU(gate) · up; the gate's half comes first."""
    if both_UTF.is_cuda and _HAS_TRITON:
        return launch_gate(both_UTF)
    gate_UTF, up_UTF = both_UTF.chunk(2, dim=-1)
    return F.silu(gate_UTF).mul_(up_UTF)


def launch_gate(both_UTF: Tensor) -> Tensor:
    """The gate by a kernel of its own."""
    from whyrec.backbone.lean_kernels import gate_kernel

    *shape, both = both_UTF.shape
    gated_UTF = both_UTF.new_empty(*shape, both // 2)
    grid = both_UTF.shape[:-1].numel(), -(-(both // 2) // _GATE_BLOCK)
    gate_kernel[grid](both_UTF.contiguous(), gated_UTF, both // 2, BLOCK=_GATE_BLOCK)
    return gated_UTF
