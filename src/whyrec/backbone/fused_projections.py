"""One matrix product where a Llama block has several over the same input, for training.

    [q k v] = x [W_q W_k W_v]ᵀ        [g u] = x [W_g W_u]ᵀ

The input is read once instead of three times or twice, and its gradient is one product instead of
a sum of several. Weights stay the parameters that they are, and are laid side by side in the cast
to bf16, which copies them anyway. Rotation happens inside of `short_attention`, so that rotated
queries and keys are never written.

A fused module does what it did before outside of training, and attention in every call that is not
over packed rows.

Dimensions: T tokens, D hidden size, N = H + 2 J heads of E elements, F inner size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from whyrec.backbone.short_attention import is_supported, short_attention


class FusedAttention(LlamaAttention):
    """Queries, keys and values by one product, rotated where they are attended with."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        **settings: object,
    ) -> tuple[Tensor, Tensor | None]:
        bounds_2T = settings.get("document_bounds")
        if not isinstance(bounds_2T, Tensor) or position_embeddings is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **settings
            )
        heads_1TX = _product(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        heads_TNE = heads_1TX.view(heads_1TX.shape[1], -1, self.head_dim)
        longest = settings["longest"]
        assert isinstance(longest, int)
        if not is_supported(heads_TNE, longest=longest):
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **settings
            )
        cos_1TE, sin_1TE = position_embeddings
        out_THE = short_attention(
            heads_TNE,
            bounds_2T,
            kv_heads=self.config.num_key_value_heads,
            scale=self.scaling,
            cos_TE=cos_1TE[0],
            sin_TE=sin_1TE[0],
        )
        return self.o_proj(out_THE.flatten(1)[None]), None


class FusedMLP(LlamaMLP):
    """Gate and up by one product."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # a beam's few tokens would not pay for weights laid side by side
            return super().forward(x)
        gate_1TF, up_1TF = _product(x, self.gate_proj, self.up_proj).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate_1TF) * up_1TF)


def _product(input_1TD: Tensor, *layers: nn.Linear) -> Tensor:
    return F.linear(input_1TD, torch.cat([layer.weight for layer in layers]))


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    LlamaAttention: FusedAttention,
    LlamaMLP: FusedMLP,
}


def fuse_projections(model: PreTrainedModel) -> None:
    """Fuse a model's blocks in place, where they are Llama's, plain and without biases.

    Modules change their class and nothing else: parameters, their names and saved files stay.
    """
    for module in model.modules():
        fused = _FUSED.get(type(module))
        if fused is not None and all(
            type(layer) is nn.Linear and layer.bias is None
            for layer in module.children()
            if hasattr(layer, "weight")
        ):
            module.__class__ = fused
