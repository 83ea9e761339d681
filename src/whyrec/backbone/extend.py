"""Extend a backbone's vocabulary with SID tokens whose rows start from the codebook geometry.

A new row is the mean of the pretrained rows plus the code's centroid, rotated into the hidden space
by a random orthonormal map (one a level, so that levels do not collide) and scaled to the spread of
the pretrained rows. Near codes so start as near tokens, and every token starts where the backbone
expects tokens to be.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from whyrec.sid.vocabulary import MARKERS, SidVocabulary


def extend_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    level_sizes: Sequence[int],
    codebooks: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> SidVocabulary:
    """Add the SID tokens to the tokenizer and their rows to the model, in place.

    Args:
        model: a causal LM with tied or untied head.
        tokenizer: its tokenizer.
        level_sizes: codes of each level.
        codebooks: by level, centroids [K, D] of any D; None starts from noise of the same spread.
        seed: of the random maps.

    Returns:
        Where the tokens are.

    Raises:
        ValueError: when the tokenizer holds SID tokens of other levels already.
    """
    tokens = SidVocabulary.tokens(level_sizes)
    known = set(tokenizer.get_vocab())
    if any(token in known for token in tokens[len(MARKERS) :]):
        raise ValueError(
            "this backbone's tokenizer holds SID tokens already; start from the plain backbone"
        )
    num_rows = model.get_input_embeddings().weight.shape[0]
    pretrained = min(num_rows, len(tokenizer))
    # Non-special: TRL decodes with skip_special_tokens=True, which would delete special ones.
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token in tokens
            if token not in known
        ]
    )
    vocabulary = SidVocabulary.bind(tokenizer, level_sizes=level_sizes)
    if len(tokenizer) > num_rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    generator = torch.Generator().manual_seed(seed)
    # Some backbones think already: their rows for `<think>` stay.
    new_markers = tokenizer.convert_tokens_to_ids([m for m in MARKERS if m not in known])
    # Not a set: its order, and so the rows of an untied head, would change from run to run.
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight_VD = module.weight.data
        old_VD = weight_VD[:pretrained].float().cpu()
        mean_D, spread = old_VD.mean(0), old_VD.std()
        for token_id in new_markers:
            noise_D = torch.randn(len(mean_D), generator=generator) * spread
            weight_VD[token_id] = (mean_D + noise_D).to(weight_VD)
        for level, offset in enumerate(vocabulary.offsets):
            size = vocabulary.level_sizes[level]
            if codebooks is None:
                rows_KD = torch.randn(size, len(mean_D), generator=generator)
            else:
                rows_KD = _rotated(codebooks[level].float(), len(mean_D), generator)
            rows_KD = rows_KD * (spread / rows_KD.std().clamp(min=1e-12))
            weight_VD[offset : offset + size] = (mean_D + rows_KD).to(weight_VD)
    return vocabulary


def new_token_ids(vocabulary: SidVocabulary, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all rows that training must be able to change: markers and codes."""
    markers = tokenizer.convert_tokens_to_ids(list(MARKERS))
    return sorted({*markers, *range(vocabulary.first, vocabulary.stop)})


def _rotated(centroids_KC: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Centroids [K, C], centred and mapped into `size` dimensions with distances kept."""
    centred_KC = centroids_KC - centroids_KC.mean(0)
    dims = centred_KC.shape[1]
    square, _ = torch.linalg.qr(torch.randn(max(dims, size), max(dims, size), generator=generator))
    return centred_KC @ square[:dims, :size]
