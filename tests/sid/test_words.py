"""Word vectors: what shares words is near, whatever the width asked for."""

import pytest
import torch

from whyrec.catalog.alike import word_weights
from whyrec.catalog.dataset import Item
from whyrec.sid.words import with_words, word_vectors

TITLES = ["red hat", "red hat", "red shoe", "blue sock", "", "blue shoe lace"]
ITEMS = [Item(str(n), title) for n, title in enumerate(TITLES)]


def test_at_full_width_cosines_are_those_of_the_words() -> None:
    weights_NV = torch.from_numpy(word_weights(ITEMS).toarray())
    vectors_ND = word_vectors(ITEMS, dim=9)
    assert vectors_ND.shape == (6, 9) and not vectors_ND[:, 5:].any()  # the rank is 4 of 6 words
    assert torch.allclose(vectors_ND @ vectors_ND.T, weights_NV @ weights_NV.T, atol=1e-5)
    assert not vectors_ND[4].any()


def test_fewer_columns_keep_what_is_alike_together() -> None:
    vectors_ND = word_vectors(ITEMS, dim=2, seed=1)
    assert torch.equal(vectors_ND, word_vectors(ITEMS, dim=2, seed=1))
    assert vectors_ND[0] @ vectors_ND[1] == pytest.approx(1, abs=1e-5)
    assert vectors_ND[0] @ vectors_ND[2] > vectors_ND[0] @ vectors_ND[3]


@pytest.mark.parametrize("items", [[], ITEMS[4:5], ITEMS[:1], [ITEMS[4]] * 3])
def test_catalogues_of_hardly_any_words(items: list[Item]) -> None:
    vectors_ND = word_vectors(items, dim=3)
    assert vectors_ND.shape == (len(items), 3) and vectors_ND.isfinite().all()


def test_without_words_the_text_is_all_there_is() -> None:
    text_ND = torch.nn.functional.normalize(torch.randn(2, 4), dim=1)
    words_NW = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    joined_ND = with_words(text_ND, words_NW)
    assert torch.allclose(joined_ND.norm(dim=1), torch.ones(2))
    assert torch.allclose(joined_ND[1, :4], text_ND[1]) and not joined_ND[1, 4:].any()
    assert joined_ND[0, 4] == pytest.approx(0.8)
    assert with_words(text_ND, None) is text_ND
