"""TRL's SFTTrainer with our loss, our order of examples, and ranking as its evaluation."""

import copy
import os
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer

from whyrec.backbone.lora import plain_model
from whyrec.catalog.dataset import Examples
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.ranking import rank_histories
from whyrec.evaluation.metrics import ranking_metrics
from whyrec.prompting.encoder import PromptEncoder
from whyrec.train.loss import SidLoss, attach_sid_loss
from whyrec.train.mix import AlignmentMix, BucketedOrder, collate

BEST_METRIC = "eval_N@10"


class AlignTrainer(SFTTrainer):
    """Trains on an `AlignmentMix`; evaluates by ranking the catalogue for validation users.

    Args:
        model: a causal LM, or a PEFT model around one.
        args: TRL's configuration.
        mix: the examples.
        encoder: makes evaluation prompts.
        sid_loss: how the loss is taken.
        valid: validation examples.
        beam_width: of the evaluation.
        max_history: items of a history in a prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        args: SFTConfig,
        mix: AlignmentMix,
        encoder: PromptEncoder,
        sid_loss: SidLoss,
        valid: Examples,
        beam_width: int,
        max_history: int,
    ) -> None:
        # FSDP2 shards a model in place. A copy is sharded instead: `model`, the caller's, stays
        # whole for ranking and saving, and has the trained weights after every `train`.
        self.whole = model
        if _launched_with_fsdp():
            if isinstance(model, PeftModel):
                raise ValueError(
                    "FSDP cannot shard LoRA's trainable token rows; set lora_rank: 0, or launch "
                    "with recipes/accelerate/gpus.yaml, which keeps the weights whole"
                )
            model = copy.deepcopy(model.to("cpu"))
        pad_id = encoder.tokenizer.pad_token_id
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        rows = Dataset.from_dict({"index": range(len(mix))})
        super().__init__(
            model=model,
            args=args,
            # Rows are numbers of examples, which the collator renders when their turn comes.
            train_dataset=rows,
            # Trainer wants a data set before it evaluates; `evaluate` ranks `valid` instead.
            eval_dataset=rows,
            data_collator=lambda batch: collate([mix[r["index"]] for r in batch], pad_id=pad_id),
            processing_class=encoder.tokenizer,
        )
        self.mix = mix
        self.encoder, self.sid_loss = encoder, sid_loss
        self.valid, self.beam_width, self.max_history = valid, beam_width, max_history
        attach_sid_loss(plain_model(self.model), sid_loss)

    def _get_train_sampler(self, train_dataset: object = None) -> Sampler[int]:
        # The global batch, so that the order is the same on any number of processes.
        batch_size = self.args.train_batch_size * self.args.world_size
        batch_size *= self.args.gradient_accumulation_steps
        return BucketedOrder(self.mix, batch_size=batch_size, seed=self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert not return_outputs, "the loss computes no logits"
        outputs = model(**inputs, sid_loss=True, num_items_in_batch=num_items_in_batch)
        self._total_train_tokens += int(inputs["input_ids"].numel()) * self.args.world_size
        # `num_items_in_batch` counts the labels of all processes, whose gradients DDP averages.
        many = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return outputs.loss * (self.accelerator.num_processes if many else 1)

    def evaluate(
        self,
        eval_dataset: object = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the catalogue for the validation users: R@5, N@5, R@10, N@10, history excluded."""
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.rank_valid().items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def rank_valid(self) -> dict[str, float]:
        """Mean validation metrics; each process ranks its share of the users."""
        self._gather()
        model = plain_model(self.whole).to(self.args.device)
        was_training = model.training
        model.eval()
        decoder = BeamDecoder(model, vocabulary=self.encoder.vocabulary, trie=self.sid_loss.trie)
        mine = np.arange(self.args.process_index, len(self.valid), self.args.world_size)
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            (ranking,) = rank_histories(
                decoder,
                self.encoder,
                [self.valid.histories[i] for i in mine],
                width=self.beam_width,
                max_history=self.max_history,
                progress="validation" if self.accelerator.is_main_process else "",
            )
        model.train(was_training)
        if _launched_with_fsdp():
            model.to("cpu")  # a whole model beside its shards would fill the GPU
        metrics = ranking_metrics(ranking.items_EW, self.valid.targets_E[mine], cutoffs=(5, 10))
        rows = zip(
            *(metrics[name].tolist() for name in ("R@5", "R@10", "N@5", "N@10")), strict=True
        )
        everyone = np.asarray(gather_object(list(rows)))
        means = everyone.mean(0).tolist()
        return dict(zip(("R@5", "R@10", "N@5", "N@10"), means, strict=True))

    def train(self, *arguments: object, **settings: object) -> TrainOutput:
        result = super().train(*arguments, **settings)
        self._gather()
        return result

    @torch.no_grad()
    def _gather(self) -> None:
        """Copy the weights of all shards into the whole model; every process must call it."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last layers stay gathered after a forward pass, in bf16
        for whole, shard in zip(self.whole.parameters(), self.model.parameters(), strict=True):
            if isinstance(shard, DTensor):
                whole.copy_(shard.full_tensor())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # PEFT would add the whole embedding, since its size differs from the backbone's.
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save: Callable = model.save_pretrained
            model.save_pretrained = partial(save, save_embedding_layers=False)  # type: ignore
        super()._save(output_dir, state_dict)
        if isinstance(model, PeftModel):
            model.save_pretrained = save  # type: ignore[method-assign]

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        Trainer._save_checkpoint(self, model, trial)  # TRL's would write a model card each time


def _launched_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def processes() -> PartialState:
    """This process among all of the run; without a GPU accelerate must be told to look for any."""
    return PartialState(cpu=not torch.cuda.is_available())


def say(message: str) -> None:
    """A line for people, beside the progress bars."""
    print(message, file=sys.stderr, flush=True)
