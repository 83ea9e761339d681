"""Direct preference optimisation of thought and item together, by TRL's DPOTrainer.

DPO (Rafailov et al. 2023, arXiv 2305.18290) with several rejected replies to a chosen one, in the
manner of S-DPO (Chen et al. 2024, arXiv 2406.09215):

    s(reply) = β · log π(reply | prompt) / π_start(reply | prompt)
    loss = log(1 + Σ_rejected exp(s(rejected) − s(chosen))) − ω · log π(chosen) / #tokens

With one rejected reply and ω = 0 this is DPO. The last term (RPO, Pang et al. 2024, arXiv
2404.19733) keeps the chosen reply from becoming less likely along with the rejected ones.

A reply's probability is that of what the model chose: the words of the thought, the `</think>` if
it closed the thought itself, and the codes of the item among the legal ones (`policy.py`). What the
recommender adds by rule, a `</think>` at the end of the budget, `<|sid_begin|>` and `<|sid_end|>`,
counts for nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from whyrec.backbone.lora import plain_model
from whyrec.prompting.encoder import PromptEncoder
from whyrec.reasoning.asking import Step
from whyrec.train.policy import Policy, Scored, attach_policy, score
from whyrec.train.preferences import Preference
from whyrec.train.validation import ValidatedTrainer, Validation


class ReplyCollator:
    """Lays preferences out as a batch of replies: for each its chosen one, then its rejected ones.

    Args:
        preferences: all of them.
        steps: the training steps that they are of.
        encoder: makes prompts.
        codes_NL: the catalogue's SIDs.
    """

    def __init__(
        self,
        preferences: Sequence[Preference],
        *,
        steps: Sequence[Step],
        encoder: PromptEncoder,
        codes_NL: Tensor,
    ) -> None:
        self.preferences, self.steps = preferences, steps
        self.encoder, self.codes_NL = encoder, codes_NL

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        """`ids` [B, T], `mask`, `text` (which are words of a thought), `codes` [B, L], and `group`
        [B], the place of a reply's prompt in the batch; the first of a group is the chosen one."""
        ids, text, items, group = [], [], [], []
        vocabulary = self.encoder.vocabulary
        for place, row in enumerate(rows):
            preference = self.preferences[row["index"]]
            step = self.steps[preference.step]
            prompt = self.encoder.thinking_prompt(step.history, own=step.own)
            replies = [preference.chosen, *preference.rejected]
            for words, item in zip(
                replies, [preference.chosen_item, *preference.rejected_items], strict=True
            ):
                closed = bool(words) and words[-1] == vocabulary.think_end
                ending = [] if closed else [vocabulary.think_end]
                ending += [vocabulary.begin, *self.encoder.item(item)]
                ids.append(torch.tensor([*prompt, *words, *ending]))
                marks = [False] * len(prompt) + [True] * len(words) + [False] * len(ending)
                text.append(torch.tensor(marks))
                items.append(item)
                group.append(place)
        return {
            "ids": pad_sequence(ids, batch_first=True),
            "mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).bool(),
            "text": pad_sequence(text, batch_first=True),
            "codes": self.codes_NL[items],
            "group": torch.tensor(group),
        }


def preference_loss(scores_B: Tensor, group_B: Tensor) -> Tensor:
    """S-DPO's loss of each group: log(1 + Σ exp(s(rejected) − s(chosen))), float32 [P].

    Args:
        scores_B: β · log ratios; the first of a group is the chosen reply's.
        group_B: the group of each reply, from 0, ascending.

    >>> preference_loss(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 0])).exp()
    tensor([3.])
    """
    is_chosen_B = F.pad(group_B.diff() > 0, (1, 0), value=True)
    chosen_P = scores_B[is_chosen_B]
    margins_B = scores_B - chosen_P[group_B]  # 0 for the chosen reply itself: the 1 in the sum
    member_PB = group_B == torch.arange(len(chosen_P), device=group_B.device)[:, None]
    return torch.where(member_PB, margins_B, -torch.inf).logsumexp(1)


class ReplyDpoTrainer(ValidatedTrainer, DPOTrainer):
    """DPO over replies of a thought and an item.

    Args:
        model: a causal LM that has learnt to think, or a PEFT model around one.
        args: TRL's configuration; its `beta` is β.
        order: numbers of the preferences, in the order of their turns, over all epochs.
        collator: of the preferences.
        policy: what words and codes are drawn from, on the model's device.
        reference: the model that training starts from.
        nll_weight: ω.
        tokenizer: of the model.
        validation: who is ranked for in evaluations.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        args: DPOConfig,
        order: Sequence[int],
        collator: ReplyCollator,
        policy: Policy,
        reference: PreTrainedModel,
        nll_weight: float,
        tokenizer: PreTrainedTokenizerBase,
        validation: Validation,
    ) -> None:
        rows = Dataset.from_dict({"index": list(order)})
        super().__init__(
            model=model,
            ref_model=reference.requires_grad_(False).eval(),
            args=args,
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=rows,  # as for GRPO: `evaluate` ranks users instead
            processing_class=tokenizer,
        )
        self.nll_weight, self.validation = nll_weight, validation
        attach_policy(plain_model(self.model), policy)
        attach_policy(self.accelerator.unwrap_model(self.ref_model), policy)

    def _prepare_dataset(self, dataset: Dataset, *_: object, **__: object) -> Dataset:
        return dataset  # rows are numbers of preferences, which the collator renders

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # `order` is the order

    def _compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool
    ) -> Tensor:
        assert not return_outputs, "the loss computes no logits"
        batch: dict[str, Any] = {
            "ids_BT": inputs["ids"],
            "mask_BT": inputs["mask"],
            "text_BT": inputs["text"],
            "codes_BL": inputs["codes"],
        }
        with self.accelerator.autocast():
            scored = score(model, **batch)
            with torch.no_grad():
                start = score(self.ref_model, **batch)
        ratios_B = _reply_log_probs(scored) - _reply_log_probs(start)
        group_B = inputs["group"]
        is_chosen_B = F.pad(group_B.diff() > 0, (1, 0), value=True)
        scores_B = self.beta * ratios_B
        losses_P = preference_loss(scores_B, group_B)
        tokens_B = inputs["text"].sum(1) + inputs["codes"].shape[1]
        nll_P = (-_reply_log_probs(scored) / tokens_B)[is_chosen_B]
        margins_B = (scores_B[is_chosen_B][group_B] - scores_B).detach()[~is_chosen_B]
        words = inputs["text"].sum()
        self._tell("margin", margins_B.mean())
        self._tell("accuracy", (margins_B > 0).float().mean())
        self._tell("chosen_nll", nll_P.detach().mean())
        self._tell("chosen_log_ratio", ratios_B.detach()[is_chosen_B].mean())
        self._tell("rejected_log_ratio", ratios_B.detach()[~is_chosen_B].mean())
        # k3 of words that the start drew: an estimate of KL(start ‖ now), in nats a word.
        log_ratio_BT = scored.words_BT.detach() - start.words_BT
        self._tell("kl", (log_ratio_BT.exp() - log_ratio_BT - 1).sum() / words)
        self._tell("entropy", scored.entropies_BT.sum() / words)
        self._tell("text_mass", scored.mass_BT.sum() / words)
        self._tell("trace_tokens", inputs["text"].sum(1).float().mean())
        return losses_P.mean() + self.nll_weight * nll_P.mean()

    def _tell(self, name: str, value: Tensor) -> None:
        self._metrics["train"][name].append(self.accelerator.gather(value.float()).mean().item())


def _reply_log_probs(scored: Scored) -> Tensor:
    """Log-probability of each reply: of its words and its codes [B]."""
    return scored.words_BT.sum(1) + scored.codes_BL.sum(1)
