"""Adapters and new rows: what trains, what is saved, and that it comes back."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from conftest import make_model
from whyrec.backbone.extend import extend_vocabulary, new_token_ids
from whyrec.backbone.lora import (
    add_lora,
    load_adapter,
    merged_weights,
    plain_model,
    save_adapter,
)

LEVELS = (5, 6)


def extend(tokenizer, *, tied: bool, levels=LEVELS, **settings):
    """An extended tiny model, the ids of its new rows and its tokenizer; always the same."""
    tokenizer = copy.deepcopy(tokenizer)
    model = make_model(vocab_size=len(tokenizer), tied=tied, **settings)
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=levels)
    return model, new_token_ids(vocabulary, tokenizer), tokenizer


def trained(tokenizer, *, tied: bool) -> PeftModel:
    """An adapted model whose trainable parameters are bf16 numbers, none of them zero."""
    model, token_ids, _ = extend(tokenizer, tied=tied)
    adapted = add_lora(model, token_ids=token_ids, rank=4, alpha=8.0, dropout=0.0).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise
            parameter.data = parameter.data.bfloat16().float()
    return adapted


def logits(model, tokenizer) -> torch.Tensor:
    ids = torch.tensor([[*tokenizer.encode("What comes next?"), len(tokenizer) + 4]])
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [True, False])
def test_what_trains(tokenizer, tied: bool) -> None:
    model, token_ids, _ = extend(tokenizer, tied=tied)
    hidden = model.config.hidden_size
    adapted = add_lora(model, token_ids=token_ids, rank=4, alpha=8.0, dropout=0.0)
    trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    rows = [p for n, p in trainable.items() if "trainable_tokens_delta" in n]
    assert [tuple(p.shape) for p in rows] == [(len(token_ids), hidden)] * (1 if tied else 2)
    lora = [n for n in trainable if "lora_" in n]
    assert len(lora) == 2 * 7 * model.config.num_hidden_layers
    assert len(lora) + len(rows) == len(trainable)
    assert not any("lm_head" in n or "embed_tokens" in n for n in lora)
    assert plain_model(adapted) is model and plain_model(model) is model


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_gives_the_same_logits(tokenizer, tmp_path, tied: bool) -> None:
    adapted = trained(tokenizer, tied=tied)
    expected = logits(adapted, tokenizer)
    save_adapter(adapted, tmp_path / "checkpoint")
    fresh, token_ids, _ = extend(tokenizer, tied=tied)
    assert not torch.allclose(logits(fresh, tokenizer), expected, atol=1e-2)
    loaded = load_adapter(fresh, tmp_path / "checkpoint", token_ids=token_ids).eval()
    torch.testing.assert_close(logits(loaded, tokenizer), expected, atol=1e-4, rtol=1e-4)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    names = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == names
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokenizer), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_those_of_a_merged_model(tokenizer, tied: bool, kind: str) -> None:
    model, token_ids, _ = extend(tokenizer, tied=tied, kind=kind)
    plain = {name: weight.clone() for name, weight in merged_weights(model)}
    assert plain.keys() == dict(model.named_parameters()).keys()
    adapted = add_lora(model, token_ids=token_ids, rank=4, alpha=8.0, dropout=0.0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    with torch.no_grad():
        found = dict(merged_weights(adapted))
        inside = dict(merged_weights(plain_model(adapted)))
    assert all(torch.equal(before[name], weight) for name, weight in adapted.state_dict().items())
    expected = dict(adapted.merge_and_unload().named_parameters())
    assert found.keys() == inside.keys() == expected.keys() == plain.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.data)
        assert torch.equal(found[name], inside[name])
    assert not torch.equal(found["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_the_file_is_small_and_names_no_machine(tokenizer, tmp_path) -> None:
    adapted = trained(tokenizer, tied=True)
    adapted.peft_config["default"].base_model_name_or_path = "/home/somebody/model"
    save_adapter(adapted, tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sum(t.numel() for t in tensors.values()) == trainable  # no whole embedding among them
    assert "/home" not in (tmp_path / "checkpoint" / "adapter_config.json").read_text()
    assert adapted.peft_config["default"].base_model_name_or_path == "/home/somebody/model"


@pytest.mark.parametrize(
    "other",
    [
        {"hidden_size": 32, "head_dim": 8},
        {"num_hidden_layers": 1},
        {"levels": (5, 4)},
        {"levels": (5, 9)},
    ],
    ids=["wider", "fewer layers", "fewer codes", "more codes"],
)
def test_an_adapter_that_does_not_fit(tokenizer, tmp_path, other: dict) -> None:
    save_adapter(trained(tokenizer, tied=True), tmp_path / "checkpoint")
    model, token_ids, _ = extend(tokenizer, tied=True, **other)
    with pytest.raises(ValueError, match="does not fit this backbone") as error:
        load_adapter(model, tmp_path / "checkpoint", token_ids=token_ids)
    assert "\n" not in str(error.value)


def test_no_adapter(tokenizer, tmp_path) -> None:
    model, token_ids, _ = extend(tokenizer, tied=True)
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(model, tmp_path, token_ids=token_ids)


def test_a_broken_adapter(tokenizer, tmp_path) -> None:
    save_adapter(trained(tokenizer, tied=True), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    model, token_ids, _ = extend(tokenizer, tied=True)
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(model, tmp_path, token_ids=token_ids)
