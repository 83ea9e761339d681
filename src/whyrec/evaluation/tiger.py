"""A TIGER-style baseline: a small transformer over semantic IDs alone, from random weights.

TIGER (Rajput et al. 2023, "Recommender Systems with Generative Retrieval", arXiv 2305.05065)
reads a history as SID codes and generates the next item's codes. This is its idea under our
conditions, to tell what the pretrained LLM adds; it is not a reproduction:

* decoder-only (a small Llama, rotary positions) where TIGER is a T5 encoder-decoder of 4 + 4
  layers, so that one causal pass predicts every item of a sequence from all those before it;
* the SIDs of the run, whatever quantiser made them, not RQ-VAE over Sentence-T5; no user token;
* a code is predicted over the codes that the trie allows, and decoded by the exact trie beam, where
  TIGER's beam may leave the catalogue;
* trained to its best validation N@10, not for a fixed number of steps.

    recipe = load_recipe(TigerRecipe, Path("recipes/ml-100k/tiger.yaml"))
    trained = train(Path("runs/ml-100k"), recipe)
    excluded, kept = trained.model.rank(histories, width=20, exclude_history=[True, False])

To tune, every combination of a grid on the validation split:

    python -m whyrec.evaluation.tiger runs/beauty --grid "{dropout: [0.1, 0.3], dim: [128, 256]}"

Dimensions: B windows, W items of a window, L levels, P items to predict, K codes of a level.
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
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from whyrec.catalog.dataset import Dataset, Examples
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.ranking import Ranking, rank_histories
from whyrec.evaluation.fitting import (
    FitRecipe,
    Trained,
    WindowBatch,
    fit,
    training_data,
    window_batches,
)
from whyrec.evaluation.metrics import ranking_metrics
from whyrec.evaluation.tuning import tuning_command
from whyrec.sid.index import read_sids
from whyrec.sid.legal_loss import legal_nll
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary
from whyrec.stage import read_stage

_BEGIN = 0  # the token before a history; the codes follow, level by level
_ATTENTION = "whyrec_causal"


@dataclass(frozen=True)
class TigerRecipe(FitRecipe):
    """Settings of one training, besides those of `FitRecipe`.

    Attributes:
        dim: width of the token embeddings and of the transformer.
        layers: transformer blocks.
        heads: attention heads; they divide `dim`.
        dropout: on the input embeddings, the attention, every block's two outputs and the last
            hidden states.
        beam_width: of the beam that ranks items.
        valid_users: a fixed random subset that chooses the epoch; 0 for all.
    """

    dim: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.2
    beam_width: int = 20
    valid_users: int = 0


def causal_attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, causal and no more.

    For its own kinds of attention Transformers looks at every batch for padding or packing, and so
    makes the host wait for the device.
    """
    mixed_BHTE = F.scaled_dot_product_attention(
        query_BHTE, key_BHTE, value_BHTE, dropout_p=dropout, is_causal=True, scale=scaling
    )
    return mixed_BHTE.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, causal_attention)


class Tiger(nn.Module):
    """The model of one catalogue: histories of item indices to ranked items.

    Args:
        codes_NL: the catalogue's SIDs, one row an item.
        trie: of the same SIDs.
        recipe: sizes and dropout.
        device: where it computes.
    """

    def __init__(self, codes_NL: Tensor, *, trie: Trie, recipe: TigerRecipe, device: str) -> None:
        super().__init__()
        if recipe.dim % (2 * recipe.heads):
            raise ValueError(
                f"dim {recipe.dim} must be a multiple of twice the heads {recipe.heads}"
            )
        sizes = trie.level_sizes
        offsets = tuple(1 + sum(sizes[:level]) for level in range(len(sizes)))
        self.vocabulary = SidVocabulary(sizes, offsets, begin=_BEGIN, end=_BEGIN)
        self.trie = trie.to(device)
        self.recipe = recipe
        self.tokens_NL = codes_NL.to(device) + torch.tensor(offsets, device=device)
        # The node before each code of each item: which codes may stand in its place.
        prefixes = [self.trie.walk(codes_NL[:, :level].to(device)) for level in range(len(sizes))]
        self.nodes_NL = torch.stack(prefixes, dim=1)
        self._prompts = self.tokens_NL.tolist()
        config = LlamaConfig(
            vocab_size=self.vocabulary.stop,
            hidden_size=recipe.dim,
            intermediate_size=4 * recipe.dim,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            attention_dropout=recipe.dropout,
            max_position_embeddings=1 + len(sizes) * (recipe.max_length + 1),
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=_ATTENTION,
        )
        self.llama = LlamaForCausalLM(config)
        for layer in self.llama.model.layers:  # Llama has no dropout of its own here
            attention, feed = layer.self_attn, layer.mlp
            attention.o_proj = nn.Sequential(attention.o_proj, nn.Dropout(recipe.dropout))
            feed.down_proj = nn.Sequential(feed.down_proj, nn.Dropout(recipe.dropout))
        self.dropout = nn.Dropout(recipe.dropout)
        self.to(device)
        self.decoder = BeamDecoder(self.llama, vocabulary=self.vocabulary, trie=self.trie)

    def loss(self, batch: WindowBatch) -> Tensor:
        """Mean negative log-likelihood of the SIDs of all items but the first of each window."""
        with self._autocast():
            tokens_BT = self.tokens_NL[batch.items_BW].flatten(1)
            read_BT = F.pad(tokens_BT[:, :-1], (1, 0), value=_BEGIN)
            # Padding is on the right, where causal attention never looks from a real token.
            hidden_BTD = self.llama.model(
                inputs_embeds=self.dropout(self.llama.get_input_embeddings()(read_BT)),
                use_cache=False,
            ).last_hidden_state
            hidden_BWLD = hidden_BTD.unflatten(1, (-1, self.vocabulary.num_levels))
            hidden_PLD = hidden_BWLD[:, 1:].flatten(0, 1).index_select(0, batch.targets_P)
            items_P = batch.items_BW[:, 1:].flatten().index_select(0, batch.targets_P)
            return self._sid_nll(self.dropout(hidden_PLD), items_P) / len(items_P)

    def _sid_nll(self, hidden_PLD: Tensor, items_P: Tensor) -> Tensor:
        """Sum over items and levels; a code that the trie forces costs nothing."""
        head_VD = self.llama.get_output_embeddings().weight
        total = hidden_PLD.new_zeros((), dtype=torch.float32)
        by_level = zip(self.vocabulary.offsets, self.vocabulary.rows_by_level(head_VD), strict=True)
        for level, (offset, rows_KD) in enumerate(by_level):
            total = total + legal_nll(
                hidden_PLD[:, level] @ rows_KD.T,
                self.tokens_NL[items_P, level] - offset,
                legal_MK=self.trie.mask(self.nodes_NL[items_P, level], level=level),
                label_smoothing=self.recipe.label_smoothing,
            )
        return total

    def recommendation_prompt(self, history: Sequence[int]) -> list[int]:
        """What a beam starts from, as `PromptEncoder` gives it for the LLM."""
        return [_BEGIN, *(token for item in history for token in self._prompts[item])]

    def rank(
        self,
        histories: Sequence[np.ndarray],
        *,
        width: int,
        exclude_history: Sequence[bool] = (True,),
        progress: str = "",
    ) -> list[Ranking]:
        """Rank the catalogue for each history; see `decode.ranking.rank_histories`."""
        with self._autocast():
            return rank_histories(
                self.decoder,
                self,  # type: ignore[arg-type]  # all that is asked of it is the prompt
                histories,
                width=width,
                max_history=self.recipe.max_length,
                exclude_history=exclude_history,
                progress=progress,
            )

    def _autocast(self) -> torch.autocast:
        kind = self.tokens_NL.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def untrained(run: Path, dataset: Dataset, recipe: TigerRecipe, *, device: str) -> Tiger:
    """The model of a run's SIDs, with random weights; ValueError when the run has none."""
    read_stage(run / "sids", made_by=f"whyrec index --run {run}")
    codes_NL = read_sids(run / "sids" / "sids.parquet", [item.item_id for item in dataset.items])
    trie = Trie.load(run / "sids" / "trie.safetensors")
    return Tiger(codes_NL, trie=trie, recipe=recipe, device=device)


def train(
    run: Path,
    recipe: TigerRecipe,
    *,
    device: str | None = None,
    max_seconds: float | None = None,
) -> Trained[Tiger, TigerRecipe]:
    """Train on a run's training events and keep the epoch with the best validation N@10.

    Args:
        run: the run folder, with `dataset` and `sids`.
        recipe: see `TigerRecipe`.
        device: by default the GPU if there is one.
        max_seconds: start no further epoch after this time.

    Raises:
        ValueError: when the run has no SIDs, or nothing to train on or to validate with.
    """
    if recipe.beam_width < 10:
        raise ValueError(f"beam_width must be at least 10, for N@10, not {recipe.beam_width}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dataset = Dataset.load(run / "dataset")
    sequences, valid = training_data(dataset, name="TIGER")
    valid = valid.at_most(recipe.valid_users)
    return fit(
        lambda: untrained(run, dataset, recipe, device=device),
        recipe,
        label="TIGER",
        device=device,
        batches=partial(
            window_batches,
            sequences,
            max_length=recipe.max_length,
            batch_size=recipe.batch_size,
            device=device,
        ),
        loss=Tiger.loss,
        validate=partial(validate, examples=valid),
        max_seconds=max_seconds,
    )


def validate(model: Tiger, examples: Examples) -> dict[str, float]:
    """Mean R@10 and N@10 of the beam's lists, history kept and excluded."""
    rankings = model.rank(
        examples.histories, width=model.recipe.beam_width, exclude_history=[False, True]
    )
    figures = {}
    for name, ranking in zip(("kept", "excluded"), rankings, strict=True):
        metrics = ranking_metrics(ranking.items_EW, examples.targets_E, cutoffs=(10,))
        figures[f"{name}/R@10"] = float(metrics["R@10"].mean())
        figures[f"{name}/N@10"] = float(metrics["N@10"].mean())
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune on a run's validation split and print what every setting reached; the exit status."""
    return tuning_command("tiger", TigerRecipe, lambda run: partial(train, run), arguments)


if __name__ == "__main__":
    sys.exit(main())
