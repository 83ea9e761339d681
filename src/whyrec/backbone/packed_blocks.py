"""A model's transformer blocks over packed rows, replayed as CUDA graphs in training.

A small model's step is bound by the host: SmolLM2-135M launches 30 blocks twice, 90 ms of Python
for 25 ms of work at 8,192 tokens. Rows of one shape let both passes be recorded once and replayed
with one launch each.

Dimensions: T tokens of a row, D documents, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from whyrec.backbone.packed_attention import PACKED, attention_of
from whyrec.backbone.short_attention import document_bounds

_Run = Callable[[Tensor, Tensor, Tensor], Tensor]


class PackedBlocks:
    """Input embeddings to last hidden states, each document by itself.

    Args:
        model: a causal LM; its blocks may be compiled.
        longest: no document has more tokens.
        graphs: record and replay CUDA graphs in training. Each call then overwrites what the call
            before returned, and the gradients that its backward pass gave: take an optimizer step
            in between. All rows must have one shape.
    """

    def __init__(self, model: PreTrainedModel, *, longest: int, graphs: bool = False) -> None:
        self.graphs = graphs
        self._blocks = _Blocks(model, longest)
        self._replay: _Run | None = None

    def __call__(
        self, embedded_1TH: Tensor, position_ids_1T: Tensor, document_starts_D: Tensor
    ) -> Tensor:
        inputs = embedded_1TH, position_ids_1T, document_starts_D
        if not (self.graphs and self._blocks.model.training and torch.is_grad_enabled()):
            return self._blocks(*inputs)
        if self._replay is None:
            self._replay = _record(self._blocks, *inputs)
        return self._replay(*inputs)

    def release(self) -> None:
        """Free the graphs and the activations in them."""
        self._replay = None


class _Blocks(nn.Module):
    def __init__(self, model: PreTrainedModel, longest: int) -> None:
        super().__init__()
        self.model, self.longest = model, longest

    def forward(
        self, embedded_1TH: Tensor, position_ids_1T: Tensor, document_starts_D: Tensor
    ) -> Tensor:
        with attention_of(self.model, PACKED):
            return self.model.base_model(
                inputs_embeds=embedded_1TH,
                position_ids=position_ids_1T,
                use_cache=False,
                document_starts=document_starts_D,
                longest=self.longest,
                document_bounds=document_bounds(document_starts_D, tokens=embedded_1TH.shape[1]),
            ).last_hidden_state.to(embedded_1TH.dtype)  # a norm's weights lift it to float32


def _record(
    blocks: _Blocks, embedded_1TH: Tensor, position_ids_1T: Tensor, document_starts_D: Tensor
) -> _Run:
    """Record forward and backward for inputs of these shapes; returns the replay.

    `torch.cuda.make_graphed_callables` would do, but for its ban on any CUDA call of any thread
    while it records: a data loader pins memory in a thread of its own.
    """
    position_ids_1T, document_starts_D = position_ids_1T.clone(), document_starts_D.clone()
    embedded_1TH = embedded_1TH.detach().clone().requires_grad_()
    weights = [weight for weight in blocks.parameters() if weight.requires_grad]
    device = embedded_1TH.device.type

    def forward() -> Tensor:
        # The casts of the weights belong into the graph: a cache would hold an earlier step's.
        with torch.autocast(
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        ):
            return blocks(embedded_1TH, position_ids_1T, document_starts_D)

    with _fresh_leaves(blocks, weights) as leaves:

        def backward(hidden_1TH: Tensor, gradient_1TH: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                hidden_1TH, [embedded_1TH, *leaves], gradient_1TH, allow_unused=True
            )

        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):  # kernels are compiled and chosen before the recording
                hidden_1TH = forward()
                backward(hidden_1TH, torch.zeros_like(hidden_1TH))
        del hidden_1TH
        torch.cuda.synchronize()
        forward_graph, backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward_graph, capture_error_mode="thread_local"):
            hidden_1TH = forward()
        gradient_1TH = torch.empty_like(hidden_1TH)
        with torch.cuda.graph(
            backward_graph, pool=forward_graph.pool(), capture_error_mode="thread_local"
        ):
            gradients = backward(hidden_1TH, gradient_1TH)
    hidden_1TH = hidden_1TH.detach()

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, *inputs: Tensor) -> Tensor:
            with torch.no_grad():
                embedded_1TH.copy_(inputs[0])
                position_ids_1T.copy_(inputs[1])
                document_starts_D.copy_(inputs[2])
            forward_graph.replay()
            return hidden_1TH.detach()  # autograd wants a tensor of its own each time

        @staticmethod
        @once_differentiable
        def backward(ctx: object, *wanted: Tensor) -> tuple[Tensor | None, ...]:
            gradient_1TH.copy_(wanted[0])
            backward_graph.replay()
            first, *others = (None if g is None else g.detach() for g in gradients)
            return first, None, None, *others

    # The weights are inputs too, so that autograd gives them their gradients.
    return lambda *inputs: Replay.apply(*inputs, *weights)


@contextmanager
def _fresh_leaves(blocks: nn.Module, weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters that stand in the place of `weights` for a while, in the same memory.

    To autograd a weight belongs to the stream that used it first, for as long as anything computed
    from it then is alive. An earlier loss that somebody holds would let a recording wait for a
    stream that is not recorded, which CUDA forbids.
    """
    fresh = {weight: nn.Parameter(weight.detach()) for weight in weights}
    # PyTorch's `functional_call` leaves the wrong tensor behind in a module of two names, as PEFT's
    # new rows of a tied embedding are.
    places = [
        (module._parameters, name, weight)
        for module in blocks.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight in fresh
    ]
    for parameters, name, weight in places:
        parameters[name] = fresh[weight]
    try:
        yield list(fresh.values())
    finally:
        for parameters, name, weight in places:
            parameters[name] = weight
