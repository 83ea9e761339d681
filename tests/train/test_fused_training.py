"""Whole trainings with fused blocks and short attention, against the same with neither."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from fused_on_cpu import dense_attention, fuse_in_training
from safetensors.torch import load_file
from test_align import copy_run, make_recipe, training_log
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from whyrec.backbone.fused_projections import FusedMLP
from whyrec.backbone.lora import plain_model
from whyrec.train.align import align


def saved(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    folder = run / "model" / "aligned"
    return {
        str(path.relative_to(folder)): load_file(path)
        for path in sorted(folder.rglob("*.safetensors"))
        if "model" in path.name
    }


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (True, {"lora_rank": 0, "average": 0.5}),
        (False, {"lora_rank": 0, "micro_batch_tokens": 512}),  # no accumulation
        (True, {"lora_rank": 4}),
    ],
)
def test_fused_blocks_train_rank_and_save_as_plain_ones(
    prepared_run, make_backbone, tmp_path, monkeypatch, tied: bool, settings: dict
) -> None:
    recipe = make_recipe(
        make_backbone(tied=tied), max_steps=4, evaluations=2, dropout=0.0, **settings
    )
    plain, fused = (copy_run(prepared_run, tmp_path / name) for name in ("plain", "fused"))
    align(plain, recipe)
    with monkeypatch.context() as patch:
        attention = Mock(wraps=dense_attention)
        trainers = fuse_in_training(patch.setattr, attention)
        align(fused, recipe)
    assert len(trainers) == 2  # the warm-up's and the mix's
    # Fused blocks leave the rotation to it; LoRA's, which are not, have done it.
    assert {"cos_TE" in call.kwargs for call in attention.call_args_list} == {not recipe.lora_rank}
    kinds = {type(layer.mlp) for layer in plain_model(trainers[-1].model).model.layers}
    # LoRA's adapters are no plain linear layers; with them only attention is another.
    assert kinds == {LlamaMLP if recipe.lora_rank else FusedMLP}
    logs = training_log(plain), training_log(fused)
    assert len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-4)
    ours, theirs = saved(fused), saved(plain)
    assert ours.keys() == theirs.keys()
    for file, tensors in theirs.items():
        assert ours[file].keys() == tensors.keys()  # a tied head is in neither
        for name, tensor in tensors.items():
            assert ours[file][name].dtype == tensor.dtype
            torch.testing.assert_close(ours[file][name], tensor, atol=2e-3, rtol=0.02)
    again = AutoModelForCausalLM.from_pretrained(fused / "model" / "aligned")
    assert type(again.model.layers[0].mlp) is LlamaMLP
    assert again.config.tie_word_embeddings == tied
