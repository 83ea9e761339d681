"""Backbones by name: the packaged one answers and reloads, the unknown is refused."""

import pytest
import torch

from whyrec.backbone.load import PACKAGED, load_backbone


@pytest.fixture(scope="module")
def packaged():
    return load_backbone(PACKAGED)


def chat(tokenizer, question: str) -> dict[str, torch.Tensor]:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def test_the_packaged_backbone_answers_sensibly(packaged) -> None:
    model, tokenizer = packaged
    inputs = chat(tokenizer, "What is the capital of France?")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in reply
    assert output[0, -1] == tokenizer.eos_token_id  # it knows where to stop


def test_the_packaged_backbone_is_a_plain_folder_that_reloads(packaged, tmp_path) -> None:
    model, tokenizer = packaged
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_backbone(str(tmp_path))
    inputs = chat(tokenizer, "Hello")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()


def test_random_weights_take_the_architecture_alone(backbone) -> None:
    pretrained, _ = load_backbone(str(backbone))
    random, tokenizer = load_backbone(str(backbone), random_weights=True)
    assert random.config.hidden_size == pretrained.config.hidden_size
    assert len(tokenizer) == random.config.vocab_size
    weights = zip(random.parameters(), pretrained.parameters(), strict=True)
    assert not all(torch.equal(r, p) for r, p in weights)


def test_a_dtype(backbone) -> None:
    for random_weights in (False, True):
        model, _ = load_backbone(str(backbone), dtype=torch.bfloat16, random_weights=random_weights)
        assert model.dtype == torch.bfloat16


def refused(name: str) -> str:
    with pytest.raises(ValueError) as error:
        load_backbone(name)
    message = str(error.value)
    assert "\n" not in message and PACKAGED in message and repr(name) in message
    return message


def test_an_unknown_name_is_one_sentence() -> None:
    refused("no-such-organisation/no-such-model")
    refused("smollm2_135m")


def test_an_empty_folder_is_one_sentence(tmp_path) -> None:
    refused(str(tmp_path))


def test_a_folder_without_weights_is_one_sentence(backbone, tmp_path) -> None:
    for file in backbone.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    refused(str(tmp_path))


def test_truncated_weights_are_one_sentence(backbone, tmp_path) -> None:
    for file in backbone.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(str(tmp_path))


def test_a_model_that_is_no_causal_lm_is_one_sentence(backbone, tmp_path) -> None:
    for file in backbone.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    refused(str(tmp_path))
