"""Averages of weights: along training, and between its end and its start.

Along training, an average ranks better than any single step of it:

    average ← decay · average + (1 - decay) · weights          after every optimizer step

(exponential moving average; Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407).
Training itself goes on from the weights; validation and what is kept at the end are the average's.
Each checkpoint holds both, so that a resumed run is the very same run.

Between its end and its start, what is kept of the task is nearly all, and of what was known before
much more than at the end (WiSE-FT; Wortsman et al. 2022, arXiv 2109.01903):

    kept = trained + share · (backbone - trained)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

AVERAGE_FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Keeps the average of the parameters that train.

    Args:
        model: whose parameters they are; wrappers around it share them.
        decay: of the average, per step. Early on less is kept, so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self._weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._average: dict[str, Tensor] = {}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: object,
    ) -> None:
        """Move the average towards the weights."""
        if not self._average:
            self._average = {n: p.detach().clone() for n, p in self._weights.items()}
        kept = min(self.decay, state.global_step / (state.global_step + 10))
        now = [weight.detach() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self._average.values()), now, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average's weights for a while; before the first step its own."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint's folder."""
        tensors = {name: tensor.cpu() for name, tensor in self._average.items()}
        save_file(tensors, checkpoint / AVERAGE_FILE)

    def resume(self, checkpoint: Path) -> None:
        """Go on from the average of a checkpoint.

        Raises:
            ValueError: when the checkpoint was made without one.
        """
        path = checkpoint / AVERAGE_FILE
        if not path.exists():
            raise ValueError(
                f"{checkpoint} was trained without averaging; set average: 0, or start with --force"
            )
        saved = load_file(path)
        self._average = {n: saved[n].to(p.device, p.dtype) for n, p in self._weights.items()}

    @torch.no_grad()
    def adopt(self) -> None:
        """Give the model the average's weights for good."""
        for name, tensor in self._average.items():
            self._weights[name].copy_(tensor)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap values in place: CUDA graphs hold the addresses of the weights."""
        for name, tensor in self._average.items():
            weight = self._weights[name]
            before = weight.detach().clone()
            weight.copy_(tensor)
            tensor.copy_(before)


class Backbone:
    """The weights that a model has now, for it to go back towards them later.

    Args:
        model: a causal LM before its training.
        new_tokens: tokens that it did not know; their rows stay as they are trained.
    """

    def __init__(self, model: PreTrainedModel, *, new_tokens: Sequence[int]) -> None:
        self._new_tokens = list(new_tokens)
        self._before = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()}

    @torch.no_grad()
    def draw_back(self, model: PreTrainedModel, *, share: float) -> None:
        """Move the model's weights towards those, in place: by nothing for 0, all the way for 1."""
        tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        for name, weight in model.named_parameters():
            is_table = any(weight is table for table in tables)
            new_XD = weight[self._new_tokens].clone() if is_table else None
            weight.lerp_(self._before[name].to(weight), share)
            if new_XD is not None:
                weight[self._new_tokens] = new_XD
