"""Rollouts: G thoughts for each prompt, the exact beam behind each, and what each is worth.

The current model thinks in process (`decode/think.py`): many prompts at once, their keys and values
shared by their thoughts, and the beam goes on from these. Or a vLLM engine that is given its
weights thinks (`sampling.py`), about all prompts at once, and the beam reads prompt and thought
anew; what follows is the same. `Roller` is TRL's
`rollout_func(prompts, trainer)`; a prompt is the number of a training step, since prompts are made
here. A group whose thoughts all earn the same teaches nothing (its advantages are 0): such dead
groups are counted, logged and drawn again for other training steps (dynamic sampling, DAPO, arXiv
2503.14476), a few rounds at most.

    roller = Roller(steps, sequences=…, encoder=encoder, trie=trie, catalogue=catalogue, settings=…)
    groups = roller.groups(model, [0, 1, 2], seed=0)
    groups[0].totals_G, groups[0].rewards["prefix"]

What is drawn depends on the seed, the step's number and the optimizer step alone, so that a
training that was killed goes on as it would have.

Dimensions: G thoughts of a prompt, R thoughts of a batch, W items of a beam, L levels of a SID.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer

from whyrec.backbone.lora import plain_model
from whyrec.decode.beam import BeamDecoder, Prefilled
from whyrec.decode.think import Thinker
from whyrec.prompting.encoder import PromptEncoder
from whyrec.reasoning.asking import Step
from whyrec.sid.trie import Trie
from whyrec.train.policy import item_log_probs
from whyrec.train.rewards import Catalogue, Outcomes, rewards_of, total
from whyrec.train.sampling import Sampled, VllmSampler, sampled

_SAME = 1e-6  # rewards that differ by less are equal


@dataclass(frozen=True)
class RolloutSettings:
    """How rollouts are made.

    Attributes:
        samples: G, thoughts a prompt.
        max_tokens: budget of a thought, `</think>` included.
        temperature: of their sampling.
        width: W of the beam behind each.
        rows: thoughts that are in memory at once.
        rounds: how often dead groups are drawn again at most.
        rewards: names.
        weights: one a reward.
        seed: of all that is drawn.
        with_item: whether TRL is given the item that was really next behind each thought.
    """

    samples: int
    max_tokens: int
    temperature: float
    width: int
    rows: int
    rounds: int
    rewards: Sequence[str]
    weights: Sequence[float]
    seed: int
    with_item: bool = False


@dataclass(frozen=True)
class Group:
    """The thoughts after one prompt.

    Attributes:
        step: number of the training step.
        prompt: token ids, ending in `<think>`.
        words: by thought, the sampled token ids, with `</think>` where the model closed it.
        log_probs: of these, by the sampler (`sampling.Sampled`).
        closed_G: whether the model closed the thought.
        items_GW: the beam behind each thought, best first, history excluded; -1 is no item.
        rewards: by name, [G].
        totals_G: their weighted sum.
        target: the item that was really next.
    """

    step: int
    prompt: list[int]
    words: list[list[int]]
    log_probs: list[list[float]]
    closed_G: np.ndarray
    items_GW: np.ndarray
    rewards: dict[str, np.ndarray]
    totals_G: np.ndarray
    target: int

    @property
    def is_dead(self) -> bool:
        """Whether all thoughts earn the same."""
        return bool(np.ptp(self.totals_G) < _SAME)


class Roller:
    """Makes rollouts for training steps.

    Args:
        steps: the training steps.
        sequences: by user, item indices of the training events.
        encoder: makes prompts.
        trie: the catalogue's SIDs.
        catalogue: what rewards know of the items.
        settings: how.

    Attributes:
        sampler: the vLLM engine that thinks; None where our decoder does.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        sequences: Sequence[np.ndarray],
        encoder: PromptEncoder,
        trie: Trie,
        catalogue: Catalogue,
        settings: RolloutSettings,
    ) -> None:
        self.steps, self.sequences, self.encoder = steps, sequences, encoder
        self.trie, self.catalogue, self.settings = trie, catalogue, settings
        self.sampler: VllmSampler | None = None

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """TRL's rollout function.

        Args:
            prompts: numbers of training steps, each G times in a row.
            trainer: whose model thinks.
        """
        settings, state, many = self.settings, trainer.state, self.settings.samples
        chosen = [int(prompt) for prompt in prompts[::many]]
        assert prompts == [str(step) for step in chosen for _ in range(many)]
        with torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=trainer.args.bf16):
            groups, dead, drawn = self.live_groups(
                plain_model(trainer.model),
                chosen,
                seed=settings.seed + 7919 * state.global_step,
                share=(trainer.args.process_index, trainer.args.world_size),
            )
        for name, value in (self._told(groups) | _dead_shares(groups, dead, drawn)).items():
            trainer._log_metric(name, value)
        rewards = {
            f"reward_{name}": [float(v) for group in groups for v in group.rewards[name]]
            for name in settings.rewards
        }
        endings = [self._ending(group, place) for group in groups for place in range(many)]
        words = [words for group in groups for words in group.words]
        log_probs = [log_probs for group in groups for log_probs in group.log_probs]
        return {
            "prompt_ids": [group.prompt for group in groups for _ in range(many)],
            "completion_ids": [a + b for a, b in zip(words, endings, strict=True)],
            "logprobs": [a + [0.0] * len(b) for a, b in zip(log_probs, endings, strict=True)],
            "env_mask": [[1] * len(a) + [0] * len(b) for a, b in zip(words, endings, strict=True)],
            **rewards,
        }

    def live_groups(
        self,
        model: PreTrainedModel,
        chosen: Sequence[int],
        *,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> tuple[list[Group], list[bool], int]:
        """Groups for training steps, dead ones drawn again for other steps.

        Args:
            model: the model that thinks.
            chosen: numbers of training steps.
            seed: of these draws.
            share: this process among all, which draw different steps.

        Returns:
            As many groups as asked for, few of them dead; which were dead at first; and how many
            groups were drawn in all.
        """
        groups = self.groups(model, chosen, seed=seed)
        dead = [group.is_dead for group in groups]
        drawn = len(groups)
        for again in range(self.settings.rounds):
            places = [place for place, group in enumerate(groups) if group.is_dead]
            if not places:
                break
            rng = np.random.default_rng((seed, again, *share))
            others = rng.integers(len(self.steps), size=len(places)).tolist()
            drawn += len(others)
            fresh = self._groups(model, others, seed=seed + again + 1)
            for place, group in zip(places, fresh, strict=True):
                groups[place] = group
        return groups, dead, drawn

    def groups(self, model: PreTrainedModel, chosen: Sequence[int], *, seed: int) -> list[Group]:
        """G thoughts for each of some training steps."""
        if self.sampler is not None:
            self.sampler.load(model)
        return self._groups(model, chosen, seed=seed)

    @torch.no_grad()
    def _groups(self, model: PreTrainedModel, chosen: Sequence[int], *, seed: int) -> list[Group]:
        """The same by weights that the sampler has, in batches of prompts of like lengths."""
        decoder = BeamDecoder(model, vocabulary=self.encoder.vocabulary, trie=self.trie)
        steps = [self.steps[n] for n in chosen]
        prompts = [self.encoder.thinking_prompt(step.history, own=step.own) for step in steps]
        samples = self.settings.samples
        ahead = None
        if self.sampler is not None:
            ahead = self.sampler.sample(prompts, seed=seed, keys=chosen)
        order = sorted(range(len(chosen)), key=lambda place: -len(prompts[place]))
        many = max(self.settings.rows // samples, 1)
        found: dict[int, Group] = {}
        for start in range(0, len(order), many):
            places = order[start : start + many]
            of_batch = [chosen[place] for place in places]
            asked = [prompts[place] for place in places]
            if ahead is None:
                thoughts, prefilled = self._think(decoder, of_batch, asked, seed)
            else:
                thoughts = ahead.of(places, samples=samples)
                prefilled = self._read(decoder, asked, thoughts)
            batch = self._rewarded(decoder, of_batch, asked, thoughts, prefilled)
            found |= dict(zip(places, batch, strict=True))
        return [found[place] for place in range(len(chosen))]

    def _think(
        self, decoder: BeamDecoder, chosen: list[int], prompts: list[list[int]], seed: int
    ) -> tuple[Sampled, Prefilled]:
        """Thoughts by our decoder, and the state of the model behind each, ready for a SID."""
        settings, thinker = self.settings, Thinker(decoder, self.encoder)
        thoughts = thinker.think(
            prompts,
            samples=settings.samples,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=seed,
            keys=chosen,
        )
        return sampled(thoughts), thinker.answer(thoughts, width=settings.width)

    def _read(self, decoder: BeamDecoder, prompts: list[list[int]], thoughts: Sampled) -> Prefilled:
        """The same state behind thoughts that somebody else has had."""
        vocabulary, many = self.encoder.vocabulary, self.settings.samples
        rows = [
            [*prompts[row // many], *bare, vocabulary.think_end, vocabulary.begin]
            for row, bare in enumerate(thoughts.bare)
        ]
        return decoder.prefill(rows, width=self.settings.width)

    def _rewarded(
        self,
        decoder: BeamDecoder,
        chosen: list[int],
        prompts: list[list[int]],
        thoughts: Sampled,
        prefilled: Prefilled,
    ) -> list[Group]:
        """The beam behind each thought, and what came of it."""
        settings = self.settings
        many = settings.samples
        steps = [self.steps[n] for n in chosen for _ in range(many)]
        beams = decoder.search(
            prefilled, width=settings.width, excluded=[self._excluded(step) for step in steps]
        )
        targets_R = np.array([step.target for step in steps])
        codes_RL = torch.from_numpy(self.catalogue.codes_NL[targets_R]).to(decoder.device)
        target_scores_R = item_log_probs(decoder, prefilled, codes_RL)
        bare = thoughts.bare
        outcomes = Outcomes(
            items_RW=beams.items_UW.cpu().numpy(),
            scores_RW=beams.scores_UW.float().cpu().numpy(),
            targets_R=targets_R,
            target_scores_R=target_scores_R.sum(1).cpu().numpy(),
            texts=self.encoder.tokenizer.batch_decode(bare),
            tokens_R=np.array([len(ids) for ids in bare]),
            closed_R=thoughts.closed_R,
            histories=[step.history for step in steps],
            max_tokens=settings.max_tokens,
        )
        rewards = rewards_of(settings.rewards, outcomes, self.catalogue)
        totals_R = total(rewards, settings.weights)
        return [
            Group(
                step,
                prompts[place],
                thoughts.words[rows],
                thoughts.log_probs[rows],
                thoughts.closed_R[rows],
                outcomes.items_RW[rows],
                {name: values[rows] for name, values in rewards.items()},
                totals_R[rows],
                int(targets_R[rows.start]),
            )
            for place, step in enumerate(chosen)
            for rows in [slice(place * many, (place + 1) * many)]
        ]

    def _ending(self, group: Group, place: int) -> list[int]:
        """What comes behind a thought by rule, up to the codes of the item that was next."""
        if not self.settings.with_item:
            return []
        vocabulary = self.encoder.vocabulary
        closing = [] if group.closed_G[place] else [vocabulary.think_end]
        return [*closing, vocabulary.begin, *self.encoder.item(group.target)]

    def _excluded(self, step: Step) -> list[int]:
        """The whole history, as in evaluation, but not the target where it comes again."""
        before = self.sequences[step.user][: step.position]
        return before[before != step.target].tolist()

    def _told(self, groups: Sequence[Group]) -> dict[str, float]:
        """What is logged of the groups that are trained on."""
        items = np.concatenate([group.items_GW for group in groups])
        targets = np.repeat([group.target for group in groups], self.settings.samples)
        closed = np.concatenate([group.closed_G for group in groups])
        tokens = np.array([len(words) for group in groups for words in group.words])
        return {
            "trace_tokens": float((tokens - closed).mean()),
            "closed": float(closed.mean()),
            "legal": float((items >= 0).mean()),
            "target_in_beam": float((items == targets[:, None]).any(1).mean()),
        }


def _dead_shares(groups: Sequence[Group], dead: Sequence[bool], drawn: int) -> dict[str, float]:
    """Share of groups without variance: at first, after drawing again, and by reward."""
    by_reward = {
        f"dead_groups/{name}": float(np.mean([np.ptp(g.rewards[name]) < _SAME for g in groups]))
        for name in groups[0].rewards
    }
    return {
        "dead_groups": float(np.mean(dead)),
        "dead_groups_left": float(np.mean([group.is_dead for group in groups])),
        "groups_drawn": float(drawn),
    } | by_reward
