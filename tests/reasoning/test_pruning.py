"""The pruned context."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whyrec.reasoning.pruning import prune, read_vectors


@given(st.lists(st.integers(0, 19), max_size=30), st.integers(0, 19), st.integers(1, 12))
def test_the_nearest_in_order_of_time(history: list[int], target: int, k: int) -> None:
    vectors_ND = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    cosine = vectors_ND @ vectors_ND[target]
    # Brute force: newer events win ties, which repeated items make.
    ranked = sorted(range(len(history)), key=lambda place: (-cosine[history[place]], -place))
    expected = [history[place] for place in sorted(ranked[:k])]
    assert prune(history, target, vectors_ND=vectors_ND, k=k) == expected


def test_vectors_of_a_run_have_length_one(prepared_run: Path) -> None:
    vectors_ND = read_vectors(prepared_run / "sids" / "embeddings.safetensors")
    assert np.linalg.norm(vectors_ND, axis=1) == pytest.approx(1, abs=1e-5)


def test_no_vectors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whyrec index"):
        read_vectors(tmp_path / "embeddings.safetensors")
