"""A second thing that a model's own `forward` can be asked for.

What is computed inside of `forward` is seen by the hooks of DDP and FSDP, which gather parameters
around it, and by PEFT's wrapper.
"""

import types
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel


def add_forward(model: PreTrainedModel, flag: str, function: Callable[..., object]) -> None:
    """Make `model(…, FLAG=True)` answer with `function(model, input_ids, …)`, in place."""
    plain_forward = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        *arguments: object,
        **settings: object,
    ) -> object:
        if not settings.pop(flag, False):
            return plain_forward(input_ids, *arguments, **settings)
        return function(self, input_ids, **settings)

    model.forward = types.MethodType(forward, model)
