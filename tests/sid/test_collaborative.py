"""Co-occurrence counts, PPMI and their vectors against plain loops and dense algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrec.sid.collaborative import (
    CONTEXT_EXPONENT,
    borrow_from_neighbours,
    collaborative_vectors,
    company_weights,
    cooccurrence,
    fuse,
    ppmi,
)

NUM_ITEMS = 7
sequences_of_items = st.lists(
    st.lists(st.integers(0, NUM_ITEMS - 1), max_size=8).map(lambda s: np.array(s, dtype=np.int32)),
    max_size=6,
)


@settings(deadline=None)
@given(sequences_of_items, st.integers(1, 4))
def test_counts_equal_a_plain_loop(sequences, window):
    expected = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for sequence in sequences:
        for i in range(len(sequence)):
            for j in range(i + 1, min(len(sequence), i + window + 1)):
                if sequence[i] != sequence[j]:
                    expected[sequence[i], sequence[j]] += 1 / (j - i)
                    expected[sequence[j], sequence[i]] += 1 / (j - i)
    counts = cooccurrence(sequences, num_items=NUM_ITEMS, window=window)
    np.testing.assert_allclose(counts.toarray(), expected)


def random_sequences(num_items, seed=0, users=200):
    """Users who stay within one of two halves of the catalogue."""
    rng = np.random.default_rng(seed)
    half = num_items // 2
    return [rng.integers(0, half, 8) + half * (user % 2) for user in range(users)]


def test_ppmi_equals_the_formula():
    counts = cooccurrence(random_sequences(10), num_items=10, window=3)
    dense = counts.toarray()
    context = dense.sum(0) ** CONTEXT_EXPONENT
    joint = dense / dense.sum()
    outer = np.outer(dense.sum(1) / dense.sum(), context / context.sum())
    with np.errstate(divide="ignore"):
        expected = np.maximum(np.log(joint / outer), 0)
    np.testing.assert_allclose(ppmi(counts).toarray(), expected, atol=1e-12)


def test_vectors_are_those_of_a_dense_svd_up_to_sign():
    sequences = random_sequences(12)
    vectors_ND = collaborative_vectors(sequences, num_items=12, dim=4, window=3).numpy()
    matrix = ppmi(cooccurrence(sequences, num_items=12, window=3)).toarray()
    left, values, _ = np.linalg.svd(matrix)
    expected = left[:, :4] * np.sqrt(values[:4])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors_ND @ vectors_ND.T, expected @ expected.T, atol=1e-5)


def test_items_used_together_are_near():
    vectors_ND = collaborative_vectors(random_sequences(20), num_items=20, dim=3)
    similarity = vectors_ND @ vectors_ND.T
    within, across = similarity[:10, :10].mean(), similarity[:10, 10:].mean()
    assert within > across + 0.5


def test_same_result_twice_and_zeros_for_unseen_items():
    sequences = random_sequences(12)
    first = collaborative_vectors(sequences, num_items=15, dim=4, seed=3)
    assert torch.equal(first, collaborative_vectors(sequences, num_items=15, dim=4, seed=3))
    assert torch.equal(first[12:], torch.zeros(3, 4))
    torch.testing.assert_close(first[:12].norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("sequences", [[], [np.array([], dtype=np.int32)], [np.array([2])]])
def test_no_pairs_give_zeros(sequences):
    assert not collaborative_vectors(sequences, num_items=4, dim=3).any()


def test_more_dimensions_than_items_are_padded_with_zeros():
    vectors_ND = collaborative_vectors(random_sequences(6), num_items=6, dim=16)
    assert vectors_ND.shape == (6, 16) and not vectors_ND[:, 5:].any()


def test_an_unseen_item_borrows_from_items_of_like_text():
    known_text = torch.eye(4)
    known = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    text = torch.nn.functional.normalize(torch.tensor([[1.0, 0.9, 0.1, 0.0]]), dim=1)
    found = borrow_from_neighbours(
        text, known_text_ND=known_text, known_vectors_NC=known, neighbours=2
    )
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]]))
    nobody = borrow_from_neighbours(text, known_text_ND=known_text[:0], known_vectors_NC=known[:0])
    assert torch.equal(nobody, torch.zeros(1, 2))
    nothing = borrow_from_neighbours(text[:0], known_text_ND=known_text, known_vectors_NC=known)
    assert nothing.shape == (0, 2)


def test_fused_vectors_weigh_the_collaborative_part():
    text, other = torch.ones(2, 3), torch.ones(2, 2)
    assert fuse(text, None, weight=0.5) is text
    expected = torch.tensor([[1, 1, 1, 0.5, 0.5]] * 2)
    torch.testing.assert_close(fuse(text, other, weight=0.5), expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "soap", "comb", "hair oil"])), st.floats(0, 2, width=32))
def test_only_items_of_one_text_need_company(texts, weight):
    weights = company_weights(texts, weight=weight).tolist()
    for text, here in zip(texts, weights, strict=True):
        alone = sum(other == text for other in texts) == 1
        assert here == pytest.approx(weight if alone else max(weight, 1.0))


def test_fused_vectors_have_weights_of_their_own():
    text, other = torch.ones(2, 3), torch.ones(2, 2)
    fused = fuse(text, other, weight=torch.tensor([0.0, 1.0]))
    assert fused.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
