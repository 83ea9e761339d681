"""What the trainers of reasoning enhancement share: validation by ranking, and checkpoints.

A model is validated as `activate` does it: the catalogue is ranked for validation users without
thinking, with thinking, and with both fused, at equal inputs.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerControl

from whyrec.backbone.lora import plain_model
from whyrec.catalog.dataset import Examples
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.ranking import rank_histories
from whyrec.decode.think import Thinker, ThoughtSettings
from whyrec.decode.thought_ranking import fuse, rank_thinking
from whyrec.evaluation.metrics import ranking_metrics
from whyrec.prompting.encoder import PromptEncoder
from whyrec.sid.trie import Trie
from whyrec.stage import write_json
from whyrec.train.thinking import MODES
from whyrec.train.trainer import METRICS


@dataclass(frozen=True)
class Validation:
    """Who is ranked for, and how.

    Attributes:
        examples: validation users.
        encoder: makes prompts.
        trie: the catalogue's SIDs.
        thoughts: how to think.
        width: of the beam.
        max_history: items of a history in a prompt.
    """

    examples: Examples
    encoder: PromptEncoder
    trie: Trie
    thoughts: ThoughtSettings
    width: int
    max_history: int

    def columns(
        self, model: PreTrainedModel, mine: Sequence[int], *, progress: bool
    ) -> dict[str, list[float]]:
        """By metric (`N@10`, `think_N@10`, `fused_N@10`, …), a figure for each of some users."""
        decoder = BeamDecoder(model, vocabulary=self.encoder.vocabulary, trie=self.trie)
        histories = [self.examples.histories[user] for user in mine]
        targets_E = self.examples.targets_E[list(mine)]
        (plain,) = rank_histories(
            decoder,
            self.encoder,
            histories,
            width=self.width,
            max_history=self.max_history,
            progress="validation" if progress else "",
        )
        thinking = rank_thinking(
            Thinker(decoder, self.encoder),
            histories,
            settings=self.thoughts,
            keys=self.examples.users_E[list(mine)].tolist(),
            width=self.width,
            max_history=self.max_history,
            progress="thinking" if progress else "",
        )
        (thought,) = thinking.rankings
        weights = [self.thoughts.weight, 1 - self.thoughts.weight]
        fused = fuse([thought, plain], weights=weights, width=self.width)
        columns: dict[str, list[float]] = {}
        for mode, ranking in zip(MODES, (plain, thought, fused), strict=True):
            found = ranking_metrics(ranking.items_EW, targets_E, cutoffs=(5, 10))
            columns |= {f"{mode}{name}": found[name].tolist() for name in METRICS}
        tokens = [float(np.mean([len(ids) for ids in own])) for own in thinking.thoughts]
        return columns | {"thought_tokens": tokens}


class ValidatedTrainer(Trainer):
    """A TRL trainer whose evaluation is a ranking; comes before TRL's class in the bases.

    Set `validation` before the first evaluation.
    """

    validation: Validation

    def evaluate(
        self,
        eval_dataset: object = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the catalogue for the validation users, with thinking and without."""
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.rank_valid().items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def rank_valid(self) -> dict[str, float]:
        """Mean validation metrics; each process ranks its share of the users."""
        model = plain_model(self.model).to(self.args.device)
        was_training = model.training
        model.eval()
        mine = range(self.args.process_index, len(self.validation.examples), self.args.world_size)
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            columns = self.validation.columns(
                model, mine, progress=self.accelerator.is_main_process
            )
        model.train(was_training)
        everyone = np.asarray(gather_object(list(zip(*columns.values(), strict=True))))
        return dict(zip(columns, everyone.mean(0).tolist(), strict=True))

    def validated_start(self, file: Path) -> dict[str, float]:
        """Validation of the model before its first step: the first candidate.

        Args:
            file: where it is kept, so that it is measured once however often training resumes.
        """
        if not file.exists():
            start = self.rank_valid()
            if self.accelerator.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, start)
            self.accelerator.wait_for_everyone()
        return json.loads(file.read_text(encoding="utf-8"))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # PEFT would add the whole embedding, since its size differs from the backbone's.
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save: Callable[..., Any] = model.save_pretrained
            model.save_pretrained = partial(save, save_embedding_layers=False)  # type: ignore
        super()._save(output_dir, state_dict)
        if isinstance(model, PeftModel):
            model.save_pretrained = save  # type: ignore[method-assign]

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        Trainer._save_checkpoint(self, model, trial)  # TRL's would write a model card each time
