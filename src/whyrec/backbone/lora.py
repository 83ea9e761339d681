"""LoRA with trainable new rows (Hu et al. 2021, arXiv 2106.09685), by PEFT.

PEFT's `trainable_token_indices` keeps the new rows beside the adapter in one file: a released
checkpoint is that file, in bf16, beside the backbone that anyone can load.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel


def add_lora(
    model: PreTrainedModel, *, token_ids: Sequence[int], rank: int, alpha: float, dropout: float
) -> PeftModel:
    """Wrap a model: LoRA on every linear layer of its blocks, and the rows `token_ids` trainable.

    Args:
        model: a causal LM whose vocabulary is extended.
        token_ids: the rows of the embedding (and of the head, tied or not) that train.
        rank: LoRA rank r.
        alpha: scale; the update is alpha / sqrt(r) · B A (rank-stabilised, arXiv 2312.03732).
        dropout: on the adapters' inputs.
    """
    rows = {_name_of(model, model.get_input_embeddings()): list(token_ids)}
    if not model.config.get_text_config().tie_word_embeddings:
        rows[_name_of(model, model.get_output_embeddings())] = list(token_ids)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=True,
        target_modules="all-linear",
        trainable_token_indices=rows,
    )
    return get_peft_model(model, config)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside a PEFT model; adapters stay active in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as the plain causal LM has them with its adapter merged in; one at a time.

    Nothing is changed: PEFT's own merging adds to the weights and takes away again, which leaves a
    little behind each time.

    Args:
        model: a causal LM, with or without an adapter in it; tied weights come once.
    """
    known: set[int] = set()
    for name, module in plain_model(model).named_modules():
        if isinstance(module, TrainableTokensWrapper):
            known |= {id(weight) for weight in module.parameters()}
            # A head that is tied to the embedding has no rows of its own.
            if not module.token_adapter.tied_adapter:
                yield f"{name}.weight", module.weight
        elif isinstance(module, LoraLayer):
            known |= {id(weight) for weight in module.parameters()}
            base: Any = module.get_base_layer()
            weight = base.weight
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter)
            yield f"{name}.weight", weight
            if base.bias is not None:
                yield f"{name}.bias", base.bias
    for name, weight in plain_model(model).named_parameters():
        if id(weight) not in known:
            yield name, weight


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapter and new rows in bf16, in PEFT's own file format."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: value.detach().cpu().to(torch.bfloat16) for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    # The backbone's path is this machine's; `align` knows the backbone by its recipe name.
    path, config.base_model_name_or_path = config.base_model_name_or_path, None
    config.save_pretrained(folder)
    config.base_model_name_or_path = path


def load_adapter(model: PreTrainedModel, folder: Path, *, token_ids: Sequence[int]) -> PeftModel:
    """Put a saved adapter on a backbone whose vocabulary is extended; it stays trainable.

    Args:
        model: the backbone that the adapter was trained on.
        folder: where `save_adapter` put it.
        token_ids: the backbone's new rows; the adapter must hold these very rows.

    Raises:
        ValueError: when there is no adapter, or it does not fit this backbone.
    """
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise ValueError(f"{folder} holds no adapter_model.safetensors; name a checkpoint folder")
    try:
        saved = set(load_file(file))
    except SafetensorError as error:
        raise ValueError(f"the adapter {file} is damaged ({error}); copy it again") from error
    misfit = ValueError(
        f"the adapter in {folder} does not fit this backbone; use the backbone and the SID "
        "levels that its model card names"
    )
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (RuntimeError, ValueError, IndexError) as error:
        raise misfit from error
    # PEFT passes over layers that only one side has, and rows by other numbers.
    rows = adapted.peft_config["default"].trainable_token_indices or {}
    if saved != set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) or any(
        list(ids) != list(token_ids) for ids in rows.values()
    ):
        raise misfit
    return adapted.float() if next(model.parameters()).dtype == torch.float32 else adapted


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted).split(".")[-1]
