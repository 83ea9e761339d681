"""The loss against a loop over positions, for values and gradients."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import make_codes, make_model, make_vocabulary
from whyrec.backbone.lora import plain_model
from whyrec.sid.trie import Trie
from whyrec.train import loss as loss_module
from whyrec.train.loss import SidLoss, attach_sid_loss

LEVELS = (4, 3, 5)
CODES_NL = make_codes(LEVELS, num_items=17, seed=1)
VOCABULARY = make_vocabulary(LEVELS, first=30)
TRIE = Trie.build(CODES_NL, level_sizes=LEVELS)
PAD = 0


def make(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    return make_model(vocab_size=30 + sum(LEVELS) + 2, tied=tied, seed=seed)


def make_batch(*, seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    """Rows of text and whole SIDs, some wanted and some not, of different lengths."""
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
        examples.append((ids, labels))
    longest = max(len(ids) for ids, _ in examples) + 2

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([ids for ids, _ in examples], PAD),
        "labels": padded([labels for _, labels in examples], -100),
        "attention_mask": padded([[1] * len(ids) for ids, _ in examples], 0),
    }


def legal_codes(before: list[int]) -> list[int]:
    """Codes that follow the codes `before` in the catalogue, by looking at every item."""
    depth = len(before)
    return sorted({row[depth] for row in CODES_NL.tolist() if row[:depth] == before})


def naive_loss(model: nn.Module, batch: dict[str, Tensor], *, smoothing: float) -> Tensor:
    """One position after the other, over plain logits."""
    logits_BTV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    terms = []
    for row, labels in enumerate(batch["labels"].tolist()):
        ids = batch["input_ids"][row].tolist()
        for t in range(1, len(labels)):
            if labels[t] == -100:
                continue
            logits_V = logits_BTV[row, t - 1]
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
    model: nn.Module, batch: dict[str, Tensor], *, smoothing: float = 0.0, **extra: object
) -> Tensor:
    attach_sid_loss(plain_model(model), SidLoss(VOCABULARY, TRIE, smoothing))
    output = model(**batch, sid_loss=True, **extra)
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
    model, batch = make(tied=tied, seed=seed), make_batch(seed=seed)
    naive = naive_loss(model, batch, smoothing=smoothing)
    expected = gradients(model, naive)
    loss = losses(model, batch, smoothing=smoothing)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(), make_batch(rows=6)
    whole = losses(model, batch, smoothing=0.1)
    expected = gradients(model, whole)
    monkeypatch.setattr(loss_module, "_CHUNK", 3)
    chunked = losses(model, batch, smoothing=0.1)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, gradient in gradients(model, chunked).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_num_items_in_batch_is_the_divisor(as_tensor: bool) -> None:
    """Micro-batches whose losses share one divisor add up to the loss of the batch."""
    model, batch = make(), make_batch(rows=6)
    whole = losses(model, batch)
    count: int | Tensor = int((batch["labels"][:, 1:] != -100).sum())
    count = torch.tensor(count) if as_tensor else count
    halves = [{name: t[rows] for name, t in batch.items()} for rows in ([0, 1, 2], [3, 4, 5])]
    parts = [losses(model, half, num_items_in_batch=count) for half in halves]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


def test_forced_codes_cost_nothing_and_give_no_nan() -> None:
    """One item in the catalogue: every code is forced."""
    model = make()
    trie = Trie.build(CODES_NL[:1], level_sizes=LEVELS)
    sid = VOCABULARY.encode(CODES_NL[0].tolist())
    batch = {
        "input_ids": torch.tensor([[5, *sid]]),
        "labels": torch.tensor([[-100, *sid]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
    }
    attach_sid_loss(model, SidLoss(VOCABULARY, trie, 0.1))
    loss = model(**batch, sid_loss=True).loss
    assert loss.item() == 0.0
    for name, gradient in gradients(model, loss).items():
        assert (gradient == 0).all(), name


def test_a_batch_without_labels_is_no_nan() -> None:
    model, batch = make(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = losses(model, batch)
    assert loss.item() == 0.0
    for gradient in gradients(model, loss).values() if loss.requires_grad else ():
        assert torch.isfinite(gradient).all()


def test_without_the_flag_the_model_is_itself() -> None:
    model, batch = make(), make_batch()
    with torch.no_grad():
        before = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses(model, batch)
        after = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("tied", [True, False])
def test_through_a_peft_model(tied: bool) -> None:
    """The adapters and the new rows are in the loss, and get its gradients."""
    model, batch = make(tied=tied), make_batch()
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
    loss = losses(adapted, batch, smoothing=0.1)
    found = gradients(adapted, loss)
    assert any("lora_A" in name for name in found)
    assert any("trainable_tokens" in name for name in found)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert all("lora_" in name or "trainable_tokens" in name for name in found)
    naive = naive_loss(adapted.merge_and_unload(), batch, smoothing=0.1)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)


def test_dropout_only_in_training() -> None:
    model, batch = make(), make_batch()
    attach_sid_loss(model, SidLoss(VOCABULARY, TRIE, dropout=0.5))
    with torch.no_grad():
        quiet = {model(**batch, sid_loss=True).loss.item() for _ in range(3)}
        model.train()
        loud = {model(**batch, sid_loss=True).loss.item() for _ in range(3)}
    assert len(quiet) == 1 and len(loud) == 3 and all(map(math.isfinite, loud))
