"""SASRec with full-softmax cross-entropy: the neural baseline, tuned to be hard to beat.

A causal transformer over the history's items (Kang & McAuley, ICDM 2018), whose every position
predicts the next item with cross-entropy over the *whole* catalogue instead of sampled negatives;
so trained it overtakes BERT4Rec (Klenitskiy & Vasilev, RecSys 2023: "Turning Dross Into Gold
Loss"). Pre-norm blocks, item embeddings tied with the output, learned positions. Training stops
early on the validation split's N@10 and keeps the best epoch.

    recipe = load_recipe(SasrecRecipe, Path("recipes/ml-100k/sasrec.yaml"))
    trained = train(dataset, recipe)
    ranked_EK = rank(trained.model.score, dataset.examples("test"), exclude_history=True)

To tune, every combination of a grid on the validation split:

    python -m whyrec.evaluation.sasrec runs/beauty --grid "{dropout: [0.2, 0.5], dim: [64, 128]}"
"""

import argparse
import copy
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from whyrec.catalog.dataset import Dataset, Examples
from whyrec.recipe import load_recipe


@dataclass(frozen=True)
class SasrecRecipe:
    """Settings of one training.

    Attributes:
        dim: width of the item embeddings and of the transformer.
        layers: transformer blocks.
        heads: attention heads; they divide `dim`.
        dropout: on the input embeddings and on every block's two outputs.
        max_length: history items that are looked at, counted from the newest.
        learning_rate: AdamW's peak, reached after one epoch, then down a cosine to a tenth.
        batch_size: windows of at most `max_length` events a step.
        epochs: length of the schedule.
        patience: epochs without a better validation N@10 before training stops.
        label_smoothing: share of the target's probability that is spread over the catalogue.
        weight_decay: AdamW's.
        exclude_history: whether validation leaves out items that the user has had.
        seed: of initial weights, dropout, windows and their order.
    """

    dim: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3
    max_length: int = 50
    learning_rate: float = 1e-3
    batch_size: int = 128
    epochs: int = 50
    patience: int = 5
    label_smoothing: float = 0.0
    weight_decay: float = 0.0
    exclude_history: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A trained model and what its best epoch reached on the validation split.

    Attributes:
        model: the weights of the best epoch, in evaluation mode.
        recipe: what it was trained by.
        figures: `R@10` and `N@10` on the validation split, as `excluded/N@10`, `kept/R@10`, ...
        epoch: the best epoch, from 1.
        seconds: of the whole training.
    """

    model: "Sasrec"
    recipe: SasrecRecipe
    figures: dict[str, float]
    epoch: int
    seconds: float


class Sasrec(nn.Module):
    """The model: item indices to scores over all items."""

    def __init__(self, num_items: int, recipe: SasrecRecipe) -> None:
        super().__init__()
        if recipe.dim % recipe.heads:
            raise ValueError(f"dim {recipe.dim} must be a multiple of heads {recipe.heads}")
        self.max_length = recipe.max_length
        self.items = nn.Embedding(num_items, recipe.dim)
        self.positions = nn.Embedding(recipe.max_length, recipe.dim)
        self.dropout = nn.Dropout(recipe.dropout)
        self.blocks = nn.ModuleList(_Block(recipe) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, items_BL: Tensor) -> Tensor:
        """Hidden states_BLD. Rows shorter than L are padded on the right, with any item: causal
        attention never looks there, so no mask is needed."""
        positions_L = torch.arange(items_BL.shape[1], device=items_BL.device)
        states_BLD = self.dropout(self.items(items_BL) + self.positions(positions_L))
        for block in self.blocks:
            states_BLD = block(states_BLD)
        return self.norm(states_BLD)

    @torch.inference_mode()
    def next_logits(self, histories: Sequence[np.ndarray]) -> Tensor:
        """logits_BN of the item that follows each history, which may not be empty."""
        recent = [history[-self.max_length :] for history in histories]
        lengths_B = torch.tensor([len(history) for history in recent])
        assert bool((lengths_B > 0).all()), "an empty history has no next item"
        device = self.items.weight.device
        states_BLD = self(_pad(recent).to(device))
        last_BD = states_BLD[torch.arange(len(recent)), lengths_B.to(device) - 1]
        return last_BD @ self.items.weight.T

    def score(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """scores_BN for `baselines.rank`."""
        return self.next_logits(histories).float().cpu().numpy()


class _Block(nn.Module):
    """Pre-norm causal attention and a feed-forward layer of the same width, as in the paper."""

    def __init__(self, recipe: SasrecRecipe) -> None:
        super().__init__()
        self.heads, self.drop = recipe.heads, recipe.dropout
        self.attention_norm = nn.LayerNorm(recipe.dim)
        self.query_key_value = nn.Linear(recipe.dim, 3 * recipe.dim)
        self.attention_out = nn.Linear(recipe.dim, recipe.dim)
        self.feed_norm = nn.LayerNorm(recipe.dim)
        self.feed_in = nn.Linear(recipe.dim, recipe.dim)
        self.feed_out = nn.Linear(recipe.dim, recipe.dim)

    def forward(self, states_BLD: Tensor) -> Tensor:
        mixed_BLD = self._attend(self.attention_norm(states_BLD))
        states_BLD = states_BLD + F.dropout(mixed_BLD, self.drop, self.training)
        fed_BLD = self.feed_out(F.gelu(self.feed_in(self.feed_norm(states_BLD))))
        return states_BLD + F.dropout(fed_BLD, self.drop, self.training)

    def _attend(self, states_BLD: Tensor) -> Tensor:
        batch, length, dim = states_BLD.shape
        joint = self.query_key_value(states_BLD).view(batch, length, 3, self.heads, -1)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, dim))


def train(
    dataset: Dataset,
    recipe: SasrecRecipe,
    *,
    device: str | None = None,
    max_seconds: float | None = None,
) -> Trained:
    """Train on the training events and keep the epoch with the best validation N@10.

    Args:
        dataset: the validation split must hold examples.
        recipe: see `SasrecRecipe`.
        device: by default the GPU if there is one.
        max_seconds: start no further epoch after this time.

    Raises:
        ValueError: when there is nothing to train on or to validate with.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sequences = [sequence for sequence in dataset.training_sequences() if len(sequence) > 1]
    valid = dataset.examples("valid")
    if not sequences or not len(valid):
        raise ValueError("SASRec needs users with two training events and a validation split")
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(recipe.seed)
        return _train(dataset, recipe, sequences, valid, device=device, max_seconds=max_seconds)


def _train(
    dataset: Dataset,
    recipe: SasrecRecipe,
    sequences: list[np.ndarray],
    valid: Examples,
    *,
    device: str,
    max_seconds: float | None,
) -> Trained:
    started = time.monotonic()
    rng = np.random.default_rng(recipe.seed)
    model = Sasrec(len(dataset.items), recipe).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
    )
    best_figures: dict[str, float] = {}
    best_epoch, best_weights = 0, model.state_dict()
    chosen_by = "excluded/N@10" if recipe.exclude_history else "kept/N@10"
    bar = tqdm(range(1, recipe.epochs + 1), desc="SASRec", unit="epoch", leave=False)
    for epoch in bar:
        model.train()
        batches = list(_batches(sequences, recipe, rng))
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                done = epoch - 1 + (step + 1) / len(batches)
                group["lr"] = recipe.learning_rate * _schedule(done, recipe.epochs)
            optimizer.zero_grad(set_to_none=True)
            _loss(model, batch, recipe.label_smoothing).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        figures = validate(model, valid)
        if not best_figures or figures[chosen_by] > best_figures[chosen_by]:
            best_figures, best_epoch = figures, epoch
            best_weights = copy.deepcopy(model.state_dict())
        bar.set_postfix({"N@10": f"{figures[chosen_by]:.4f}", "best": best_epoch})
        out_of_time = max_seconds is not None and time.monotonic() - started > max_seconds
        if out_of_time or epoch - best_epoch >= recipe.patience:
            break
    bar.close()
    model.load_state_dict(best_weights)
    seconds = time.monotonic() - started
    return Trained(model.eval(), recipe, best_figures, best_epoch, seconds)


@torch.inference_mode()
def validate(model: Sasrec, examples: Examples, *, batch_size: int = 512) -> dict[str, float]:
    """Mean R@10 and N@10, history kept and excluded, from the targets' ranks alone (no lists)."""
    model.eval()
    ranks: dict[str, list[Tensor]] = {"kept": [], "excluded": []}
    for start in range(0, len(examples), batch_size):
        histories = examples.histories[start : start + batch_size]
        targets_B1 = torch.from_numpy(examples.targets_E[start : start + batch_size]).long()[
            :, None
        ]
        logits_BN = model.next_logits(histories)
        rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        excluded_BN = logits_BN.clone()
        excluded_BN[
            torch.from_numpy(rows), torch.from_numpy(np.concatenate(histories)).long()
        ] = -torch.inf
        for name, scores_BN in (("kept", logits_BN), ("excluded", excluded_BN)):
            target_B1 = scores_BN.gather(1, targets_B1.to(scores_BN.device))
            rank_B = 1.0 + (scores_BN > target_B1).sum(dim=1)
            ranks[name].append(rank_B.masked_fill(target_B1[:, 0] == -torch.inf, torch.inf))
    figures = {}
    for name, found in ranks.items():
        rank_E = torch.cat(found).cpu()
        hit_E = (rank_E <= 10).double()
        figures[f"{name}/R@10"] = float(hit_E.mean())
        figures[f"{name}/N@10"] = float((hit_E / torch.log2(rank_E.double() + 1)).mean())
    return figures


def tune(
    dataset: Dataset,
    grid: Mapping[str, Sequence[Any]],
    *,
    base: SasrecRecipe | None = None,
    device: str | None = None,
    max_seconds: float | None = None,
) -> list[Trained]:
    """Train every combination of the grid; return all, best validation N@10 first.

    Args:
        dataset: only its training and validation splits are read.
        grid: recipe field → values to try.
        base: the other fields.
        device: as in `train`.
        max_seconds: a limit for each training.

    Example:
        >>> tried = tune(dataset, {"dim": [64, 128], "dropout": [0.2, 0.5]})  # doctest: +SKIP
        >>> [(t.recipe.dim, t.recipe.dropout, t.figures) for t in tried]  # doctest: +SKIP
    """
    tried = []
    for values in itertools.product(*grid.values()):
        changes: dict[str, Any] = dict(zip(grid, values, strict=True))
        recipe = dataclasses.replace(base or SasrecRecipe(), **changes)
        trained = train(dataset, recipe, device=device, max_seconds=max_seconds)
        reached = " ".join(f"{key} {value:.4f}" for key, value in trained.figures.items())
        line = f"{changes}: {reached}, epoch {trained.epoch}, {trained.seconds:.0f} s"
        tqdm.write(line, file=sys.stderr)
        tried.append(trained)
    key = "excluded/N@10" if (base or SasrecRecipe()).exclude_history else "kept/N@10"
    return sorted(tried, key=lambda trained: -trained.figures[key])


def _batches(
    sequences: list[np.ndarray], recipe: SasrecRecipe, rng: np.random.Generator
) -> Iterator[list[np.ndarray]]:
    """Windows of at most `max_length` + 1 events, in batches of like length, in random order.

    A long sequence is cut at a new random place every epoch, so that every event is a target with
    many different lengths of history before it.
    """
    length = recipe.max_length
    windows = []
    for sequence in sequences:
        first = int(rng.integers(1, length + 1)) if len(sequence) > length + 1 else length
        starts = [0, *range(first, len(sequence) - 1, length)]
        ends = [*starts[1:], len(sequence) - 1]
        windows += [sequence[a : b + 1] for a, b in zip(starts, ends, strict=True)]
    order = rng.permutation(len(windows))
    pool = 32 * recipe.batch_size  # sorting within pools saves padding and leaves some chance
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda index: len(windows[index]))
        for i in range(0, len(by_length), recipe.batch_size):
            batches.append([windows[index] for index in by_length[i : i + recipe.batch_size]])
    for index in rng.permutation(len(batches)):
        yield batches[index]


def _loss(model: Sasrec, windows: list[np.ndarray], label_smoothing: float) -> Tensor:
    """Mean cross-entropy over all items, at every position that has a next item."""
    device = model.items.weight.device
    lengths_B = torch.tensor([len(window) - 1 for window in windows])
    inputs_BL = _pad([window[:-1] for window in windows])
    real_BL = torch.arange(inputs_BL.shape[1]) < lengths_B[:, None]
    targets_P = torch.from_numpy(np.concatenate([window[1:] for window in windows])).long()
    states_PD = model(inputs_BL.to(device))[real_BL.to(device)]
    logits_PN = model.dropout(states_PD) @ model.items.weight.T
    return F.cross_entropy(logits_PN, targets_P.to(device), label_smoothing=label_smoothing)


def _pad(rows: Sequence[np.ndarray]) -> Tensor:
    """int64 [B, longest], padded with item 0 on the right."""
    padded_BL = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for index, row in enumerate(rows):
        padded_BL[index, : len(row)] = row
    return torch.from_numpy(padded_BL)


def _schedule(done: float, epochs: int) -> float:
    """Share of the peak learning rate after `done` epochs."""
    if done < 1:
        return done
    return 0.1 + 0.9 * 0.5 * (1 + float(np.cos(np.pi * (done - 1) / max(epochs - 1, 1))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune on a run's validation split and print what every setting reached; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m whyrec.evaluation.sasrec")
    parser.add_argument("run", type=Path, help="runs/NAME, with a prepared dataset")
    parser.add_argument("--recipe", type=Path, help="the settings that the grid does not vary")
    parser.add_argument("--grid", required=True, help="YAML: {setting: [value, ...], ...}")
    parser.add_argument("--max-seconds", type=float, help="a limit for each training")
    options = parser.parse_args(arguments)
    try:
        grid = yaml.safe_load(options.grid)
        if not isinstance(grid, dict) or not all(isinstance(v, list) for v in grid.values()):
            raise ValueError("--grid must look like {dropout: [0.2, 0.5], dim: [64]}")
        for key, tried in grid.items():  # as a recipe would read them, unknown settings refused
            read = [load_recipe(SasrecRecipe, options.recipe, [f"{key}={v}"]) for v in tried]
            grid[key] = [getattr(recipe, key) for recipe in read]
        base = load_recipe(SasrecRecipe, options.recipe)
        dataset = Dataset.load(options.run / "dataset")
        best = tune(dataset, grid, base=base, max_seconds=options.max_seconds)[0]
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"whyrec: {error}", file=sys.stderr)
        return 2
    print(yaml.safe_dump(dataclasses.asdict(best.recipe), sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
