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

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whyrec.catalog.dataset import Dataset, Examples
from whyrec.evaluation.fitting import (
    FitRecipe,
    Trained,
    WindowBatch,
    fit,
    pad_items,
    training_data,
    window_batches,
)
from whyrec.evaluation.tuning import tuning_command


@dataclass(frozen=True)
class SasrecRecipe(FitRecipe):
    """Settings of one training, besides those of `FitRecipe`.

    Attributes:
        dim: width of the item embeddings and of the transformer.
        layers: transformer blocks.
        heads: attention heads; they divide `dim`.
        dropout: on the input embeddings, every block's two outputs and the last hidden states.
    """

    dim: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3


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
        last_B = np.array([len(history) for history in recent]) - 1
        assert bool((last_B >= 0).all()), "an empty history has no next item"
        device = self.items.weight.device
        states_BLD = self(torch.from_numpy(pad_items(recent)).to(device))
        rows_B = torch.arange(len(recent), device=device)
        last_BD = states_BLD[rows_B, torch.from_numpy(last_B).to(device)]
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
) -> Trained[Sasrec, SasrecRecipe]:
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
    sequences, valid = training_data(dataset, name="SASRec")
    return fit(
        lambda: Sasrec(len(dataset.items), recipe).to(device),
        recipe,
        label="SASRec",
        device=device,
        batches=partial(
            window_batches,
            sequences,
            max_length=recipe.max_length,
            batch_size=recipe.batch_size,
            device=device,
        ),
        loss=partial(_loss, label_smoothing=recipe.label_smoothing),
        validate=partial(validate, examples=valid),
        max_seconds=max_seconds,
    )


@torch.inference_mode()
def validate(model: Sasrec, examples: Examples, *, batch_size: int = 512) -> dict[str, float]:
    """Mean R@10 and N@10, history kept and excluded, from the targets' ranks alone (no lists)."""
    device = model.items.weight.device
    ranks: dict[str, list[Tensor]] = {"kept": [], "excluded": []}
    for start in range(0, len(examples), batch_size):
        histories = examples.histories[start : start + batch_size]
        targets_B = torch.from_numpy(examples.targets_E[start : start + batch_size])
        targets_B1 = targets_B.long().to(device)[:, None]
        logits_BN = model.next_logits(histories)
        rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        had = np.stack([rows, np.concatenate(histories)])
        rows_H, items_H = torch.from_numpy(had).to(device)
        excluded_BN = logits_BN.clone()
        excluded_BN[rows_H, items_H] = -torch.inf
        for name, scores_BN in (("kept", logits_BN), ("excluded", excluded_BN)):
            target_B1 = scores_BN.gather(1, targets_B1)
            rank_B = 1.0 + (scores_BN > target_B1).sum(dim=1)
            ranks[name].append(rank_B.masked_fill(target_B1[:, 0] == -torch.inf, torch.inf))
    figures = {}
    for name, found in ranks.items():
        rank_E = torch.cat(found).cpu()
        hit_E = (rank_E <= 10).double()
        figures[f"{name}/R@10"] = float(hit_E.mean())
        figures[f"{name}/N@10"] = float((hit_E / torch.log2(rank_E.double() + 1)).mean())
    return figures


def _loss(model: Sasrec, batch: WindowBatch, *, label_smoothing: float) -> Tensor:
    """Mean cross-entropy over all items, at every position that has a next item."""
    states_PD = model(batch.items_BW[:, :-1]).flatten(0, 1).index_select(0, batch.targets_P)
    targets_P = batch.items_BW[:, 1:].flatten().index_select(0, batch.targets_P)
    logits_PN = model.dropout(states_PD) @ model.items.weight.T
    return F.cross_entropy(logits_PN, targets_P, label_smoothing=label_smoothing)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune on a run's validation split and print what every setting reached; the exit status."""

    def load(run: Path) -> partial:
        return partial(train, Dataset.load(run / "dataset"))

    return tuning_command("sasrec", SasrecRecipe, load, arguments)


if __name__ == "__main__":
    sys.exit(main())
