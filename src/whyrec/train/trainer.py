"""TRL's SFTTrainer with our loss, our order of examples, and ranking as its evaluation."""

import copy
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer

from whyrec.backbone.fused_projections import fuse_projections
from whyrec.backbone.lora import plain_model
from whyrec.backbone.packed_blocks import PackedBlocks
from whyrec.train.averaging import WeightAverage
from whyrec.train.loss import SidLoss, attach_sid_loss
from whyrec.train.packing import Mix, PackedOrder, Row, pack
from whyrec.train.rows import KeepRows, row_parameters
from whyrec.train.validation import ValidatedTrainer, Validation


class AlignTrainer(ValidatedTrainer, SFTTrainer):
    """Trains on packed rows of a mix; evaluates by ranking the catalogue for validation users.

    Args:
        model: a causal LM, or a PEFT model around one.
        args: TRL's configuration.
        mix: the examples.
        order: how they are packed into rows, of `row_tokens` tokens each.
        sid_loss: how the loss is taken.
        validation: who is ranked for in evaluations, and how.
        compiled: compile the model's blocks, on a GPU.
        average: decay of the weights' average, which is validated and kept; 0 for none.
        block_lr: learning rate of all weights but the tokens' rows, where it is another; 0 else.
        new_rows: ids of the tokens whose rows train, where the others are to stay as they are.

    Attributes:
        trained_tokens: tokens trained on so far by this process and the others, no padding.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        args: SFTConfig,
        mix: Mix,
        order: PackedOrder,
        sid_loss: SidLoss,
        validation: Validation,
        compiled: bool = False,
        average: float = 0.0,
        block_lr: float = 0.0,
        new_rows: Sequence[int] | None = None,
    ) -> None:
        self.block_lr, self.new_rows = block_lr, new_rows
        # FSDP2 shards a model in place. A copy is sharded instead: `model`, the caller's, stays
        # whole for ranking and saving, and has the trained weights after every `train`.
        self.whole = model
        if launched_with_fsdp():
            if isinstance(model, PeftModel):
                raise ValueError(
                    "FSDP cannot shard LoRA's trainable token rows; set lora_rank: 0, or launch "
                    "with recipes/accelerate/gpus.yaml, which keeps the weights whole"
                )
            if average:
                raise ValueError("FSDP shards the weights, which are not averaged; set average: 0")
            model = copy.deepcopy(model.to("cpu"))
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        tokenizer = validation.encoder.tokenizer
        rows = Dataset.from_dict({"index": range(len(mix))})
        super().__init__(
            model=model,
            args=args,
            # Rows are numbers of examples, which the collator renders when their turn comes.
            train_dataset=rows,
            # Trainer wants a data set before it evaluates; `evaluate` ranks users instead.
            eval_dataset=rows,
            data_collator=partial(
                _render_row,
                mix=mix,
                tokens=order.tokens,
                longest=order.longest,
                documents=order.most,
                vocabulary=sid_loss.vocabulary,
                trie=sid_loss.trie.to("cpu"),
                pad_id=tokenizer.pad_token_id,
            ),
            processing_class=tokenizer,
        )
        self.order = order
        self.validation, self.trained_tokens = validation, 0
        compiled = compiled and self.args.device.type == "cuda"
        # Graphs give gradients in one place each: for one process and one row a step.
        alone = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        self.blocks = PackedBlocks(
            plain_model(self.model), longest=order.longest, graphs=compiled and alone
        )
        self.average = WeightAverage(self.model, decay=average) if average else None
        if self.average is not None:
            self.add_callback(self.average)
        if new_rows is not None:
            self.add_callback(KeepRows(new_rows))
        attach_sid_loss(plain_model(self.model), sid_loss, blocks=self.blocks)
        if compiled:
            _compile_blocks(plain_model(self.model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Transformers' own, with a rate and a decay of their own for the tokens' rows."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if made or not (self.block_lr or self.new_rows is not None):
            return optimizer
        rows = {id(p) for _, p in row_parameters(self.model if model is None else model)}
        groups = []
        for group in optimizer.param_groups:
            of_rows = [p for p in group["params"] if id(p) in rows]
            others = [p for p in group["params"] if id(p) not in rows]
            decay = group["weight_decay"] if self.new_rows is None else 0.0
            groups.append(group | {"params": of_rows, "weight_decay": decay})
            groups.append(group | {"params": others, "lr": self.block_lr or group["lr"]})
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_sampler=self.order,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.device.type == "cuda",
            )
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert not return_outputs, "the loss computes no logits"
        self.trained_tokens += inputs.pop("num_tokens") * self.args.world_size
        # Not left to Accelerate, whose wrapper around `forward` a second trainer loses.
        with self.accelerator.autocast():
            outputs = model(
                **inputs,
                sid_loss=True,
                num_items_in_batch=num_items_in_batch,
            )
        # `num_items_in_batch` counts the labels of all processes, whose gradients DDP averages.
        many = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return outputs.loss * (self.accelerator.num_processes if many else 1)

    def rank_valid(self) -> dict[str, float]:
        """Mean validation metrics; each process ranks its share of the users."""
        self._gather()
        with self.average.in_place() if self.average is not None else nullcontext():
            found = super().rank_valid()
        if launched_with_fsdp():
            self._whole_model().to("cpu")  # a whole model beside its shards would fill the GPU
        return found

    def rank_whole(self) -> dict[str, float]:
        """The same of the caller's model as it is, whatever was done to it since training."""
        return super().rank_valid()

    def _whole_model(self) -> PreTrainedModel:
        return plain_model(self.whole)

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:
        if self.average is not None and resume_from_checkpoint:
            self.average.resume(Path(resume_from_checkpoint))
        result = super().train(resume_from_checkpoint=resume_from_checkpoint)
        self.blocks.release()
        self._gather()
        return result

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        # First: a checkpoint counts as whole once its last file, the trainer's state, is there.
        if self.average is not None and self.accelerator.is_main_process:
            self.average.save(self.checkpoint_folder())
        super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.average.resume(Path(self.state.best_model_checkpoint))
            self.average.adopt()

    @torch.no_grad()
    def _gather(self) -> None:
        """Copy the weights of all shards into the whole model; every process must call it."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last layers stay gathered after a forward pass, in bf16
        for whole, shard in zip(self.whole.parameters(), self.model.parameters(), strict=True):
            if isinstance(shard, DTensor):
                whole.copy_(shard.full_tensor())


def _compile_blocks(model: PreTrainedModel) -> None:
    """Fuse and compile, in place, the transformer blocks and the norm behind them.

    All blocks share one compiled function.
    """
    # A training has rows of one shape. Functions of an earlier one's shapes would let this one be
    # compiled for shapes of all kinds, which is slower, or count against how many there may be.
    torch.compiler.reset()
    fuse_projections(model)
    kinds = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.compile(dynamic=False)
    # As PyTorch's own kernels it is twenty passes over the row, forward and backward.
    if isinstance(norm := getattr(model.base_model, "norm", None), nn.Module):
        norm.compile(dynamic=False)


def _render_row(batch: list[dict[str, int]], *, mix: Mix, **settings: Any) -> Row:
    return pack([mix[row["index"]] for row in batch], **settings)


def launched_with_fsdp() -> bool:
    """Whether accelerate was told to shard the weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def processes() -> PartialState:
    """This process among all of the run; without a GPU accelerate must be told to look for any."""
    return PartialState(cpu=not torch.cuda.is_available())


def say(message: str) -> None:
    """A line for people, beside the progress bars."""
    print(message, file=sys.stderr, flush=True)
