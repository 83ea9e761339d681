"""Think, then decode: thoughts are sampled as text, items by the trie beam after each thought.

A reply is `<think> … </think><|sid_begin|>` and a SID. Without thinking the thought is closed at
once, in the same model, after the same inputs. Here G thoughts are sampled for each of U prompts:

* a prompt's keys and values are computed once and shared by its G thoughts, which grow side by side
  as chains of one tree (`tree_attention.py`); finished ones cost nothing more;
* inside a thought there is text alone: no SID code, no control token, and `</think>` to end it; one
  that is not closed within the budget is closed for the model;
* nothing but the arguments decides how tokens are drawn: a model's GenerationConfig (`do_sample`,
  `top_k`, `top_p`) is never read;
* each draw depends on (seed, key of the prompt, sample) alone: a user's thoughts are the same in
  any batch, as far as logits are;
* the beam goes on from the thoughts' keys and values: only `</think><|sid_begin|>` is computed.

    thinker = Thinker(decoder, encoder)
    thoughts = thinker.think([encoder.thinking_prompt(h) for h in histories], samples=4,
                             max_tokens=48, temperature=1.0, seed=0)
    beams = decoder.search(thinker.answer(thoughts, width=20), width=20)      # U·G rows

Dimensions: U prompts, G thoughts a prompt, T tokens, R = U·G rows, P prompt slots, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from whyrec.decode.beam import BeamDecoder, Prefilled
from whyrec.decode.tree_attention import KeyValueStore, run
from whyrec.prompting.encoder import PromptEncoder


@dataclass(frozen=True)
class ThoughtSettings:
    """How a model thinks; `whyrec.json` holds it.

    Attributes:
        samples: G, thoughts for each history; their rankings are mixed with equal weights.
        max_tokens: budget of a thought, `</think>` included.
        temperature: of the sampling; 0 takes the best token.
        weight: of thinking where it is fused with not thinking, between 0 and 1.
    """

    samples: int
    max_tokens: int
    temperature: float
    weight: float = 0.5


@dataclass(frozen=True)
class Thoughts:
    """Sampled thoughts, and the keys and values that a beam goes on from.

    Attributes:
        ids_UGT: the sampled tokens, `</think>` among them where the model closed the thought; -1
            behind the end.
        log_probs_UGT: their log-probabilities over the whole vocabulary, at the temperature that
            they were drawn with (at 1 where the best was taken), float32; 0 behind the end.
        closed_UG: whether the model closed the thought; else the budget did.
        store: keys and values of prompts and thoughts; large, so do not keep what is done with.
        slots_UGT: where in the store each token of a thought lies.
    """

    ids_UGT: Tensor
    log_probs_UGT: Tensor
    closed_UG: Tensor
    store: KeyValueStore
    slots_UGT: Tensor

    @property
    def lengths_UG(self) -> Tensor:
        """Tokens of each thought, without `</think>`."""
        return (self.ids_UGT >= 0).sum(-1) - self.closed_UG.long()

    def thought(self, user: int, sample: int) -> list[int]:
        """Token ids of one thought, without `</think>`."""
        return self.ids_UGT[user, sample, : int(self.lengths_UG[user, sample])].tolist()


class Thinker:
    """Samples thoughts for one model.

    Args:
        decoder: the model's beam search.
        encoder: of its tokenizer.
        stop: the token that ends a thought; `</think>` when None.
    """

    def __init__(
        self, decoder: BeamDecoder, encoder: PromptEncoder, *, stop: int | None = None
    ) -> None:
        self.decoder, self.encoder = decoder, encoder
        self._closing = [encoder.vocabulary.think_end, encoder.vocabulary.begin]
        self._stop = encoder.vocabulary.think_end if stop is None else stop
        num_rows = decoder.model.get_output_embeddings().weight.shape[0]
        text_V = text_tokens(encoder.tokenizer, num_rows=num_rows, stop=self._stop)
        self._text_V = text_V.to(decoder.device)

    @torch.no_grad()
    def think(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        seed: int,
        keys: Sequence[int] | None = None,
    ) -> Thoughts:
        """Sample thoughts.

        Args:
            prompts: token ids, ending in `<think>`.
            samples: G, thoughts a prompt.
            max_tokens: budget of a thought, `</think>` included.
            temperature: of the softmax; 0 takes the best token.
            seed: of all draws.
            keys: a number for each prompt that the draws depend on, such as the user's; its place
                in the batch when None.
        """
        assert samples >= 1 and max_tokens >= 1 and temperature >= 0
        keys = range(len(prompts)) if keys is None else keys
        noise = [
            [np.random.default_rng((seed, key, g)).random(max_tokens) for g in range(samples)]
            for key in keys
        ]
        uniform_UGT = torch.from_numpy(np.array(noise)).to(self.decoder.device)
        prefilled = self.decoder.prefill(prompts, width=0, other_slots=samples * max_tokens)
        store = prefilled.store
        num_users, device = len(prompts), self.decoder.device
        users = torch.arange(num_users, device=device)[:, None]
        hidden_UGD = prefilled.last_hidden_UD[:, None].repeat(1, samples, 1)
        slots_UGT = torch.zeros(num_users, samples, 0, dtype=torch.long, device=device)
        open_UG = torch.ones(num_users, samples, dtype=torch.bool, device=device)
        ids, log_probs = [], []
        for step in range(max_tokens):
            drawn_UG, log_prob_UG = self._draw(hidden_UGD, uniform_UGT[..., step], temperature)
            ids.append(drawn_UG.masked_fill(~open_UG, -1))
            log_probs.append(log_prob_UG.masked_fill(~open_UG, 0.0))
            open_UG = open_UG & (drawn_UG != self._stop)
            num_open = int(open_UG.sum(1).max())
            if num_open == 0:
                break
            # Users with fewer open thoughts fill up with finished ones, whose tokens are nonsense
            # that nobody will look at. A slot that was never computed is never looked at either.
            chosen_UT = open_UG.int().argsort(dim=1, descending=True, stable=True)[:, :num_open]
            slot_T = store.used + torch.arange(num_open, device=device)
            slots_UGT = torch.nn.functional.pad(slots_UGT, (0, 1))
            slots_UGT[users, chosen_UT, -1] = slot_T.expand(num_users, -1)
            hidden_UTD = run(
                self.decoder.model,
                drawn_UG.gather(1, chosen_UT),
                positions_UT=(store.lengths_U[:, None] + step).expand(-1, num_open).contiguous(),
                store=store,
                mask_UTS=_chain_mask(store, slots_UGT[users, chosen_UT], num_open),
            )
            hidden_UGD[users, chosen_UT] = hidden_UTD.to(hidden_UGD.dtype)
        return Thoughts(
            torch.stack(ids, dim=-1), torch.stack(log_probs, dim=-1), ~open_UG, store, slots_UGT
        )

    @torch.no_grad()
    def answer(self, thoughts: Thoughts, *, width: int, searches: int = 1) -> Prefilled:
        """Close the thoughts and open a SID after each: R = U·G rows for `BeamDecoder.search`.

        The rows of a prompt's thoughts lie one after the other. The same beams come from prefilling
        `answer_prompt` of each thought, at the cost of computing all of it again.

        Args:
            thoughts: of `think`.
            width, searches: as for `BeamDecoder.prefill`.
        """
        old, device = thoughts.store, self.decoder.device
        num_users, samples = thoughts.closed_UG.shape
        user_R = torch.arange(num_users, device=device).repeat_interleave(samples)
        prompt_R = old.lengths_U[user_R]
        length_R = prompt_R + thoughts.lengths_UG.flatten()
        slots = int(length_R.max())
        # Where in the old store each slot of the new one comes from: prompt, then thought.
        slot_P = torch.arange(slots, device=device)
        inside_RP = (slot_P - prompt_R[:, None]).clamp(0, max(thoughts.slots_UGT.shape[-1] - 1, 0))
        source_RP = slot_P.expand(len(user_R), -1)
        if thoughts.slots_UGT.shape[-1]:
            thought_RP = thoughts.slots_UGT.flatten(0, 1).gather(1, inside_RP)
            source_RP = torch.where(slot_P < prompt_R[:, None], source_RP, thought_RP)
        closing = torch.tensor(self._closing, device=device).expand(len(user_R), -1)
        full = slots + closing.shape[1]
        tree_slots = width * (self.decoder.trie.num_levels - 1) * searches
        store = KeyValueStore(length_R, full, capacity=full + tree_slots)
        for layer in old.keys:
            rows = (old.keys[layer], old.values[layer])
            # Indexing puts the slots before the heads: [R, P, J, E].
            key_RPJE, value_RPJE = (row[user_R[:, None], :, source_RP] for row in rows)
            store.write(layer, key_RPJE.transpose(1, 2), value_RPJE.transpose(1, 2))
        store.used = slots
        tail = torch.arange(closing.shape[1], device=device)
        seen_RTS = (slot_P < length_R[:, None])[:, None].expand(-1, len(tail), -1)
        causal_RTT = (tail <= tail[:, None]).expand(len(user_R), -1, -1)
        hidden_RTD = run(
            self.decoder.model,
            closing.contiguous(),
            positions_UT=length_R[:, None] + tail,
            store=store,
            mask_UTS=torch.cat([seen_RTS, causal_RTT], dim=-1),
        )
        # A prompt is one piece: what was written behind the longest row moves behind its own.
        target_RT = length_R[:, None] + tail
        row_R1 = torch.arange(len(user_R), device=device)[:, None]
        for layer in store.keys:
            for rows_RJSE in (store.keys[layer], store.values[layer]):
                written = rows_RJSE[:, :, slots:full].transpose(1, 2).clone()
                rows_RJSE[row_R1, :, target_RT] = written
        store.lengths_U = length_R + closing.shape[1]
        nodes_RB = torch.zeros(len(user_R), 0, dtype=torch.long, device=device)
        return Prefilled(store, hidden_RTD[:, -1], nodes_RB, hidden_RTD[:, :0])

    def _draw(
        self, hidden_UGD: Tensor, uniform_UG: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The next tokens [U, G] and their log-probabilities over the whole vocabulary."""
        logits_UGV = self.decoder.model.get_output_embeddings()(hidden_UGD).float()
        log_probs_UGV = (logits_UGV / (temperature or 1.0)).log_softmax(-1)
        text_UGV = log_probs_UGV.masked_fill(~self._text_V, -torch.inf)
        if temperature == 0:
            drawn_UG = text_UGV.argmax(-1)
        else:
            # In double: 50,000 small probabilities add up to more than float32 can tell apart.
            upto_UGV = text_UGV.double().softmax(-1).cumsum(-1)
            wanted_UG1 = (uniform_UG * upto_UGV[..., -1])[..., None]
            drawn_UG = torch.searchsorted(upto_UGV, wanted_UG1, right=True)[..., 0]
            drawn_UG = drawn_UG.clamp(max=upto_UGV.shape[-1] - 1)
        return drawn_UG, log_probs_UGV.gather(-1, drawn_UG[..., None])[..., 0]


def text_tokens(tokenizer: PreTrainedTokenizerBase, *, num_rows: int, stop: int) -> Tensor:
    """Which tokens a thought may hold: text, and the one that ends it; bool [num_rows]."""
    text_V = torch.zeros(num_rows, dtype=torch.bool)
    text_V[: len(tokenizer)] = True  # rows beyond are padding
    control = [*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids]
    text_V[control] = False
    text_V[stop] = True
    return text_V


def _chain_mask(store: KeyValueStore, slots_UTA: Tensor, num_new: int) -> Tensor:
    """What each new token sees: its prompt, its own thought so far and itself, [U, T, S]."""
    slot_S = torch.arange(store.used + num_new, device=slots_UTA.device)
    prompt_US = slot_S < store.lengths_U[:, None]
    mask_UTS = prompt_US[:, None].repeat(1, slots_UTA.shape[1], 1)
    return mask_UTS.scatter_(2, slots_UTA, True)
