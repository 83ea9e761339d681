"""Which weights hold the rows of tokens, and how the backbone's own rows stay as they are."""

from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from whyrec.backbone.lora import plain_model


def row_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that hold new rows: PEFT's, or the embedding and the head themselves."""
    plain = plain_model(model)
    whole = {plain.get_input_embeddings().weight, plain.get_output_embeddings().weight}
    for name, parameter in model.named_parameters():
        is_peft_row = "trainable_tokens_delta" in name
        if is_peft_row or (not isinstance(model, PeftModel) and parameter in whole):
            yield name, parameter


class KeepRows(TrainerCallback):
    """Old rows of embedding and head get no gradient, while a training lasts.

    Whatever decays weights must leave these parameters alone. With PEFT there is nothing to do:
    its parameters hold the new rows and no others.

    Args:
        token_ids: ids of the new rows.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = list(token_ids)
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, *_: object, model: nn.Module, **__: object) -> None:
        # Here and not before: FSDP2 makes parameters, and so their hooks, anew.
        if isinstance(model, PeftModel):
            return
        for _name, parameter in row_parameters(model):
            new_V1: Tensor = torch.zeros(len(parameter), 1, device=parameter.device)
            new_V1[self.token_ids] = 1.0
            if isinstance(parameter, DTensor):
                new_V1 = distribute_tensor(new_V1, parameter.device_mesh, parameter.placements)

            def mask(p: Tensor, new_V1: Tensor = new_V1) -> None:
                assert p.grad is not None
                p.grad.mul_(new_V1)

            self._hooks.append(parameter.register_post_accumulate_grad_hook(mask))

    def on_train_end(self, *_: object, **__: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
