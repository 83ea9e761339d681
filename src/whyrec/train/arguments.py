"""TRL's configuration of one phase of training on packed rows, the same for every stage."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import INTEGRATION_TO_CALLBACK
from trl import SFTConfig

from whyrec.train.trainer import processes


def cut_rows(batch_tokens: int, *, micro: int) -> tuple[int, int]:
    """Tokens of one row, and how many rows a process trains on before an optimizer step.

    Args:
        batch_tokens: tokens of an optimizer step, over all processes.
        micro: tokens of one row at most.

    Raises:
        ValueError: when the rows of the processes would not be equal.
    """
    many = processes().num_processes
    share = batch_tokens // many
    accumulated = -(-share // micro)
    if share * many != batch_tokens or share % accumulated:
        raise ValueError(
            f"batch_tokens {batch_tokens} cannot be cut into equal rows of at most {micro} tokens "
            f"on {many} processes; make it a multiple of both"
        )
    return share // accumulated, accumulated


def training_arguments(
    folder: Path,
    *,
    num_rows: int,
    accumulated: int,
    lr: float,
    weight_decay: float,
    evaluations: int,
    max_steps: int = 0,
    seed: int,
    best_metric: str = "N@10",
    logs: Path,
    report_to: str,
) -> SFTConfig:
    """The configuration; the global batch is the same on any number of processes.

    Args:
        folder: for checkpoints.
        num_rows: rows that there are to train on.
        accumulated: rows of a process in an optimizer step.
        lr: peak of the cosine schedule.
        weight_decay: of AdamW.
        evaluations: evenly over the steps, each with a checkpoint; none without.
        max_steps: optimizer steps at most; 0 for all rows.
        seed: of dropout.
        best_metric: what the best checkpoint is best by, such as `think_N@10`.
        logs: for TensorBoard, such as `runs/NAME/logs/aligned/mix`.
        report_to: a tracker that transformers knows, or none.
    """
    steps = max(num_rows // (accumulated * processes().num_processes), 1)
    steps = min(steps, max_steps) if max_steps else steps
    every = max(steps // max(evaluations, 1), 1)
    return SFTConfig(
        **common_arguments(
            folder,
            steps=steps,
            every=every,
            evaluated=evaluations > 0,
            lr=lr,
            weight_decay=weight_decay,
            best_metric=best_metric,
            seed=seed,
            logs=logs,
            report_to=report_to,
        ),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulated,
        max_length=None,
        accelerator_config={
            "even_batches": False,  # rows hold different numbers of examples
            # Else the host waits, before it sends a row, for the step before: the GPU then idles
            # until the next one has come from the loader and its first kernels are launched.
            "non_blocking": torch.cuda.is_available(),
        },
        dataloader_num_workers=4 if torch.cuda.is_available() else 0,
        logging_steps=max(every // 5, 1),
    )


def common_arguments(
    folder: Path,
    *,
    steps: int,
    every: int,
    lr: float,
    weight_decay: float,
    best_metric: str,
    seed: int,
    logs: Path,
    report_to: str,
    evaluated: bool = True,
) -> dict[str, Any]:
    """What every trainer of TRL's is told alike; arguments as above.

    Args:
        steps: optimizer steps.
        every: steps between evaluations.
        evaluated: whether there are any, each with a checkpoint.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": weight_decay,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "logging_nan_inf_filter": False,  # it makes the host wait for the GPU at every step
        "remove_unused_columns": False,
        "eval_strategy": "steps" if evaluated else "no",
        "eval_steps": every,
        "save_strategy": "steps" if evaluated else "no",
        "save_steps": every,
        "save_total_limit": 1,
        "load_best_model_at_end": evaluated,
        "metric_for_best_model": f"eval_{best_metric}",
        "greater_is_better": True,
        "seed": seed,
        **tracked(logs, report_to),
    }


def tracked(logs: Path, report_to: str) -> dict[str, str]:
    """Where one phase of training reports to, as settings of TRL's configuration.

    TensorBoard's events lie in `runs/NAME/logs/STAGE/PHASE`: beside the checkpoints, where they
    would lie else, they would be dropped with them. A resumed training goes on in the same folder.

    Args:
        logs: that folder.
        report_to: a tracker that transformers knows (tensorboard, trackio, wandb, mlflow, …), or
            none.

    Raises:
        ValueError: when there is no such tracker, or its package is missing.
    """
    if report_to not in ("none", "all"):
        if report_to not in INTEGRATION_TO_CALLBACK:
            known = ", ".join([*INTEGRATION_TO_CALLBACK, "none"])
            raise ValueError(f"report_to: there is no tracker {report_to!r}; choose of {known}")
        try:
            INTEGRATION_TO_CALLBACK[report_to]()  # each says what it lacks
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"report_to {report_to!r} cannot be used: {error}") from None
    run, _, stage, phase = logs.parts[-4:]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)  # transformers 5 reads it nowhere else
    return {"report_to": report_to, "run_name": f"{run}-{stage}-{phase}"}


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: its state is written last, so a killed one has none."""

    def steps_done(checkpoint: Path) -> int:
        try:
            return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError):
            return 0

    last = max(folder.glob("checkpoint-*"), key=steps_done, default=None)
    return str(last) if last is not None and steps_done(last) else None
