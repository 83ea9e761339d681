"""The token warm-up: everything is frozen but the new rows (OneRec-Think §3.1, 2510.11639)."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from whyrec.train.rows import row_parameters
from whyrec.train.trainer import AlignTrainer, processes


def warm_up(
    adapted: nn.Module,
    trainer: Callable[[], AlignTrainer],
    *,
    done: Path,
) -> None:
    """Train the new rows alone.

    Args:
        adapted: a PEFT model or a plain one; afterwards the same parameters train as before.
        trainer: makes the trainer of this phase, when everything else is frozen; it keeps the
            backbone's own rows, for without PEFT a row parameter is the whole embedding.
        done: where the trained rows are kept, and read from by a run that is resumed.
    """
    rows = dict(row_parameters(adapted))
    if done.exists():
        saved = load_file(done)
        for name, parameter in rows.items():
            parameter.data.copy_(saved[name])
        return
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name in rows)
    trainer().train()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name in trainable)
    if processes().is_main_process:
        temporary = done.with_suffix(".tmp")
        save_file({name: p.detach().cpu().contiguous() for name, p in rows.items()}, temporary)
        temporary.replace(done)
