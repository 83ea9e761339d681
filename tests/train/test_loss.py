"""The loss against a loop over positions, for values and gradients."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import make_codes, make_model, make_vocabulary
from whyrec.backbone.lora import plain_model
from whyrec.backbone.packed_blocks import PackedBlocks
from whyrec.sid.trie import Trie
from whyrec.train import text_loss
from whyrec.train.loss import SidLoss, attach_sid_loss
from whyrec.train.packing import pack

LEVELS = (4, 3, 5)
CODES_NL = make_codes(LEVELS, num_items=17, seed=1)
VOCABULARY = make_vocabulary(LEVELS, first=30)
TRIE = Trie.build(CODES_NL, level_sizes=LEVELS)
PAD = 0


def make(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    return make_model(vocab_size=30 + sum(LEVELS) + 2, tied=tied, seed=seed)


def make_examples(*, seed: int = 0, rows: int = 4) -> list[dict[str, list[int]]]:
    """Text and whole SIDs, some wanted and some not, of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    examples = []
    for _ in range(rows):
        ids, labels = [3], [-100]
        for _ in range(2 + draw(6)):
            if draw(2):
                piece = VOCABULARY.encode(CODES_NL[draw(len(CODES_NL))].tolist())
            else:
                piece = [3 + draw(27) for _ in range(1 + draw(5))]
            ids += piece
            labels += piece if draw(3) else [-100] * len(piece)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def packed(examples: list[dict[str, list[int]]], *, trie: Trie = TRIE) -> dict[str, Any]:
    """One row with some padding at its end, as the model takes it."""
    tokens = sum(len(example["input_ids"]) for example in examples) + 3
    longest = max(len(example["input_ids"]) for example in examples)
    row = pack(
        examples,
        tokens=tokens,
        longest=longest,
        documents=len(examples) + 3,
        vocabulary=VOCABULARY,
        trie=trie,
        pad_id=PAD,
    )
    return {name: value for name, value in row.items() if name != "num_tokens"}


def attach(model: Any, sid_loss: SidLoss) -> None:
    attach_sid_loss(model, sid_loss, blocks=PackedBlocks(model, longest=1000))


def legal_codes(before: list[int]) -> list[int]:
    """Codes that follow the codes `before` in the catalogue, by looking at every item."""
    depth = len(before)
    return sorted({row[depth] for row in CODES_NL.tolist() if row[:depth] == before})


def naive_loss(
    model: nn.Module, examples: list[dict[str, list[int]]], *, smoothing: float
) -> Tensor:
    """One example and one position after the other, over plain logits."""
    terms = []
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        logits_TV = model(torch.tensor([ids])).logits[0]
        for t in range(1, len(labels)):
            if labels[t] == -100:
                continue
            logits_V = logits_TV[t - 1]
            levels = [
                level
                for level, offset in enumerate(VOCABULARY.offsets)
                if offset <= labels[t] < offset + LEVELS[level]
            ]
            if not levels:
                terms.append(-logits_V.log_softmax(0)[labels[t]])
                continue
            (level,) = levels
            before = [ids[t - level + d] - VOCABULARY.offsets[d] for d in range(level)]
            legal = [VOCABULARY.offsets[level] + code for code in legal_codes(before)]
            log_probs_K = logits_V[legal].log_softmax(0)
            target = log_probs_K[legal.index(labels[t])]
            terms.append(-(1 - smoothing) * target - smoothing * log_probs_K.mean())
    return torch.stack(terms).sum() / len(terms)


def losses(
    model: nn.Module,
    examples: list[dict[str, list[int]]],
    *,
    smoothing: float = 0.0,
    **extra: object,
) -> Tensor:
    attach(plain_model(model), SidLoss(VOCABULARY, TRIE, smoothing))
    output = model(**packed(examples), sid_loss=True, **extra)
    assert output.logits is None
    return output.loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradients_equal_the_naive_loss(tied: bool, smoothing: float, seed: int) -> None:
    model, examples = make(tied=tied, seed=seed), make_examples(seed=seed)
    naive = naive_loss(model, examples, smoothing=smoothing)
    expected = gradients(model, naive)
    loss = losses(model, examples, smoothing=smoothing)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = make(), make_examples(rows=6)
    whole = losses(model, examples, smoothing=0.1)
    expected = gradients(model, whole)
    monkeypatch.setattr(text_loss, "_CHUNK", 3)
    chunked = losses(model, examples, smoothing=0.1)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, gradient in gradients(model, chunked).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_num_items_in_batch_is_the_divisor(as_tensor: bool) -> None:
    """Rows whose losses share one divisor add up to the loss of the batch."""
    model, examples = make(), make_examples(rows=6)
    whole = losses(model, examples)
    count: int | Tensor = sum(label != -100 for e in examples for label in e["labels"][1:])
    count = torch.tensor(count) if as_tensor else count
    parts = [losses(model, half, num_items_in_batch=count) for half in (examples[:3], examples[3:])]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


def test_forced_codes_cost_nothing_and_give_no_nan() -> None:
    """One item in the catalogue: every code is forced."""
    model = make()
    trie = Trie.build(CODES_NL[:1], level_sizes=LEVELS)
    sid = VOCABULARY.encode(CODES_NL[0].tolist())
    examples = [{"input_ids": [5, *sid], "labels": [-100, *sid]}]
    attach(model, SidLoss(VOCABULARY, trie, 0.1))
    loss = model(**packed(examples, trie=trie), sid_loss=True).loss
    assert loss.item() == 0.0
    for name, gradient in gradients(model, loss).items():
        assert (gradient == 0).all(), name


def test_a_row_without_labels_is_no_nan() -> None:
    model, examples = make(), make_examples()
    for example in examples:
        example["labels"] = [-100] * len(example["labels"])
    loss = losses(model, examples)
    assert loss.item() == 0.0
    for gradient in gradients(model, loss).values():
        assert torch.isfinite(gradient).all()


def test_without_the_flag_the_model_is_itself() -> None:
    model, examples = make(), make_examples()
    ids = torch.tensor([examples[0]["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        losses(model, examples)
        after = model(ids).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("tied", [True, False])
def test_through_a_peft_model(tied: bool) -> None:
    """The adapters and the new rows are in the loss, and get its gradients."""
    model, examples = make(tied=tied), make_examples()
    rows = list(range(VOCABULARY.first, VOCABULARY.stop))
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        init_lora_weights=False,
        trainable_token_indices={name: rows for name in names},
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).eval()  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    loss = losses(adapted, examples, smoothing=0.1)
    found = gradients(adapted, loss)
    assert any("lora_A" in name for name in found)
    assert any("trainable_tokens" in name for name in found)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert all("lora_" in name or "trainable_tokens" in name for name in found)
    naive = naive_loss(adapted.merge_and_unload(), examples, smoothing=0.1)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)


def test_dropout_only_in_training() -> None:
    model, examples = make(), make_examples()
    attach(model, SidLoss(VOCABULARY, TRIE, dropout=0.5))
    with torch.no_grad():
        quiet = {model(**packed(examples), sid_loss=True).loss.item() for _ in range(3)}
        model.train()
        loud = {model(**packed(examples), sid_loss=True).loss.item() for _ in range(3)}
    assert len(quiet) == 1 and len(loud) == 3 and all(map(math.isfinite, loud))
