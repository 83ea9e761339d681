"""The token warm-up: everything is frozen but the new rows (OneRec-Think §3.1, 2510.11639)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from whyrec.backbone.lora import plain_model
from whyrec.train.trainer import AlignTrainer, processes


def warm_up(
    adapted: nn.Module,
    trainer: Callable[[], AlignTrainer],
    *,
    done: Path,
    token_ids: list[int],
) -> None:
    """Train the new rows alone.

    Args:
        adapted: a PEFT model or a plain one; afterwards the same parameters train as before.
        trainer: makes the trainer of this phase, when everything else is frozen.
        done: where the trained rows are kept, and read from by a run that is resumed.
        token_ids: ids of the new rows.
    """
    rows = dict(_row_parameters(adapted))
    if done.exists():
        saved = load_file(done)
        for name, parameter in rows.items():
            parameter.data.copy_(saved[name])
        return
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name in rows)
    # Without PEFT a row parameter is the whole embedding: its old rows get no gradient.
    hooks = []
    if not isinstance(adapted, PeftModel):
        hooks = [p.register_hook(partial(_keep_rows, token_ids=token_ids)) for p in rows.values()]
    warm = trainer()
    if warm.is_fsdp_enabled:
        warm.add_callback(_KeepRowsSharded(set(rows), token_ids))
    warm.args.weight_decay = 0.0  # decay would move the old rows too
    warm.train()
    for hook in hooks:
        hook.remove()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name in trainable)
    if processes().is_main_process:
        temporary = done.with_suffix(".tmp")
        save_file({name: p.detach().cpu().contiguous() for name, p in rows.items()}, temporary)
        temporary.replace(done)


def _keep_rows(gradient_VD: Tensor, *, token_ids: list[int]) -> Tensor:
    kept_VD = torch.zeros_like(gradient_VD)
    kept_VD[token_ids] = gradient_VD[token_ids]
    return kept_VD


class _KeepRowsSharded(TrainerCallback):
    """`_keep_rows` under FSDP2, which makes parameters, and so their hooks, anew."""

    def __init__(self, names: set[str], token_ids: list[int]) -> None:
        self.names, self.token_ids = names, token_ids

    def on_train_begin(self, *_: object, model: nn.Module, **__: object) -> None:
        for name, parameter in model.named_parameters():
            if name in self.names:
                assert isinstance(parameter, DTensor)
                kept_V1 = torch.zeros(len(parameter), 1, device=parameter.device)
                kept_V1[self.token_ids] = 1.0
                mask = distribute_tensor(kept_V1, parameter.device_mesh, parameter.placements)
                parameter.register_post_accumulate_grad_hook(lambda p, m=mask: p.grad.mul_(m))


def _row_parameters(adapted: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that hold new rows: PEFT's, or the embedding and the head themselves."""
    plain = plain_model(adapted)
    whole = {plain.get_input_embeddings().weight, plain.get_output_embeddings().weight}
    for name, parameter in adapted.named_parameters():
        is_peft_row = "trainable_tokens_delta" in name
        if is_peft_row or (not isinstance(adapted, PeftModel) and parameter in whole):
            yield name, parameter
