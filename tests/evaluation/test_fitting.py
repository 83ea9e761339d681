"""The training loop of the small baselines: windows, the schedule, stopping early."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from whyrec.catalog.dataset import Dataset, Item
from whyrec.evaluation import fitting, sasrec, tiger


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_event_but_the_first_is_a_target_once_an_epoch(
    lengths: list[int], max_length: int, batch_size: int, seed: int
) -> None:
    starts = np.cumsum([0, *lengths])
    sequences = [np.arange(a, a + n) for a, n in zip(starts, lengths, strict=False)]
    batches = fitting.window_batches(
        sequences, np.random.default_rng(seed), max_length=max_length, batch_size=batch_size
    )
    targets, before = [], []
    for items_BW, targets_P in batches:
        assert len(items_BW) <= batch_size and items_BW.shape[1] <= max_length + 1
        targets += items_BW[:, 1:].flatten()[targets_P].tolist()
        before += items_BW[:, :-1].flatten()[targets_P].tolist()
    expected = np.concatenate([sequence[1:] for sequence in sequences])
    assert sorted(targets) == expected.tolist()
    assert [target - 1 for target in targets] == before  # each is predicted from its neighbour


def test_windows_are_cut_elsewhere_each_epoch_and_alike_for_one_seed() -> None:
    def epochs(seed: int) -> Iterator[list]:
        rng = np.random.default_rng(seed)
        for _ in range(2):
            batches = fitting.window_batches([np.arange(40)], rng, max_length=8, batch_size=2)
            yield [batch.items_BW.tolist() for batch in batches]

    first, second = epochs(0)
    assert first != second and [first, second] == list(epochs(0))


class Scripted(nn.Module):
    """One weight, which counts the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.epoch = 0


def run(figures: list[float], **settings: object) -> tuple[fitting.Trained, list[float]]:
    """Train a scripted model whose validation gives these figures; the rates of its steps too."""
    recipe = fitting.FitRecipe(epochs=len(figures), **settings)  # type: ignore[arg-type]
    weights = []

    def loss(model: Scripted, batch: fitting.WindowBatch) -> Tensor:
        assert model.training
        weights.append(float(model.weight))
        return -model.weight.sum()

    def validate(model: Scripted) -> dict[str, float]:
        assert not model.training
        model.epoch += 1
        return {"excluded/N@10": figures[model.epoch - 1], "kept/N@10": -model.epoch}

    batch = fitting.WindowBatch(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1).long())
    trained = fitting.fit(
        Scripted,
        recipe,
        label="scripted",
        device="cpu",
        batches=lambda rng: [batch] * 2,
        loss=loss,
        validate=validate,
    )
    return trained, weights


def test_the_best_epochs_weights_are_kept_and_patience_ends_it() -> None:
    trained, weights = run([0.1, 0.3, 0.2, 0.25, 0.9], patience=2)
    assert trained.epoch == 2 and trained.figures["excluded/N@10"] == 0.3
    assert len(weights) == 8  # four epochs of two steps; the fifth is never reached
    assert float(trained.model.weight) == pytest.approx(weights[4])
    assert not trained.model.training
    kept, _ = run([0.1, 0.3], exclude_history=False)
    assert kept.epoch == 1


def test_the_rate_rises_for_an_epoch_and_falls_to_a_tenth() -> None:
    _, weights = run([0.1] * 10, learning_rate=1.0, patience=10)
    rates = np.diff(weights)  # Adam moves a weight of constant gradient by the rate
    assert rates[0] == pytest.approx(0.5, rel=1e-3) and rates[1] == pytest.approx(1, rel=1e-3)
    assert (np.diff(rates[1:]) < 0).all() and 0.1 < rates[-1] < 0.15


def test_torch_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run([0.1], seed=3)
    assert torch.equal(torch.get_rng_state(), state)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values read back, sizes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
        assert not any(name in str(func) for name in forbidden), func
        bools = [a for a in args if isinstance(a, list | tuple)]
        indices = [i for a in bools for i in a if isinstance(i, Tensor)]
        assert "index" not in str(func) or all(i.dtype != torch.bool for i in indices)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sasrec", "tiger"])
def test_nothing_in_the_inner_loop_waits_for_the_device(prepared_run: Path, name: str) -> None:
    dataset = Dataset.load(prepared_run / "dataset")
    sequences, _ = fitting.training_data(dataset, name=name)
    rng = np.random.default_rng(0)
    (batch, *_) = fitting.window_batches(sequences, rng, max_length=8, batch_size=6)
    if name == "sasrec":
        model: nn.Module = sasrec.Sasrec(len(dataset.items), sasrec.SasrecRecipe(dim=8))
        loss = partial(sasrec._loss, model, batch, label_smoothing=0.1)  # type: ignore[arg-type]
    else:
        recipe = tiger.TigerRecipe(dim=16, label_smoothing=0.1)
        model = tiger.untrained(prepared_run, dataset, recipe, device="cpu")
        loss = partial(tiger.Tiger.loss, model, batch)  # type: ignore[arg-type]
    model.train()
    with NoWaiting():
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)


def test_too_little_data_is_refused(walks: Dataset) -> None:
    sequences, valid = fitting.training_data(walks, name="X")
    assert len(sequences) == len(valid) == len(walks.sequences)
    lonely = Dataset([Item("a")], ["u"], [np.zeros(1, np.int32)], [np.zeros(1, np.int8)])
    with pytest.raises(ValueError, match="X needs users with two training events and a validation"):
        fitting.training_data(lonely, name="X")
