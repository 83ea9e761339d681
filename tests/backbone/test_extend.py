"""New rows follow the codebooks; old rows and old logits stay."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conftest import make_model
from whyrec.backbone.extend import extend_vocabulary, new_token_ids
from whyrec.sid.vocabulary import MARKERS, SidVocabulary

LEVELS = (6, 5)


def codebooks(dims: int = 7, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 + torch.randn(size, dims, generator=generator) for size in LEVELS]


def make(tokenizer: PreTrainedTokenizerBase, *, tied: bool = True, padding: int = 0):
    return (
        make_model(vocab_size=len(tokenizer) + padding, tied=tied),
        copy.deepcopy(tokenizer),
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 8, 64])  # rows beyond the tokenizer: too few and enough
def test_new_rows_follow_the_codebooks(tokenizer, tied: bool, padding: int) -> None:
    model, tokenizer = make(tokenizer, tied=tied, padding=padding)
    old = len(tokenizer)
    before = {
        name: weight[:old].clone()
        for name, weight in model.state_dict().items()
        if name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    ids = torch.tensor([tokenizer.encode("What comes next?")])
    with torch.no_grad():
        logits = model(ids).logits[..., :old]
    books = codebooks()
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=LEVELS, codebooks=books)
    assert vocabulary == SidVocabulary.bind(tokenizer, level_sizes=LEVELS)
    assert vocabulary.stop == len(tokenizer) == old + len(MARKERS) + sum(LEVELS)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == model.config.vocab_size == max(old + padding, len(tokenizer))
    same_weight = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same_weight == tied

    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :old], logits)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight_VD = module.weight.detach()
        mean_D, spread = weight_VD[:old].mean(0), weight_VD[:old].std()
        for book_KC, offset in zip(books, vocabulary.offsets, strict=True):
            rows_KD = weight_VD[offset : offset + len(book_KC)]
            distances, wanted = torch.pdist(rows_KD), torch.pdist(book_KC)
            ratio = (distances / wanted).mean()
            torch.testing.assert_close(distances, wanted * ratio, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(rows_KD.mean(0), mean_D, rtol=0, atol=1e-4)
            assert (rows_KD - mean_D).std().item() == pytest.approx(spread.item(), rel=0.1)
        # each level has a rotation of its own
        first, second = (weight_VD[o : o + 5] - mean_D for o in vocabulary.offsets)
        assert not torch.allclose(first, second, atol=1e-2)
    for name, weight in model.state_dict().items():
        if name in before:
            assert torch.equal(weight[:old], before[name])


@pytest.mark.parametrize("dims", [3, 16, 40])  # fewer, as many, more than the hidden size
def test_codebooks_of_any_width(tokenizer, dims: int) -> None:
    model, tokenizer = make(tokenizer)
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=LEVELS, codebooks=codebooks(dims))
    rows = model.get_input_embeddings().weight[vocabulary.first : vocabulary.stop]
    assert torch.isfinite(rows).all() and len(torch.unique(rows, dim=0)) == sum(LEVELS)


def test_a_codebook_of_zeros_gives_the_mean_row(tokenizer) -> None:
    """A last level that only numbers items has no geometry."""
    model, tokenizer = make(tokenizer)
    books = [codebooks()[0], torch.zeros(5, 7)]
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=LEVELS, codebooks=books)
    weight = model.get_input_embeddings().weight
    assert torch.isfinite(weight).all()
    mean_D = weight[: vocabulary.first - len(MARKERS)].mean(0)
    torch.testing.assert_close(weight[vocabulary.stop - 1], mean_D, rtol=0, atol=1e-4)


def test_noise_without_codebooks_and_the_seed(tokenizer) -> None:
    weights = []
    for seed in (0, 0, 1):
        model, copied = make(tokenizer)
        vocabulary = extend_vocabulary(model, copied, level_sizes=LEVELS, seed=seed)
        weights.append(model.get_input_embeddings().weight[vocabulary.first :].detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert len(torch.unique(weights[0], dim=0)) == sum(LEVELS)


def test_an_untied_head_is_the_same_in_every_run(tokenizer) -> None:
    heads = []
    for _ in range(4):
        model, copied = make(tokenizer, tied=False)
        extend_vocabulary(model, copied, level_sizes=LEVELS, codebooks=codebooks())
        heads.append(model.get_output_embeddings().weight.detach())
    assert all(torch.equal(head, heads[0]) for head in heads)


def test_twice_is_refused(tokenizer) -> None:
    model, tokenizer = make(tokenizer)
    extend_vocabulary(model, tokenizer, level_sizes=LEVELS)
    with pytest.raises(ValueError, match="start from the plain backbone"):
        extend_vocabulary(model, tokenizer, level_sizes=LEVELS)
    with pytest.raises(ValueError, match="start from the plain backbone"):
        extend_vocabulary(model, tokenizer, level_sizes=(2, 2))


def test_a_backbone_that_can_think_already_keeps_its_markers(tokenizer) -> None:
    """Qwen3's `<think>` rows are trained; they are neither made anew nor moved."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    model = make_model(vocab_size=len(tokenizer), tied=False)
    old = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    before = model.get_input_embeddings().weight[old].clone()
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=LEVELS)
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == old
    assert torch.equal(model.get_input_embeddings().weight[old], before)
    assert set(old) < set(new_token_ids(vocabulary, tokenizer))


def test_new_token_ids(tokenizer) -> None:
    model, tokenizer = make(tokenizer)
    old = len(tokenizer)
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=LEVELS)
    assert new_token_ids(vocabulary, tokenizer) == list(range(old, len(tokenizer)))
