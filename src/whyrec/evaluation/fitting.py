"""Training of the small neural baselines: one loop, stopped early on the validation N@10.

AdamW with one epoch of linear warm-up and a cosine down to a tenth of the peak. After every epoch
the validation split is ranked; the best epoch's weights are kept, and `patience` epochs without a
better one end the training. Batches hold windows of users' sequences, of like length, so that there
is little padding; a whole epoch of them goes to the device in one copy, and nothing in the inner
loop waits for it.

    trained = fit(lambda: Sasrec(num_items, recipe), recipe, label="SASRec", device="cuda",
                  batches=batches, loss=loss, validate=validate)
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from whyrec.catalog.dataset import Dataset, Examples


@dataclass(frozen=True)
class FitRecipe:
    """Settings that every small baseline has.

    Attributes:
        max_length: history items that are looked at, counted from the newest.
        learning_rate: AdamW's peak, reached after one epoch, then down a cosine to a tenth.
        weight_decay: AdamW's.
        batch_size: windows of at most `max_length` + 1 events a step.
        epochs: length of the schedule.
        patience: epochs without a better validation N@10 before training stops.
        label_smoothing: share of a target's probability that is spread over what is possible.
        exclude_history: whether validation leaves out items that the user has had.
        seed: of initial weights, dropout, windows and their order; `whyrec evaluate` takes the
            seed of the model that it measures instead.
    """

    max_length: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 128
    epochs: int = 50
    patience: int = 5
    label_smoothing: float = 0.0
    exclude_history: bool = True
    seed: int = 0

    @property
    def chosen_by(self) -> str:
        """The validation figure that epochs and settings are compared by."""
        return "excluded/N@10" if self.exclude_history else "kept/N@10"


M = TypeVar("M", bound=nn.Module)
R = TypeVar("R", bound=FitRecipe)


@dataclass(frozen=True)
class Trained(Generic[M, R]):
    """A trained model and what its best epoch reached on the validation split.

    Attributes:
        model: the weights of the best epoch, in evaluation mode.
        recipe: what it was trained by.
        figures: `R@10` and `N@10` on the validation split, as `excluded/N@10`, `kept/R@10`, ...
        epoch: the best epoch, from 1.
        seconds: of the whole training.
    """

    model: M
    recipe: R
    figures: dict[str, float]
    epoch: int
    seconds: float


class WindowBatch(NamedTuple):
    """Windows of sequences, on the device.

    Attributes:
        items_BW: item indices, oldest first, padded on the right with item 0.
        targets_P: where `items_BW[:, 1:]`, flattened, holds a real item: all but the first of each
            window are to be predicted.
    """

    items_BW: Tensor
    targets_P: Tensor


def training_data(dataset: Dataset, *, name: str) -> tuple[list[np.ndarray], Examples]:
    """Training sequences of two events or more, and the validation examples.

    Raises:
        ValueError: when there is nothing to train on or to validate with.
    """
    sequences = [sequence for sequence in dataset.training_sequences() if len(sequence) > 1]
    valid = dataset.examples("valid")
    if not sequences or not len(valid):
        raise ValueError(
            f"{name} needs users with two training events and a validation split; "
            "prepare a larger log"
        )
    return sequences, valid


def fit(
    make_model: Callable[[], M],
    recipe: R,
    *,
    label: str,
    device: str,
    batches: Callable[[np.random.Generator], Sequence[WindowBatch]],
    loss: Callable[[M, WindowBatch], Tensor],
    validate: Callable[[M], dict[str, float]],
    max_seconds: float | None = None,
) -> Trained[M, R]:
    """Train a model from random weights; torch's own random state stays as it was.

    Args:
        make_model: called once the seed is set; gives the model on the device.
        recipe: its settings.
        label: of the progress bar.
        device: where the model is.
        batches: one epoch of batches, drawn from a generator.
        loss: of one batch, to be minimised.
        validate: figures of the validation split.
        max_seconds: start no further epoch after this time.
    """
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(recipe.seed)
        started = time.monotonic()
        model = make_model()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
            fused=bool(cuda),
        )
        rng = np.random.default_rng(recipe.seed)
        best_figures: dict[str, float] = {}
        best_epoch, best_weights = 0, model.state_dict()
        bar = tqdm(range(1, recipe.epochs + 1), desc=label, unit="epoch", leave=False)
        for epoch in bar:
            model.train()
            one_epoch = batches(rng)
            for step, batch in enumerate(one_epoch):
                done = epoch - 1 + (step + 1) / len(one_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * _schedule(done, recipe.epochs)
                optimizer.zero_grad(set_to_none=True)
                loss(model, batch).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
            model.eval()
            figures = validate(model)
            reached = figures[recipe.chosen_by]
            if not best_figures or reached > best_figures[recipe.chosen_by]:
                best_figures, best_epoch = figures, epoch
                best_weights = copy.deepcopy(model.state_dict())
            bar.set_postfix({"N@10": f"{reached:.4f}", "best": best_epoch})
            out_of_time = max_seconds is not None and time.monotonic() - started > max_seconds
            if out_of_time or epoch - best_epoch >= recipe.patience:
                break
        bar.close()
        model.load_state_dict(best_weights)
        seconds = time.monotonic() - started
        return Trained(model.eval(), recipe, best_figures, best_epoch, seconds)


def window_batches(
    sequences: Sequence[np.ndarray],
    rng: np.random.Generator,
    *,
    max_length: int,
    batch_size: int,
    device: str = "cpu",
) -> list[WindowBatch]:
    """One epoch: windows of at most `max_length` + 1 events, of like length within a batch.

    A long sequence is cut at a new random place every epoch, so that every event is a target with
    many different lengths of history before it. Every event but a sequence's first is a target
    exactly once.
    """
    windows = []
    for sequence in sequences:
        is_long = len(sequence) > max_length + 1
        first = int(rng.integers(1, max_length + 1)) if is_long else max_length
        starts = [0, *range(first, len(sequence) - 1, max_length)]
        ends = [*starts[1:], len(sequence) - 1]
        windows += [sequence[a : b + 1] for a, b in zip(starts, ends, strict=True)]
    order = rng.permutation(len(windows))
    pool = 32 * batch_size  # sorting within pools saves padding and leaves some chance
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda index: len(windows[index]))
        for i in range(0, len(by_length), batch_size):
            batches.append([windows[index] for index in by_length[i : i + batch_size]])
    padded = [_padded(batches[index]) for index in rng.permutation(len(batches))]
    flat = np.concatenate([array.ravel() for batch in padded for array in batch])
    parts = torch.from_numpy(flat).to(device).split([a.size for batch in padded for a in batch])
    return [
        WindowBatch(parts[2 * n].view(batch[0].shape), parts[2 * n + 1])
        for n, batch in enumerate(padded)
    ]


def pad_items(rows: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [B, longest], padded with item 0 on the right."""
    padded_BL = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for index, row in enumerate(rows):
        padded_BL[index, : len(row)] = row
    return padded_BL


def _padded(windows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    items_BW = pad_items(windows)
    lengths_B = np.array([len(window) for window in windows])
    real_BT = np.arange(1, items_BW.shape[1]) < lengths_B[:, None]
    return items_BW, np.flatnonzero(real_BT)


def _schedule(done: float, epochs: int) -> float:
    """Share of the peak learning rate after `done` epochs."""
    if done < 1:
        return done
    return 0.1 + 0.9 * 0.5 * (1 + float(np.cos(np.pi * (done - 1) / max(epochs - 1, 1))))
