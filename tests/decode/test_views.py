"""Views of a history: what they may leave out, and their mixture against brute force."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import NUM_ITEMS, Extended
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.ranking import rank_histories
from whyrec.decode.views import rank_views, view_of

HISTORIES = [np.array(h, np.int64) for h in ([3, 1, 7, 2], [5], [0, 4, 8, 6, 9, 2])]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), view=st.integers(0, 6))
def test_a_view_is_some_of_the_history(sizes: list[int], view: int) -> None:
    histories = [np.arange(size) + 10 * n for n, size in enumerate(sizes)]
    seen = view_of(histories, view)
    assert len(seen) == len(histories)
    for history, shown in zip(histories, seen, strict=True):
        assert len(shown) and set(shown.tolist()) <= set(history.tolist())
        assert len(set(shown.tolist())) == len(shown)
        moved = np.abs(shown.argsort().argsort() - np.arange(len(shown)))
        assert moved.max() <= 2 if len(moved) else True  # jitter of two places at most
    again = view_of(histories, view)
    assert all(np.array_equal(a, b) for a, b in zip(seen, again, strict=True))
    assert view or all(a is b for a, b in zip(seen, histories, strict=True))


def test_views_are_mixed_by_their_probabilities_and_exclude_the_whole_history(
    extended: Extended,
) -> None:
    decoder = BeamDecoder(extended.model, vocabulary=extended.vocabulary, trie=extended.trie)
    how = {"width": NUM_ITEMS, "max_history": 8}  # as wide as the catalogue: nothing is missed
    kept, excluded = rank_views(
        decoder, extended.encoder, HISTORIES, views=3, exclude_history=[False, True], **how
    )
    total = np.zeros((len(HISTORIES), NUM_ITEMS))
    for view in range(3):
        (ranking,) = rank_histories(
            decoder,
            extended.encoder,
            view_of(HISTORIES, view),
            exclude_history=[False],
            **how,
        )
        for place, items in enumerate(ranking.items_EW):
            total[place, items] += np.exp(ranking.scores_EW[place]) / 3
    for place, history in enumerate(HISTORIES):
        found = np.exp(kept.scores_EW[place])
        np.testing.assert_allclose(found, total[place, kept.items_EW[place]], rtol=1e-4)
        assert (np.diff(found) <= 1e-7).all()
        left = excluded.items_EW[place][excluded.items_EW[place] >= 0]
        assert sorted(left.tolist()) == sorted(set(range(NUM_ITEMS)) - set(history.tolist()))
    (alone,) = rank_views(decoder, extended.encoder, HISTORIES, views=1, **how)
    (plain,) = rank_histories(decoder, extended.encoder, HISTORIES, **how)
    np.testing.assert_array_equal(alone.items_EW, plain.items_EW)
