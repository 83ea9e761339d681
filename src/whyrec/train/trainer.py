"""TRL's SFTTrainer with our loss, our order of examples, and ranking as its evaluation."""

import copy
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerControl
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer

from whyrec.backbone.lora import plain_model
from whyrec.backbone.packed_blocks import PackedBlocks
from whyrec.catalog.dataset import Examples
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.ranking import Ranking, rank_histories
from whyrec.evaluation.metrics import ranking_metrics
from whyrec.prompting.encoder import PromptEncoder
from whyrec.train.loss import SidLoss, attach_sid_loss
from whyrec.train.packing import Mix, PackedOrder, Row, pack

BEST_METRIC = "eval_N@10"
METRICS = ("R@5", "R@10", "N@5", "N@10")


class AlignTrainer(SFTTrainer):
    """Trains on packed rows of a mix; evaluates by ranking the catalogue for validation users.

    Args:
        model: a causal LM, or a PEFT model around one.
        args: TRL's configuration.
        mix: the examples.
        order: how they are packed into rows, of `row_tokens` tokens each.
        encoder: makes evaluation prompts.
        sid_loss: how the loss is taken.
        valid: validation examples.
        beam_width: of the evaluation.
        max_history: items of a history in a prompt.
        compiled: compile the model's blocks, on a GPU.

    Attributes:
        trained_tokens: tokens trained on so far by this process and the others, no padding.
        evaluation_seconds: time that evaluations took.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        args: SFTConfig,
        mix: Mix,
        order: PackedOrder,
        encoder: PromptEncoder,
        sid_loss: SidLoss,
        valid: Examples,
        beam_width: int,
        max_history: int,
        compiled: bool = False,
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
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        rows = Dataset.from_dict({"index": range(len(mix))})
        super().__init__(
            model=model,
            args=args,
            # Rows are numbers of examples, which the collator renders when their turn comes.
            train_dataset=rows,
            # Trainer wants a data set before it evaluates; `evaluate` ranks `valid` instead.
            eval_dataset=rows,
            data_collator=partial(
                _render_row,
                mix=mix,
                tokens=order.tokens,
                longest=order.longest,
                documents=order.most,
                vocabulary=encoder.vocabulary,
                trie=sid_loss.trie.to("cpu"),
                pad_id=encoder.tokenizer.pad_token_id,
            ),
            processing_class=encoder.tokenizer,
        )
        self.order = order
        self.encoder, self.sid_loss = encoder, sid_loss
        self.valid, self.beam_width, self.max_history = valid, beam_width, max_history
        self.trained_tokens, self.evaluation_seconds = 0, 0.0
        compiled = compiled and self.args.device.type == "cuda"
        # Graphs give gradients in one place each: for one process and one row a step.
        alone = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        self.blocks = PackedBlocks(
            plain_model(self.model), longest=order.longest, graphs=compiled and alone
        )
        attach_sid_loss(plain_model(self.model), sid_loss, blocks=self.blocks)
        if compiled:
            _compile_blocks(plain_model(self.model))

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

    def evaluate(
        self,
        eval_dataset: object = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the catalogue for the validation users: R@5, N@5, R@10, N@10, history excluded."""
        start = time.perf_counter()
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.rank_valid().items()}
        self.evaluation_seconds += time.perf_counter() - start
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
        with (
            torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16),
            torch.compiler.set_stance("force_eager"),  # prompts and beams have shapes of their own
        ):
            columns = self._rank(decoder, mine)
        model.train(was_training)
        if _launched_with_fsdp():
            model.to("cpu")  # a whole model beside its shards would fill the GPU
        everyone = np.asarray(gather_object(list(zip(*columns.values(), strict=True))))
        return dict(zip(columns, everyone.mean(0).tolist(), strict=True))

    def _rank(self, decoder: BeamDecoder, mine: np.ndarray) -> dict[str, list[float]]:
        """By metric, a figure for each of some validation users."""
        return self._figures(self._rank_histories(decoder, mine), mine)

    def _rank_histories(self, decoder: BeamDecoder, mine: np.ndarray) -> Ranking:
        (ranking,) = rank_histories(
            decoder,
            self.encoder,
            [self.valid.histories[i] for i in mine],
            width=self.beam_width,
            max_history=self.max_history,
            progress="validation" if self.accelerator.is_main_process else "",
        )
        return ranking

    def _figures(self, ranking: Ranking, mine: np.ndarray) -> dict[str, list[float]]:
        found = ranking_metrics(ranking.items_EW, self.valid.targets_E[mine], cutoffs=(5, 10))
        return {name: found[name].tolist() for name in METRICS}

    def train(self, *arguments: object, **settings: object) -> TrainOutput:
        result = super().train(*arguments, **settings)
        self.blocks.release()
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
        # Under FSDP the folder is made after Trainer looks whether the best checkpoint is there,
        # so that a best one would be missed, on some processes only.
        name = f"checkpoint-{self.state.global_step}"
        Path(self.args.output_dir, name).mkdir(parents=True, exist_ok=True)
        Trainer._save_checkpoint(self, model, trial)  # TRL's would write a model card each time


def _compile_blocks(model: PreTrainedModel) -> None:
    """Compile the transformer blocks in place: all of them share one compiled function."""
    kinds = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.compile()


def _render_row(batch: list[dict[str, int]], *, mix: Mix, **settings: Any) -> Row:
    return pack([mix[row["index"]] for row in batch], **settings)


def _launched_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def processes() -> PartialState:
    """This process among all of the run; without a GPU accelerate must be told to look for any."""
    return PartialState(cpu=not torch.cuda.is_available())


def say(message: str) -> None:
    """A line for people, beside the progress bars."""
    print(message, file=sys.stderr, flush=True)
