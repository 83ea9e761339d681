"""Group-relative policy optimisation of thoughts by TRL's GRPOTrainer.

GRPO (Shao et al. 2024, arXiv 2402.03300): of G thoughts after one prompt, each is pushed up or down
by how far its reward lies above the group's mean, in units of the group's deviation, with a penalty
for leaving the model that training started from:

    loss = − Σ_words min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) / #words + β · KL(π ‖ π_start)
    ρ = π(word) / π_old(word),   A = (reward − mean_G) / std_G

Only what the model drew is trained: the words of a thought, and the `</think>` that it closed it
with. Not the prompt; not the `</think>` that the budget put there; not `<|sid_begin|>` and the SID,
which a deterministic beam found. The SID's codes change with the weights that they share with the
thought, which is why validation also ranks without thinking.

With `item_weight` ω above 0 the item that was really next is trained too, behind each sampled
thought: loss − ω · log π(item | prompt, thought). A reward that is itself the item's probability
has a gradient through the item's codes besides the one through the words; this is it.

π, π_old and π_start are the distributions that words were drawn from (`policy.py`), with dropout
off; where all of a rollout makes one optimizer step, π_old is π itself and ρ is 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from whyrec.backbone.lora import plain_model
from whyrec.train.policy import Policy, attach_policy, score
from whyrec.train.rollouts import Roller
from whyrec.train.validation import ValidatedTrainer, Validation

# TRL tells these of text that ends in an end-of-text token, which thoughts do not.
_UNTOLD = ("completions/", "clip_ratio/low", "clip_ratio/high", "num_tokens", "frac_reward")


class ThoughtGrpoTrainer(ValidatedTrainer, GRPOTrainer):
    """GRPO over thoughts that are rolled out in process.

    Args:
        model: a causal LM that has learnt to think, or a PEFT model around one.
        args: TRL's configuration, with `beta` 0: the reference below is used instead of one that
            TRL would load by the name of the backbone.
        order: numbers of the training steps, in the order of their turns, over all epochs.
        roller: makes the rollouts; names and weighs the rewards.
        policy: what words are drawn from, on the model's device.
        reference: the model that training starts from, frozen; None where `kl_weight` is 0.
        kl_weight: β.
        item_weight: ω; the roller must give the item where it is above 0.
        tokenizer: of the model.
        validation: who is ranked for in evaluations.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        args: GRPOConfig,
        order: Sequence[int],
        roller: Roller,
        policy: Policy,
        reference: PreTrainedModel | None,
        kl_weight: float,
        item_weight: float,
        tokenizer: PreTrainedTokenizerBase,
        validation: Validation,
    ) -> None:
        assert args.beta == 0 and args.temperature == policy.temperature
        assert (reference is not None) == (kl_weight > 0)
        assert roller.settings.with_item == (item_weight > 0)
        args.reward_weights = list(roller.settings.weights)
        rows = Dataset.from_dict({"prompt": [str(step) for step in order]})
        super().__init__(
            model=model,
            reward_funcs=[_told_by_roller(name) for name in roller.settings.rewards],
            args=args,
            train_dataset=rows,
            # Trainer wants a data set before it evaluates; `evaluate` ranks users instead.
            eval_dataset=rows,
            processing_class=tokenizer,
            rollout_func=roller,
        )
        self.validation, self.policy, self.item_weight = validation, policy, item_weight
        self._codes_BL: Tensor | None = None  # log-probabilities of the last training forward
        attach_policy(plain_model(self.model), policy)
        if reference is not None:
            attach_policy(reference, policy)
            self.ref_model = reference.to(self.args.device).requires_grad_(False).eval()
            self.beta = kl_weight

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: object,
    ) -> tuple[Tensor, Tensor | None, None]:
        """As TRL's, but of the distributions that words were drawn from, and without padding."""
        # The codes and the bracket before them are no words; a `</think>` that the budget put
        # there is scored as one, but TRL's mask leaves it out of the loss.
        text_BT = attention_mask.bool() & self.policy.text_V[input_ids]
        text_BT[:, :-logits_to_keep] = False
        words, entropies, mass = [], [], []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(start, start + (batch_size or len(input_ids)))
            codes_BL = None
            if compute_entropy and self.item_weight:  # the forward pass of the loss
                codes_BL = self._last_codes(input_ids[rows], attention_mask[rows])
            # Not left to Accelerate, whose wrapper around `forward` the reference has not.
            with self.accelerator.autocast():
                scored = score(
                    model,
                    ids_BT=input_ids[rows],
                    mask_BT=attention_mask[rows],
                    text_BT=text_BT[rows],
                    codes_BL=codes_BL,
                )
            words.append(scored.words_BT[:, -logits_to_keep:])
            entropies.append(scored.entropies_BT[:, -logits_to_keep:])
            mass.append(scored.mass_BT.sum() / text_BT[rows].sum())
            self._codes_BL = scored.codes_BL
        if compute_entropy:
            share = self.accelerator.gather(torch.stack(mass).mean()).mean()
            self._metrics["train"]["text_mass"].append(share.item())
        return torch.cat(words), torch.cat(entropies) if compute_entropy else None, None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.item_weight:
            assert self._codes_BL is not None
            nll = -self._codes_BL.sum(1).mean()
            told = self.accelerator.gather(nll.detach()).mean().item()
            self._metrics["train"]["item_nll"].append(told)
            loss = loss + self.item_weight * nll / self.current_gradient_accumulation_steps
        self._codes_BL = None
        return loss

    def _last_codes(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The codes that each sequence ends in, [B, L]."""
        offsets_L = torch.tensor(self.policy.vocabulary.offsets, device=ids_BT.device)
        last_B1 = (mask_BT.bool() * torch.arange(mask_BT.shape[1], device=ids_BT.device)).amax(
            1, keepdim=True
        )
        level_L = torch.arange(len(offsets_L), device=ids_BT.device)
        return ids_BT.gather(1, last_B1 + 1 - len(offsets_L) + level_L) - offsets_L

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in [n for n in self._metrics["train"] if n.startswith(_UNTOLD)]:
            del self._metrics["train"][name]
        super().log(logs, start_time)


def _told_by_roller(name: str) -> Callable[..., list[float]]:
    """A reward function for TRL that reads what the rollouts earned already."""

    def earned(**columns: Any) -> list[float]:
        return columns[f"reward_{name}"]

    earned.__name__ = name
    return earned
