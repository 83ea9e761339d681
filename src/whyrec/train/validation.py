"""What the trainers of all stages share: validation by ranking, and checkpoints.

The catalogue is ranked for validation users; a model that thinks, without thinking, with it, and
with both fused, at equal inputs.
"""

import json
import time
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

METRICS = ("R@5", "R@10", "N@5", "N@10")
MODES = ("", "think_", "fused_")


@dataclass(frozen=True)
class Validation:
    """Who is ranked for, and how.

    Attributes:
        examples: validation users.
        encoder: makes prompts.
        trie: the catalogue's SIDs.
        width: of the beam.
        max_history: items of a history in a prompt.
        thoughts: how to think; None for a model that does not.
    """

    examples: Examples
    encoder: PromptEncoder
    trie: Trie
    width: int
    max_history: int
    thoughts: ThoughtSettings | None = None

    def columns(
        self, model: PreTrainedModel, mine: Sequence[int], *, progress: bool
    ) -> dict[str, list[float]]:
        """By metric (`N@10`, `think_N@10`, `fused_N@10`, …), a figure for each of some users."""
        decoder = BeamDecoder(model, vocabulary=self.encoder.vocabulary, trie=self.trie)
        histories = [self.examples.histories[user] for user in mine]
        (plain,) = rank_histories(
            decoder,
            self.encoder,
            histories,
            width=self.width,
            max_history=self.max_history,
            progress="validation" if progress else "",
        )
        rankings = [plain]
        more: dict[str, list[float]] = {}
        if self.thoughts is not None:
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
            rankings += [thought, fuse([thought, plain], weights=weights, width=self.width)]
            tokens = [float(np.mean([len(ids) for ids in own])) for own in thinking.thoughts]
            more["thought_tokens"] = tokens
        columns: dict[str, list[float]] = {}
        targets_E = self.examples.targets_E[list(mine)]
        for mode, ranking in zip(MODES, rankings, strict=False):
            found = ranking_metrics(ranking.items_EW, targets_E, cutoffs=(5, 10))
            columns |= {f"{mode}{name}": found[name].tolist() for name in METRICS}
        return columns | more


class ValidatedTrainer(Trainer):
    """A TRL trainer whose evaluation is a ranking; comes before TRL's class in the bases.

    Set `validation` before the first evaluation.

    Attributes:
        evaluation_seconds: time that evaluations took.
    """

    validation: Validation
    evaluation_seconds = 0.0

    def evaluate(
        self,
        eval_dataset: object = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the catalogue for the validation users, history excluded."""
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
        model = self._whole_model().to(self.args.device)
        was_training = model.training
        model.eval()
        mine = range(self.args.process_index, len(self.validation.examples), self.args.world_size)
        with (
            torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16),
            torch.compiler.set_stance("force_eager"),  # prompts and beams have shapes of their own
        ):
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

    def _whole_model(self) -> PreTrainedModel:
        return plain_model(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # PEFT would add the whole embedding, since its size differs from the backbone's.
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save: Callable[..., Any] = model.save_pretrained
            model.save_pretrained = partial(save, save_embedding_layers=False)  # type: ignore
        super()._save(output_dir, state_dict)
        if isinstance(model, PeftModel):
            model.save_pretrained = save  # type: ignore[method-assign]

    def checkpoint_folder(self) -> Path:
        """The folder of a checkpoint of this step, made if it is not there."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        # Under FSDP the folder is made after Trainer looks whether the best checkpoint is there,
        # so that a best one would be missed, on some processes only.
        self.checkpoint_folder()
        Trainer._save_checkpoint(self, model, trial)  # TRL's would write a model card each time
