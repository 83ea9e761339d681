"""Log-probabilities of what the recommender does, under the very distributions it does it from.

The words of a thought are drawn over the text part of the vocabulary: no SID code, no control
token, and `</think>` to end it (`decode/think.py`). A code of a SID is taken among those that the
trie allows after the codes before it (`decode/beam.py`). Reinforcement learning needs the
log-probability of the distribution that a token was drawn from, so both are renormalised here:

    log π(word) = z_word / T − log Σ_{text} exp(z / T)        T: the temperature of the sampling
    log π(code) = z_code − log Σ_{legal} exp(z)

A softmax over the whole vocabulary would be another policy: its gradient would also be spent on
tokens that nobody can draw. The old, the new and the reference log-probabilities of GRPO and DPO
all come from this one function, so that their ratio is exactly 1 before the first update. What the
sampler itself reports (`Thoughts.log_probs_UGT`) is over the whole vocabulary; the difference is
the log of `mass`, the share of probability that the model gives to text.

Sequences are packed end to end without padding (`backbone/packed_attention.py`), and logits are
made only where a token is scored, in chunks, and again in the backward pass. The work is done
inside the model's own `forward`, so that DDP's hooks see it.

    text_V = text_tokens(tokenizer, num_rows=…, stop=vocabulary.think_end)    # of decode/think.py
    attach_policy(model, Policy(vocabulary, trie, text_V, temperature=1.0))
    scored = score(model, ids_BT=ids, mask_BT=mask, text_BT=thought, codes_BL=codes)

Dimensions: B sequences, T tokens, M scored words, L levels, K codes of a level, V vocabulary,
D hidden size.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from whyrec.backbone.packed_blocks import PackedBlocks
from whyrec.backbone.second_forward import add_forward
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.prefill import Prefilled
from whyrec.decode.tree_attention import run
from whyrec.sid.legal_loss import legal_log_probs
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary

_CHUNK = 1024  # words whose logits are in memory at once


@dataclass(frozen=True)
class Policy:
    """What words and codes are drawn from.

    Attributes:
        vocabulary: token ids of the SID codes.
        trie: the catalogue's SIDs, on the device of the model.
        text_V: which tokens a thought may hold, on the device of the model (`think.text_tokens`).
        temperature: of the sampling of words, above 0.
    """

    vocabulary: SidVocabulary
    trie: Trie
    text_V: Tensor
    temperature: float


@dataclass(frozen=True)
class Scored:
    """What `score` finds.

    Attributes:
        words_BT: log-probability of each scored word at its place, float32; 0 elsewhere.
        entropies_BT: of the distribution it was drawn from, without gradient; 0 elsewhere.
        mass_BT: probability of all text under the softmax over the whole vocabulary; 0 elsewhere.
        codes_BL: log-probability of each code; [B, 0] where none were asked for.
    """

    words_BT: Tensor
    entropies_BT: Tensor
    mass_BT: Tensor
    codes_BL: Tensor


def attach_policy(model: PreTrainedModel, policy: Policy) -> None:
    """Make `model(…, policy=True)` return log-probabilities in place of logits, in place."""
    add_forward(model, "policy", partial(_forward, policy=policy))


def score(
    model: nn.Module,
    *,
    ids_BT: Tensor,
    mask_BT: Tensor,
    text_BT: Tensor,
    codes_BL: Tensor | None = None,
) -> Scored:
    """Log-probabilities of the words and codes of B sequences.

    Args:
        model: one that `attach_policy` has been at, or what PEFT or DDP has put around it.
        ids_BT: token ids, padded on either side.
        mask_BT: True for a token, False for padding.
        text_BT: True for the words of a thought, never for a sequence's first token.
        codes_BL: the codes of the SID that each sequence ends in; None where they end otherwise.
    """
    mask_BT, text_BT = mask_BT.bool(), text_BT.bool()
    lengths_B = mask_BT.sum(1)
    starts = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
    place_BT = (mask_BT.cumsum(1) - 1) + starts[:-1, None]
    levels = 0 if codes_BL is None else codes_BL.shape[1]
    if codes_BL is None:
        codes_BL = lengths_B.new_zeros(len(lengths_B), 0)
    level_L = torch.arange(levels, device=lengths_B.device)
    found = model(
        input_ids=ids_BT[mask_BT][None],
        policy=True,
        position_ids=(mask_BT.cumsum(1) - 1)[mask_BT][None],
        document_starts=starts.int(),
        longest=int(lengths_B.max()),
        # A token is predicted at the place before its own.
        text_positions=place_BT[text_BT] - 1,
        text_targets=ids_BT[text_BT],
        code_positions=starts[1:, None] - levels + level_L - 1,
        codes=codes_BL,
    )
    nothing_BT = torch.zeros(ids_BT.shape, device=ids_BT.device)
    return Scored(
        nothing_BT.masked_scatter(text_BT, found["words"]),
        nothing_BT.masked_scatter(text_BT, found["entropies"]),
        nothing_BT.masked_scatter(text_BT, found["mass"]),
        found["codes"],
    )


def code_log_probs(
    hidden_BLD: Tensor, codes_BL: Tensor, head_VD: Tensor, *, vocabulary: SidVocabulary, trie: Trie
) -> Tensor:
    """Log-probability of each code of B SIDs among the legal ones, float32 [B, L].

    Args:
        hidden_BLD: hidden states before each code.
        codes_BL: codes of items of the catalogue.
        head_VD: the language-model head.
        vocabulary, trie: of the catalogue.
    """
    found = []
    for level, rows_KD in enumerate(vocabulary.rows_by_level(head_VD)):
        logits_BK = hidden_BLD[:, level].to(rows_KD.dtype) @ rows_KD.T
        legal_BK = trie.mask(trie.walk(codes_BL[:, :level]), level=level)
        log_probs_BK = legal_log_probs(logits_BK, legal_MK=legal_BK)
        found.append(log_probs_BK.gather(1, codes_BL[:, level : level + 1])[:, 0])
    return torch.stack(found, dim=1)


def item_log_probs(decoder: BeamDecoder, prefilled: Prefilled, codes_RL: Tensor) -> Tensor:
    """Log-probability of each code of one SID a row, whether a beam reached it or not: [R, L].

    Args:
        decoder: of the model.
        prefilled: R rows behind `<|sid_begin|>`; their beams are forgotten.
        codes_RL: codes of items of the catalogue.
    """
    vocabulary, store, device = decoder.vocabulary, prefilled.store, decoder.device
    prefilled.forget_beams()
    hidden_RLD = prefilled.last_hidden_UD[:, None]
    levels = codes_RL.shape[1]
    if levels > 1:
        place_T = torch.arange(levels - 1, device=device)
        offsets_T = torch.tensor(vocabulary.offsets[:-1], device=device)
        prompt_RS = torch.arange(store.used, device=device) < store.lengths_U[:, None]
        causal_TT = place_T <= place_T[:, None]
        mask_RTS = torch.cat(
            [
                prompt_RS[:, None].expand(-1, levels - 1, -1),
                causal_TT.expand(len(codes_RL), -1, -1),
            ],
            dim=-1,
        )
        hidden_RTD = run(
            decoder.model,
            (codes_RL[:, :-1] + offsets_T).contiguous(),
            positions_UT=store.lengths_U[:, None] + place_T,
            store=store,
            mask_UTS=mask_RTS,
        )
        hidden_RLD = torch.cat([hidden_RLD, hidden_RTD.to(hidden_RLD.dtype)], dim=1)
    return code_log_probs(
        hidden_RLD,
        codes_RL,
        decoder.model.get_output_embeddings().weight,
        vocabulary=vocabulary,
        trie=decoder.trie,
    )


def _forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    policy: Policy,
    position_ids: Tensor,
    document_starts: Tensor,
    longest: int,
    text_positions: Tensor,
    text_targets: Tensor,
    code_positions: Tensor,
    codes: Tensor,
    **_: object,  # PEFT passes every argument of a causal LM on, as None
) -> dict[str, Tensor]:
    blocks = PackedBlocks(model, longest=longest)
    embedded_1TD = model.get_input_embeddings()(input_ids)
    hidden_TD = blocks(embedded_1TD, position_ids, document_starts)[0]
    head_VD = model.get_output_embeddings().weight.to(hidden_TD.dtype)
    words, entropies, mass = [hidden_TD[:0, 0].float()], [], []
    for start in range(0, len(text_positions), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        word_M, entropy_M, mass_M = checkpoint(
            _chunk_scores,
            hidden_TD[text_positions[chunk]],
            text_targets[chunk],
            head_VD,
            policy.text_V,
            policy.temperature,
            use_reentrant=False,
        )
        words.append(word_M)
        entropies.append(entropy_M)
        mass.append(mass_M)
    found_codes = torch.zeros(codes.shape, device=codes.device)
    if codes.shape[1]:
        found_codes = code_log_probs(
            hidden_TD[code_positions],
            codes,
            head_VD,
            vocabulary=policy.vocabulary,
            trie=policy.trie,
        )
    nothing = [words[0].detach()]
    return {
        "words": torch.cat(words),
        "entropies": torch.cat(entropies or nothing),
        "mass": torch.cat(mass or nothing),
        "codes": found_codes,
    }


def _chunk_scores(
    hidden_MD: Tensor, targets_M: Tensor, head_VD: Tensor, text_V: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of words, and, without gradient, entropies and the text's probability."""
    logits_MV = (hidden_MD @ head_VD.T).float() / temperature
    text_MV = logits_MV.masked_fill(~text_V, -torch.inf)
    total_M = text_MV.logsumexp(-1)
    word_M = logits_MV.gather(1, targets_M[:, None])[:, 0] - total_M
    with torch.no_grad():
        mean_M = (text_MV.softmax(-1) * logits_MV.masked_fill(~text_V, 0.0)).sum(-1)
        mass_M = (total_M - logits_MV.logsumexp(-1)).exp()
        entropy_M = total_M - mean_M
    return word_M, entropy_M, mass_M
